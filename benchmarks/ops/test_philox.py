"""`philox_normal` and `philox_dropout` against their formulas in plain PyTorch, which draw the same noise. torch.randn
and F.dropout draw other noise, which depends on how a batch is cut: bounds, not peers. Bound: what is read and written.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled
from ibft_kernels import philox_dropout, philox_normal, reference

pytestmark = pytest.mark.part("ops")

P = 0.05
NORMAL_SIZES = {"cpu": [(16384, 256)], "cuda": [(8192, 256), (262144, 256)]}
DROPOUT_SIZES = {"cpu": [(8192, 768)], "cuda": [(8192, 4096)]}


def normal(op):
    return Provider(lambda t: (op(1, t["ids"], t["Z"]),))


def dropout(op):
    return Provider(lambda t: (op(t["x"], P, seed=1),))


def slow_to_compile(device):
    return "its integer arithmetic takes a CPU 10 s to compile" if device.type == "cpu" else None


NORMAL = {
    "ours": normal(philox_normal),
    "eager": normal(reference.philox_normal),
    "torch.compile": compiled(normal(reference.philox_normal)),
    "torch.randn": Provider(lambda t: (torch.randn(len(t["ids"]), t["Z"], device=t["ids"].device),), gate=False),
}
DROPOUT = {
    "ours": dropout(philox_dropout),
    "eager": dropout(reference.philox_dropout),
    "torch.compile": replace(compiled(dropout(reference.philox_dropout)), obstacle_=slow_to_compile),
    "F.dropout": Provider(lambda t: (F.dropout(t["x"], P),), gate=False),
}

NORMAL_CASES = {"cpu": [0], "cuda": [0, 1]}  # which size
DROPOUT_CASES = {"cpu": [("full", 0)], "cuda": [(mode, 0) for mode in MODES]}  # mode, which size


def of_normal(device, size):
    N, Z = NORMAL_SIZES[device.type][size]

    def inputs(device):
        place = torch.randint(4096, (N,), device=device)
        return {"ids": torch.stack([torch.zeros_like(place), torch.arange(N, device=device), place], 1).int(), "Z": Z}

    # three words of ids a row, and the noise
    return Comparison(
        "philox", "philox_normal", {"N": N, "Z": Z}, torch.float32, inputs, NORMAL, mode="forward",
        bytes=4 * N * (Z + 3),
    )  # fmt: skip


def of_dropout(device, mode, size):
    N, D = DROPOUT_SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        return {"x": torch.randn(N, D, device=device).to(dtype).requires_grad_()}

    # x, y; dy, dx: the mask can be made again
    passes = {"forward": 2, "backward": 2, "full": 4}[mode]
    return Comparison(
        "philox", "philox_dropout", {"N": N, "D": D, "detail": f"dropout {P}"}, dtype, inputs, DROPOUT, mode=mode,
        bytes=passes * N * D * dtype.itemsize,
    )  # fmt: skip


@each(NORMAL_CASES, NORMAL)
def test_philox_normal(compare, device, provider, case):
    compare(of_normal(device, case), provider)


@each(DROPOUT_CASES, DROPOUT)
def test_philox_dropout(compare, device, provider, case):
    compare(of_dropout(device, *case), provider)
