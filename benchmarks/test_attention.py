"""Attention of a packed batch, forward + backward: ours by segments against SDPA with a block-diagonal mask, as
transformers has it; and rotary embedding against transformers' `apply_rotary_pos_emb`.
"""

import pytest
import torch
import torch.nn.functional as F

from ibft.attention import Segments, packed_attention
from ibft_kernels import rotate

# rows, their length, samples a row, query heads, key heads, head size
SHAPES = {"cpu": (4, 512, 8, 6, 2, 32), "cuda": (4, 2048, 8, 32, 8, 128)}


def case(device):
    B, T, samples, heads, kv_heads, d = SHAPES[device.type]
    torch.manual_seed(0)
    cuts = [sorted(torch.randperm(T - 1)[: samples - 1].add(1).tolist()) for _ in range(B)]
    lengths = [end - start for row in cuts for start, end in zip([0, *row], [*row, T], strict=True)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(B * T, h, d, device=device).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(B, T).to(device)
    mask = (owner[:, :, None] == owner[:, None, :]).tril()[:, None]
    return q, k, v, Segments.of(lengths).to(device), mask


def masked(q, k, v, mask):
    B, T = mask.shape[0], mask.shape[-1]
    q, k, v = (x.view(B, T, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(B * T, -1)


def timed(benchmark, device, run, expected_run, leaves, tolerance):
    """The gate, then the time of forward and backward."""

    def step(run=run):
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return *outputs, *grads

    for found, expected in zip(step(), step(expected_run), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
    benchmark.pedantic(step, warmup_rounds=3, rounds=25)


@pytest.mark.parametrize("provider", ["ours", "masked sdpa"])
def test_packed_attention(benchmark, record, device, provider):
    q, k, v, segments, mask = case(device)
    ways = {
        "ours": lambda: packed_attention(q, k, v, segments, scale=q.shape[-1] ** -0.5),
        "masked sdpa": lambda: masked(q, k, v, mask),
    }
    tolerance = 2e-2 if q.dtype == torch.bfloat16 else 1e-5
    timed(benchmark, device, ways[provider], ways["masked sdpa"], [q, k, v], tolerance)
    record(
        "attention", op="packed_attention", provider=provider, mode="full", N=q.shape[0], heads=q.shape[1],
        kv_heads=k.shape[1], head_dim=q.shape[2], segments=len(segments.lengths), dtype=str(q.dtype)[6:],
    )  # fmt: skip


@pytest.mark.parametrize("provider", ["ours", "transformers"])
def test_rotary_embedding(benchmark, record, device, provider):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, _, segments, _ = case(device)
    angles = torch.rand(q.shape[0], q.shape[2] // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    ways = {
        "ours": lambda: rotate(q, k, cos, sin),
        "transformers": lambda: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1),
    }
    tolerance = 2e-2 if q.dtype == torch.bfloat16 else 1e-5
    timed(benchmark, device, ways[provider], ways["transformers"], [q, k], tolerance)
    record(
        "attention", op="rotate", provider=provider, mode="full", N=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1],
        head_dim=q.shape[2], segments=len(segments.lengths), dtype=str(q.dtype)[6:],
    )  # fmt: skip
