"""Attention of a packed batch: ours by segments against SDPA under a block-diagonal mask, as transformers runs it on
such a batch, and flash-attn's kernel for segments.

Bound: the products of the scores that are there, half a square a segment.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider
from ibft.attention import Segments, packed_attention

pytestmark = pytest.mark.part("ops")

# rows, their length, samples a row, query heads, key heads, head size
SIZES = {"cpu": [(4, 512, 8, 6, 2, 32)], "cuda": [(4, 2048, 8, 32, 8, 128)]}


def ours(t):
    return (packed_attention(t["q"], t["k"], t["v"], t["segments"], scale=t["q"].shape[-1] ** -0.5),)


def masked(t):
    """transformers' own function: it repeats the key heads, because SDPA has no fused kernel for groups and a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, T = t["mask"].shape[0], t["mask"].shape[-1]
    q, k, v = (t[name].view(B, T, -1, t[name].shape[-1]).transpose(1, 2) for name in "qkv")
    layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1])
    out, _ = sdpa_attention_forward(layer, q, k, v, t["mask"], scaling=q.shape[-1] ** -0.5)
    return (out.reshape(B * T, -1),)


def flash_attn(t):
    from flash_attn import flash_attn_varlen_func

    ends, longest = t["segments"].cu_seqlens, t["segments"].max_length
    return (flash_attn_varlen_func(t["q"], t["k"], t["v"], ends, ends, longest, longest, causal=True).flatten(1),)


# no torch.compile: SDPA and its mask are one call already
PROVIDERS = {
    "ours": Provider(ours),
    "masked sdpa": Provider(masked),
    "flash-attn": Provider(flash_attn, package="flash-attn", module="flash_attn", gpu_only=True),
}
CASES = {"cpu": [("full", 0)], "cuda": [(mode, 0) for mode in MODES]}  # mode, which of SIZES


@cache
def segment_lengths(rows, length, samples):
    """The same in every set of inputs: the work depends on them."""
    draw = torch.Generator().manual_seed(0)
    lengths = []
    for _ in range(rows):
        cuts = sorted(torch.randperm(length - 1, generator=draw)[: samples - 1].add(1).tolist())
        lengths += [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return lengths


def comparison(device, mode, size):
    B, T, samples, heads, kv_heads, d = SIZES[device.type][size]
    lengths = segment_lengths(B, T, samples)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        widths = {"q": heads, "k": kv_heads, "v": kv_heads}
        leaves = {
            name: torch.randn(B * T, width, d, device=device).to(dtype).requires_grad_()
            for name, width in widths.items()
        }
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(B, T).to(device)
        mask = (owner[:, :, None] == owner[:, None, :]).tril()[:, None]
        return leaves | {"segments": Segments.of(lengths).to(device), "mask": mask}

    scores = heads * sum(length * (length + 1) / 2 for length in lengths)
    # Two products of d forward. Backward: the scores again, and the gradients of v, of the probabilities, of q and of k
    products = {"forward": 2, "backward": 5, "full": 7}[mode]
    return Comparison(
        "attention", "packed_attention",
        {"N": B * T, "detail": f"heads {heads} and {kv_heads} of {d}, {B} rows, {len(lengths)} segments"},
        dtype, inputs, PROVIDERS, reference="masked sdpa", mode=mode, flop=products * 2 * d * scores,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_packed_attention(compare, device, provider, case):
    compare(comparison(device, *case), provider)
