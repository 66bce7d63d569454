"""A 4-bit weight made dense (`nf4_dequantize`), and the frozen layer over it (`NF4Linear`), against bitsandbytes over
the same bytes, with double quantisation.

`nf4_dequantize` is held to bitsandbytes' values exactly. On a CPU, `NF4Linear` lets bitsandbytes make the weight dense
and multiplies itself: there ours and bitsandbytes' layer differ in little, and the op is not what a training run calls.
Bounds: the bytes of the weight in both forms; the products alone.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider
from benchmarks.steps.random_base import as_linear4bit, random_nf4
from ibft_kernels import nf4_dequantize, reference

pytestmark = pytest.mark.part("ops")

SIZES = {"cpu": [(2048, 768, 2048), (2048, 4096, 4096)], "cuda": [(4096, 4096, 11008)]}  # tokens, inputs, outputs


def layers(device, dtype, D, outputs):
    """(ours, bitsandbytes') over the same random bytes."""
    generator = torch.Generator(device).manual_seed(torch.initial_seed())
    ours = random_nf4(nn.Linear(D, outputs, bias=False, device="meta"), generator, dtype)
    return ours, as_linear4bit(nn.Sequential(ours), dtype)[0]


def made_dense(op, layer, dtype):
    return op(
        layer.weight.detach(), layer.absmax, layer.code, layer.offset, layer.nested_absmax, layer.nested_code,
        shape=layer.shape, dtype=dtype, blocksize=layer.blocksize, nested_blocksize=layer.nested_blocksize,
    )  # fmt: skip


def bitsandbytes_dense(t):
    from bitsandbytes.functional import dequantize_4bit

    return (dequantize_4bit(t["theirs"].weight.data, t["theirs"].quant_state),)


DENSE = {
    "ours": Provider(lambda t: (made_dense(nf4_dequantize, t["layer"], t["dtype"]),)),
    "bitsandbytes": Provider(bitsandbytes_dense, package="bitsandbytes"),
    "eager": Provider(lambda t: (made_dense(reference.nf4_dequantize, t["layer"], t["dtype"]),)),
}
LINEAR = {
    "ours": Provider(lambda t: (t["layer"](t["x"]),)),
    "bitsandbytes": Provider(lambda t: (t["theirs"](t["x"]),), package="bitsandbytes"),
    "dense weight": Provider(lambda t: (F.linear(t["x"], t["weight"]),)),  # 16 or 32 bits a weight: the products alone
}
DENSE_CASES = {"cpu": [1], "cuda": [0]}  # which of SIZES
LINEAR_CASES = {"cpu": [("full", 0)], "cuda": [(mode, 0) for mode in MODES]}  # mode, which of SIZES


def of_dense(device, size):
    _, D, outputs = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        ours, theirs = layers(device, dtype, D, outputs)
        return {"layer": ours, "theirs": theirs, "dtype": dtype}

    weights = D * outputs
    return Comparison(
        "nf4", "nf4_dequantize", {"D": D, "detail": f"{D} to {outputs}"}, dtype, inputs, DENSE,
        reference="bitsandbytes", mode="forward", tolerance=0,
        # half a byte a weight, a byte of absmax for 64, and the dense weight
        bytes=weights * (1 / 2 + 1 / 64 + dtype.itemsize),
    )  # fmt: skip


def of_linear(device, mode, size):
    N, D, outputs = SIZES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        ours, theirs = layers(device, dtype, D, outputs)
        return {
            "x": torch.randn(N, D, device=device).to(dtype).requires_grad_(),
            "layer": ours,
            "theirs": theirs,
            "weight": made_dense(reference.nf4_dequantize, ours, dtype),
        }

    products = {"forward": 1, "backward": 1, "full": 2}[mode]  # y and dx: the weight is frozen
    return Comparison(
        "nf4", "linear_4bit", {"N": N, "D": D, "detail": f"{D} to {outputs}"}, dtype, inputs, LINEAR,
        reference="dense weight", mode=mode, flop=products * 2 * N * D * outputs,
    )  # fmt: skip


@each(DENSE_CASES, DENSE)
def test_nf4_dequantize(compare, device, provider, case):
    compare(of_dense(device, case), provider)


@each(LINEAR_CASES, LINEAR)
def test_linear_4bit(compare, device, provider, case):
    compare(of_linear(device, *case), provider)
