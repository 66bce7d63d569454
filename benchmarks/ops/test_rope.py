"""`rotate`, the rotary embedding of queries and keys, against transformers' `apply_rotary_pos_emb`. Bound: each tensor
passes once.

Forward and backward in one, over copies made outside of the time: Liger's writes over q and k, and over the gradients
that it is given.
"""

import pytest
import torch

from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider, compiled, liger
from ibft_kernels import rotate

pytestmark = pytest.mark.part("ops")

SIZES = {"cpu": [(16384, 6, 2, 32)], "cuda": [(8192, 32, 8, 128)]}  # tokens, query heads, key heads, head size


def transformers_rotate(q, k, cos, sin):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)


def liger_rotate(q, k, cos, sin):
    """Its layout is [B, H, T, d], as a view of [B, T, H, d]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (x[None].transpose(1, 2) for x in (q, k))
    return tuple(x.transpose(1, 2)[0] for x in LigerRopeFunction.apply(q, k, cos[None], sin[None])[:2])


def both_ways(rotate):
    def run(t):
        q, k = t["q"].requires_grad_(), t["k"].requires_grad_()
        outputs = rotate(q, k, t["cos"], t["sin"])
        return *outputs, *torch.autograd.grad(outputs, (q, k), (t["dq"], t["dk"]))

    return run


EAGER = Provider(both_ways(transformers_rotate))
PROVIDERS = {
    "ours": Provider(both_ways(rotate)),
    "eager": EAGER,
    "torch.compile": compiled(EAGER),
    "liger": liger(both_ways(liger_rotate)),
}
CASES = {"cpu": [0], "cuda": [0]}  # which of SIZES


def comparison(device, size):
    N, heads, kv_heads, d = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        widths = {"q": heads, "k": kv_heads, "dq": heads, "dk": kv_heads}
        tensors = {name: torch.randn(N, width, d, device=device).to(dtype) for name, width in widths.items()}
        angles = torch.rand(N, d // 2, device=device).mul(6.3).repeat(1, 2)
        return tensors | {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}

    return Comparison(
        "rope", "rotate", {"N": N, "detail": f"heads {heads} and {kv_heads} of {d}"}, dtype, inputs, PROVIDERS,
        whole=True, consumes=("q", "k", "dq", "dk"),
        # q and k in and out, forward and backward; cos and sin are read by both
        bytes=4 * N * (heads + kv_heads + 1) * d * dtype.itemsize,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_rotate(compare, device, provider, case):
    compare(comparison(device, case), provider)
