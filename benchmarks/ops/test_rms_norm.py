"""`rms_norm` and `add_rms_norm` under a frozen weight, against transformers' LlamaRMSNorm and torch's own. Bound: each
tensor passes once.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled, liger
from ibft_kernels import add_rms_norm, rms_norm

pytestmark = pytest.mark.part("ops")

EPS = 1e-6
# rows of a hidden state; on a GPU also rows of the heads that a q or k norm sees
SIZES = {"cpu": [(8192, 1024)], "cuda": [(8192, 4096), (262144, 128)]}


class Norm(NamedTuple):
    """What LlamaRMSNorm.forward reads of its module; torch.compile sees through it."""

    weight: torch.Tensor
    variance_epsilon: float


def llama(x, weight):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm.forward(Norm(weight, EPS), x)


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


# Liger's both round as LlamaRMSNorm does, and not in place: that would write over dy, which every call here reads.
def liger_rms_norm(x, weight):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def liger_add_rms_norm(x, residual, weight):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def alone(norm):
    return lambda t: (norm(t["x"], t["weight"]),)


def after_sum(norm):
    """The residual sum as a block makes it whose norm knows nothing of it."""

    def run(t):
        h = t["x"] + t["residual"]
        return norm(h, t["weight"]), h

    return run


def providers(ours, around, fused):
    eager = Provider(around(llama))
    return {
        "ours": Provider(ours),
        "eager": eager,
        "F.rms_norm": Provider(around(torch_rms_norm)),
        "torch.compile": compiled(eager),
        "liger": liger(fused),
    }


PROVIDERS = {
    "rms_norm": providers(lambda t: (rms_norm(t["x"], t["weight"], EPS),), alone, alone(liger_rms_norm)),
    "add_rms_norm": providers(
        lambda t: add_rms_norm(t["x"], t["residual"], t["weight"], EPS),
        after_sum,
        lambda t: liger_add_rms_norm(t["x"], t["residual"], t["weight"]),
    ),
}

# Tensors of [N, D] that pass: x, y; then x, dy, dx. With the residual: x, residual, y, h; then h, dy, dh, and one
# gradient for both.
PASSES = {
    "rms_norm": {"forward": 2, "backward": 3, "full": 5},
    "add_rms_norm": {"forward": 4, "backward": 4, "full": 8},
}

# mode, which of SIZES
CASES = {"cpu": [("full", 0)], "cuda": [(mode, size) for size in (0, 1) for mode in MODES]}


def comparison(device, op, mode, size):
    N, D = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        names = ("x", "residual") if op == "add_rms_norm" else ("x",)
        leaves = {name: torch.randn(N, D, device=device).to(dtype).requires_grad_() for name in names}
        return leaves | {"weight": torch.randn(D, device=device).to(dtype)}

    return Comparison(
        "rms_norm", op, {"N": N, "D": D}, dtype, inputs, PROVIDERS[op], mode=mode,
        bytes=PASSES[op][mode] * N * D * dtype.itemsize,
    )  # fmt: skip


@each(CASES, PROVIDERS["rms_norm"])
def test_rms_norm(compare, device, provider, case):
    compare(comparison(device, "rms_norm", *case), provider)


@each(CASES, PROVIDERS["add_rms_norm"])
def test_add_rms_norm(compare, device, provider, case):
    compare(comparison(device, "add_rms_norm", *case), provider)
