"""SwiGLU forward, and what a fused MLP's backward needs of it: h again, dgate and dup. Ours makes these in one visit,
in the place of dh, gate and up, which a training step has no more use for. Bound: each tensor passes once.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider, compiled, liger
from ibft_kernels import swiglu_backward_, swiglu_forward

pytestmark = pytest.mark.part("ops")

SIZES = {"cpu": [(4096, 2816)], "cuda": [(8192, 11008)]}


def ours(t):
    h = swiglu_forward(t["gate"], t["up"])
    swiglu_backward_(t["dh"], t["gate"], t["up"])
    return h, t["dh"], t["gate"], t["up"]


def by_autograd(silu_mul):
    """h is made a second time before the gradients: Liger's backward writes over gate and up, and gives no h back."""

    def run(t):
        gate, up = t["gate"].requires_grad_(), t["up"].requires_grad_()
        h = silu_mul(gate, up)
        with torch.no_grad():
            again = silu_mul(gate, up)
        return h.detach(), again, *torch.autograd.grad(h, (gate, up), t["dh"])

    return run


def liger_silu_mul(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def formulas(t):
    """For torch.compile: backward written out, so that it too is one graph with one visit."""
    gate, up, dh = t["gate"], t["up"], t["dh"]
    h = F.silu(gate) * up
    torch._dynamo.graph_break()  # a step runs other layers between forward and backward
    sigma = gate.float().sigmoid()
    s = gate.float() * sigma
    dgate = dh.float() * up.float() * (sigma * (1 + gate.float() * (1 - sigma)))
    return h, s.to(h.dtype) * up, dgate.to(h.dtype), (dh.float() * s).to(h.dtype)


PROVIDERS = {
    "ours": Provider(ours),
    "eager": Provider(by_autograd(lambda gate, up: F.silu(gate) * up)),
    "torch.compile": compiled(Provider(formulas)),
    "liger": liger(by_autograd(liger_silu_mul)),
}
CASES = {"cpu": [0], "cuda": [0]}  # which of SIZES


def comparison(device, size):
    N, D = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        return {name: torch.randn(N, D, device=device).to(dtype) for name in ("dh", "gate", "up")}

    return Comparison(
        "swiglu", "swiglu", {"N": N, "D": D}, dtype, inputs, PROVIDERS, whole=True, consumes=("dh", "gate", "up"),
        bytes=9 * N * D * dtype.itemsize,  # forward reads two and writes one, backward reads three and writes three
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_swiglu(compare, device, provider, case):
    compare(comparison(device, case), provider)
