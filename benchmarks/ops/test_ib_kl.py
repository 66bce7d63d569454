"""`ib_kl_loss`: z and KL from mu and logvar, with noise that is given (eps) or drawn (Philox)."""

import pytest
import torch

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled
from ibft_kernels import ib_kl_loss, reference

pytestmark = pytest.mark.part("ops")

SIZES = {"cpu": [(2048, 64), (16384, 256)], "cuda": [(8192, 256), (262144, 256)]}


def way(op):
    def run(t):
        return op(t["mu"], t["logvar"], seed=1, eps=t.get("eps"), reduction="batchmean", normalizer=t["tokens"])

    return Provider(run)


PROVIDERS = {
    "ours": way(ib_kl_loss),
    "eager": way(reference.ib_kl_loss),
    "torch.compile": compiled(way(reference.ib_kl_loss)),
}


# mode, noise, which of SIZES
CASES = {
    "cpu": [("full", "philox", 0), ("full", "philox", 1), ("full", "given", 1)],
    "cuda": [(mode, noise, size) for size in (0, 1) for noise in ("philox", "given") for mode in MODES],
}  # fmt: skip


def comparison(device, mode, noise, size):
    N, Z = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        tensors = {name: torch.randn(N, Z, device=device).to(dtype) for name in ("mu", "logvar", "eps")}
        if noise == "philox":
            del tensors["eps"]
        leaves = {name: x.requires_grad_(name != "eps") for name, x in tensors.items()}
        return leaves | {"tokens": torch.tensor(float(N), device=device)}  # on the device: counting would wait for it

    # forward reads mu, logvar and writes z; backward reads them and dz, writes two gradients; both read a given eps
    passes = {"forward": 3, "backward": 5, "full": 8}[mode]
    passes += {"forward": 1, "backward": 1, "full": 2}[mode] * (noise == "given")
    return Comparison(
        "ib_kl", "ib_kl_loss", {"N": N, "Z": Z, "detail": f"noise {noise}"}, dtype, inputs, PROVIDERS, mode=mode,
        bytes=passes * N * Z * dtype.itemsize,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_ib_kl(compare, device, provider, case):
    compare(comparison(device, *case), provider)
