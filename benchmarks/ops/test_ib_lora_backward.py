"""The gradient at the tap: the bottleneck's part added to what arrives, and the sum's product with LoRA's B of rank 32.

`ours` is one call of ib_lora_backward, `ours, fused` and `ours, library` its two routes on a GPU, whichever the launch
file prefers; `separate` is the bottleneck's own backward and then the product; `eager` is the formulas in plain
PyTorch. Encoder frozen: dhidden and dlora; trained: the encoder's gradients too. All add into the buffer that arrives.
"""

import pytest
import torch

from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider
from benchmarks.ops.test_ib_bottleneck import SIZES, by_route
from ibft_kernels import ib_bottleneck_latent, ib_lora_backward, philox_normal, reference
from ibft_kernels.ops.ib_bottleneck import chosen_route

pytestmark = pytest.mark.part("ops")

R, SEED, SCALING, RANGE = 32, 1, 0.5, (-4.0, 4.0)
CASES = {device: ["encoder frozen", "encoder trained"] for device in SIZES}
SAVED = ("dz", "dkl", "weight", "mulogvar", "inverse", "lora_b")
OPS = torch.ops.ibft_kernels


def noise_of(t):
    """The torch path keeps what its forward drew; the kernels make the noise again of the seed."""
    return t["eps"] if t["hidden"].device.type == "cpu" else None


def ours(t):
    grads = ib_lora_backward(
        t["dhidden"], *(t[name] for name in SAVED), hidden=t["hidden"], eps=noise_of(t), scaling=SCALING, seed=SEED,
        reduction="batchmean", inplace=True, needs_weight=t["trained"], needs_bias=t["trained"],
    )  # fmt: skip
    return tuple(grad for grad in grads if grad is not None)


def separate(t):
    dhidden, trained = t["dhidden"], t["trained"]
    encoder = OPS.ib_bottleneck_backward_(
        dhidden, t["dz"], t["dkl"], t["hidden"], t["weight"], t["mulogvar"], t["inverse"], None, noise_of(t), None,
        None, SEED, RANGE, "batchmean", chosen_route("auto", dhidden.device, dhidden.dtype), trained, trained,
    )  # fmt: skip
    dlora = SCALING * (dhidden @ t["lora_b"].to(dhidden.dtype))
    return dhidden, dlora, *(encoder if trained else ())


def eager(t):
    """With the noise that autograd would have kept."""
    dhidden, dz, weight, eps = t["dhidden"], t["dz"], t["weight"], t["eps"]
    mu, raw = t["mulogvar"].float().chunk(2, dim=1)
    logvar, g = raw.clamp(*RANGE), t["dkl"] * t["inverse"]
    std = (logvar / 2).exp()
    dlogvar = 0.5 * (dz * eps * std + g * (std * std - 1)) * ((raw >= RANGE[0]) & (raw <= RANGE[1]))
    pair = torch.cat([dz + g * mu, dlogvar], dim=1).to(dhidden.dtype)
    dhidden += pair @ weight.to(pair.dtype)
    dlora = SCALING * (dhidden @ t["lora_b"].to(pair.dtype))
    encoder = (pair.t() @ t["hidden"], pair.sum(dim=0)) if t["trained"] else ()
    return dhidden, dlora, *(grad.to(weight.dtype) for grad in encoder)


def oracle(t):
    return reference.ib_lora_backward(
        t["dhidden"], *(t[name] for name in SAVED), hidden=t["hidden"], eps=t["eps"], scaling=SCALING,
        reduction="batchmean", needs_weight=t["trained"], needs_bias=t["trained"],
    )[: 4 if t["trained"] else 2]  # fmt: skip


PROVIDERS = {
    "reference": Provider(oracle, timed=False),
    "ours": Provider(ours),
    "ours, fused": by_route(ours, "ib_lora_backward", "fused", n_rank=R),
    "ours, library": by_route(ours, "ib_lora_backward", "product", n_rank=R),
    "separate": Provider(separate),
    "eager": Provider(eager),
}


def comparison(device, encoder):
    N, D, Z = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained = encoder == "encoder trained"

    def inputs(device):
        hidden, arriving = torch.randn(2, N, D, device=device).to(dtype)
        weight = torch.randn(2 * Z, D, device=device) * D**-0.5
        latent = ib_bottleneck_latent(hidden, weight, None, seed=SEED, reduction="batchmean")
        ids = torch.zeros(N, 3, dtype=torch.int32, device=device)
        ids[:, 2] = torch.arange(N, device=device)
        return {
            "dhidden": arriving, "dz": torch.randn(N, Z, device=device).to(dtype),
            "dkl": torch.tensor(0.7, device=device), "weight": weight,
            "mulogvar": torch.cat([latent.mu, latent.logvar], dim=1),
            "inverse": torch.full((1,), 1 / N, device=device), "lora_b": torch.randn(D, R, device=device),
            "hidden": hidden, "eps": philox_normal(SEED, ids, Z), "trained": trained,
        }  # fmt: skip

    # what arrives is read and written over; mu | logvar and dz are read, and dlora is written; the encoder and B are
    # read in fp32. A trained encoder reads hidden too, and its gradients are written in fp32.
    moved = (2 * N * D + 3 * N * Z + N * R) * dtype.itemsize + (2 * Z * D + D * R) * 4
    moved += trained * (N * D * dtype.itemsize + (2 * Z * D + 2 * Z) * 4)
    flop = 4 * N * Z * D * (1 + trained) + 2 * N * D * R
    return Comparison(
        "ib_lora_backward", "ib_lora_backward", {"N": N, "D": D, "Z": Z, "detail": encoder}, dtype, inputs, PROVIDERS,
        reference="reference", whole=True, consumes=("dhidden",), bytes=moved, flop=flop,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_ib_lora_backward(compare, device, provider, case):
    compare(comparison(device, case), provider)
