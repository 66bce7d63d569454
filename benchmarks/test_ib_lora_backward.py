"""The gradient at the tap: the bottleneck's part added to what arrives, and the sum's product with LoRA's B.

`ours` is one call of ib_lora_backward; `separate` is the bottleneck's own backward and then the product; `eager` is the
formulas in plain PyTorch. `fused` and `library` are the two routes of ours on a GPU, whichever of them the launch file
prefers. mode "frozen": dhidden and dlora; "full": the encoder's gradients too. All add into the buffer that arrives.
"""

import pytest
import torch
from peak_memory import peak_mib

from ibft_kernels import _launch, ib_bottleneck_latent, ib_lora_backward, philox_normal, reference
from ibft_kernels.ops.ib_bottleneck import chosen_route

SHAPES = {"cpu": (2048, 1024, 256, 32, torch.float32), "cuda": (8192, 4096, 256, 32, torch.bfloat16)}
SEED, SCALING, RANGE = 1, 0.5, (-4.0, 4.0)
OPS = torch.ops.ibft_kernels


def ours(dhidden, saved, full):
    grads = ib_lora_backward(
        dhidden, **saved, scaling=SCALING, seed=SEED, reduction="batchmean", inplace=True, needs_weight=full,
        needs_bias=full,
    )  # fmt: skip
    return tuple(grad for grad in grads if grad is not None)


def separate(dhidden, saved, full):
    dz, dkl, weight, mulogvar, inverse, lora_b, hidden, eps = saved.values()
    route = chosen_route("auto", hidden.device, hidden.dtype)
    encoder = OPS.ib_bottleneck_backward_(
        dhidden, dz, dkl, hidden, weight, mulogvar, inverse, None, eps, None, None, SEED, RANGE, "batchmean", route,
        full, full,
    )  # fmt: skip
    dlora = SCALING * (dhidden @ lora_b.to(dhidden.dtype))
    return dhidden, dlora, *(encoder if full else ())


def eager(dhidden, saved, full):
    dz, dkl, weight, mulogvar, inverse, lora_b, hidden, eps = saved.values()
    mu, raw = mulogvar.float().chunk(2, dim=1)
    if eps is None:  # as autograd would have kept it
        eps = kept_noise(mu)
    logvar, g = raw.clamp(*RANGE), dkl * inverse
    std = (logvar / 2).exp()
    dlogvar = 0.5 * (dz * eps * std + g * (std * std - 1)) * ((raw >= RANGE[0]) & (raw <= RANGE[1]))
    pair = torch.cat([dz + g * mu, dlogvar], dim=1).to(dhidden.dtype)
    dhidden += pair @ weight.to(pair.dtype)
    dlora = SCALING * (dhidden @ lora_b.to(pair.dtype))
    encoder = (pair.t() @ hidden, pair.sum(dim=0)) if full else ()
    return dhidden, dlora, *(grad.to(weight.dtype) for grad in encoder)


_noise: dict[torch.Size, torch.Tensor] = {}


def kept_noise(mu):
    if mu.shape not in _noise:
        ids = torch.zeros(mu.shape[0], 3, dtype=torch.int32, device=mu.device)
        ids[:, 2] = torch.arange(mu.shape[0])
        _noise[mu.shape] = philox_normal(SEED, ids, mu.shape[1])
    return _noise[mu.shape]


PROVIDERS = {"ours": ours, "fused": ours, "library": ours, "separate": separate, "eager": eager}


@pytest.fixture
def route(provider, device, monkeypatch):
    if provider not in ("fused", "library"):
        return
    if device.type == "cpu":
        pytest.skip("a CPU has one route")
    shapes = _launch.shapes_of(_launch.architecture_of(device))
    monkeypatch.setitem(shapes, "ib_lora_backward", {"route": {"fused": "fused", "library": "product"}[provider]})


@pytest.mark.parametrize("mode", ["frozen", "full"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.usefixtures("route")
def test_ib_lora_backward(benchmark, record, device, provider, mode):
    N, D, Z, R, dtype = SHAPES[device.type]
    torch.manual_seed(0)
    hidden, arriving = torch.randn(2, N, D, device=device).to(dtype)
    weight, lora_b = torch.randn(2 * Z, D, device=device) * D**-0.5, torch.randn(D, R, device=device)
    latent = ib_bottleneck_latent(hidden, weight, None, seed=SEED, reduction="batchmean")
    saved = {
        "dz": torch.randn(N, Z, device=device).to(dtype), "dkl": torch.tensor(0.7, device=device), "weight": weight,
        "mulogvar": torch.cat([latent.mu, latent.logvar], dim=1),
        "inverse": torch.full((1,), 1 / N, device=device), "lora_b": lora_b, "hidden": hidden,
        "eps": kept_noise(latent.mu) if device.type == "cpu" else None,  # the torch path keeps what its forward drew
    }  # fmt: skip

    def step(dhidden, op=PROVIDERS[provider]):
        result = op(dhidden, saved, mode == "full")
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    exact = {name: None if t is None else t.double() for name, t in saved.items()}
    truth = reference.ib_lora_backward(
        arriving.double(), **exact, scaling=SCALING, seed=SEED, reduction="batchmean", needs_weight=True,
        needs_bias=True,
    )  # fmt: skip
    rel = 1e-5 if device.type == "cpu" else 2e-2
    for found, expected in zip(step(arriving.clone()), truth, strict=False):
        assert (found.double() - expected).norm() <= rel * expected.norm()
    buffer = arriving.clone()  # grows a little in each round; the time does not depend on it
    peak = peak_mib(lambda: step(buffer), device)
    benchmark.pedantic(step, args=(buffer,), warmup_rounds=3, rounds=15)
    record(
        "ib_lora_backward", op="ib_lora_backward", provider=provider, mode=mode, N=N, D=D, Z=Z, R=R,
        dtype=str(dtype)[6:], peak_mib=f"{peak:.1f}",
    )  # fmt: skip
