"""The bottleneck's encoder, z and KL: ours against the library's product alone, and against plain PyTorch.

`product` is hidden @ weight.T with nothing after it: what the epilogue of a fused kernel is held to.
`fused` and `library` are the two routes of our op on a GPU, whichever of them the launch file prefers.
"""

import pytest
import torch
from peak_memory import peak_mib

from ibft_kernels import _launch, ib_bottleneck, reference

SHAPES = {"cpu": (2048, 1024, 256, torch.float32), "cuda": (8192, 4096, 256, torch.bfloat16)}
OPTIONS = {"seed": 1, "reduction": "batchmean"}


def product(hidden, weight, bias):
    mu, logvar = torch.nn.functional.linear(hidden, weight, bias).chunk(2, dim=-1)
    return mu, logvar.sum(dtype=torch.float32)


def ours(hidden, weight, bias):
    return ib_bottleneck(hidden, weight, bias, **OPTIONS)


def eager(hidden, weight, bias):
    return reference.ib_bottleneck(hidden, weight, bias, **OPTIONS)


PROVIDERS = {"ours": ours, "fused": ours, "library": ours, "product": product, "eager": eager}


@pytest.fixture
def route(provider, device, monkeypatch):
    if provider not in ("fused", "library"):
        return
    if device.type == "cpu":
        pytest.skip("a CPU has one route")
    shapes = _launch.shapes_of(_launch.architecture_of(device))
    monkeypatch.setitem(shapes, "ib_bottleneck", {"route": {"fused": "fused", "library": "product"}[provider]})


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.usefixtures("route")
def test_ib_bottleneck(benchmark, record, device, provider, mode):
    N, D, Z, dtype = SHAPES[device.type]
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_(mode == "full")
    weight = (torch.randn(2 * Z, D, device=device) * D**-0.5).requires_grad_(mode == "full")
    bias = torch.zeros(2 * Z, device=device, requires_grad=mode == "full")
    upstream = torch.randn(N, Z, device=device).to(dtype)

    def step(op=PROVIDERS[provider]):
        w, b = (weight, bias) if op is ours else (weight.to(dtype), bias.to(dtype))
        z, kl = op(hidden, w, b)
        if mode == "forward":
            result = (z, kl)
        else:
            result = (z, kl, *torch.autograd.grad((z, kl), (hidden, weight, bias), (upstream, torch.ones_like(kl))))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    if provider != "product":
        for found, truth in zip(step(), step(eager), strict=True):
            rel = 1e-5 if device.type == "cpu" else 2e-2
            assert (found.double() - truth.double()).norm() <= rel * truth.double().norm()
    peak = peak_mib(step, device)
    benchmark.pedantic(step, warmup_rounds=3, rounds=15)
    record(
        "ib_bottleneck", op="ib_bottleneck", provider=provider, mode=mode, N=N, D=D, Z=Z, dtype=str(dtype)[6:],
        peak_mib=f"{peak:.1f}",
    )  # fmt: skip
