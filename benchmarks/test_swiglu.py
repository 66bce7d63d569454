"""SwiGLU forward and what a fused MLP's backward needs of it (h again, dgate, dup): ours in one visit in place, and the
eager chain under autograd with h made again.
"""

import pytest
import torch
import torch.nn.functional as F

from ibft_kernels import swiglu_backward_, swiglu_forward

SHAPES = {"cpu": (2048, 2816, torch.float32), "cuda": (8192, 11008, torch.bfloat16)}


def ours(gate, up, dh):
    """Backward writes over its inputs, which a training step has no more use for: here over copies made beforehand."""
    h = swiglu_forward(gate, up)
    swiglu_backward_(dh, gate, up)
    return h, dh, gate, up


def eager(gate, up, dh):
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h = F.silu(gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    with torch.no_grad():
        again = F.silu(gate) * up
    return h.detach(), again, dgate, dup


PROVIDERS = {"ours": ours, "eager": eager}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider):
    N, inner, dtype = SHAPES[device.type]
    torch.manual_seed(0)
    given = [torch.randn(N, inner, device=device).to(dtype) for _ in range(3)]

    def fresh():
        return [x.clone() for x in given], {}

    def step(*tensors, name=provider):
        made = PROVIDERS[name](*tensors)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return made

    # the gate: a wrong op is not timed
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found, expected in zip(step(*fresh()[0]), step(*fresh()[0], name="eager"), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
    benchmark.pedantic(step, setup=fresh, warmup_rounds=3, rounds=25)
    record("swiglu", op="swiglu", provider=provider, mode="full", N=N, inner=inner, dtype=str(dtype)[6:])
