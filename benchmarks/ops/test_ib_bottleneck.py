"""The bottleneck's encoder, z and KL: ours against plain PyTorch, and against the library's product alone.

`product` is hidden @ weight.T with nothing after it, and its backward: the bound, to which the epilogue of a fused
kernel is held. `ours, fused` and `ours, library` are the two routes of our op on a GPU; `ours` takes the one that the
launch file prefers. The encoder is trained, with fp32 masters on a GPU, which every provider rounds for itself.
"""

from unittest.mock import patch

import pytest
import torch

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled
from ibft_kernels import _launch, ib_bottleneck, reference
from ibft_kernels.ops._ib_bottleneck_triton import fits_on_chip

pytestmark = pytest.mark.part("ops")

SIZES = {"cpu": (2048, 1024, 256), "cuda": (8192, 4096, 256)}
CASES = {"cpu": ["full"], "cuda": MODES}


def way(op):
    # the normalizer is given, or the reference would fetch its own from the host
    options = {"seed": 1, "reduction": "batchmean"}
    return lambda t: op(t["hidden"], t["weight"], t["bias"], normalizer=t["tokens"], **options)


def product(t):
    dtype = t["hidden"].dtype
    pair = torch.nn.functional.linear(t["hidden"], t["weight"].to(dtype), t["bias"].to(dtype))
    mu, logvar = pair.chunk(2, dim=1)
    return mu, logvar.sum(dtype=torch.float32)


def by_route(run, op, route, *, n_rank=None):
    """Ours by one route of `op`, whichever the launch file prefers."""

    def routed(t):
        shapes = _launch.shapes_of(_launch.architecture_of(t["hidden"].device))
        with patch.dict(shapes, {op: {"route": route}}):
            return run(t)

    def obstacle(device):
        if device.type == "cpu":
            return "a CPU has one route"
        if route == "fused" and not fits_on_chip(device, torch.bfloat16, SIZES["cuda"][2], n_rank):
            return "the fused kernel does not fit on this chip, and would be the library's products"
        return None

    return Provider(routed, obstacle_=obstacle)


PROVIDERS = {
    "ours": Provider(way(ib_bottleneck)),
    "ours, fused": by_route(way(ib_bottleneck), "ib_bottleneck", "fused"),
    "ours, library": by_route(way(ib_bottleneck), "ib_bottleneck", "product"),
    "product": Provider(product, gate=False),
    "eager": Provider(way(reference.ib_bottleneck)),
    "torch.compile": compiled(Provider(way(reference.ib_bottleneck))),
}


def comparison(device, mode):
    N, D, Z = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        return {
            "hidden": torch.randn(N, D, device=device).to(dtype).requires_grad_(),
            "weight": (torch.randn(2 * Z, D, device=device) * D**-0.5).requires_grad_(),
            "bias": (torch.randn(2 * Z, device=device) * 0.1).requires_grad_(),
            "tokens": torch.tensor(N, device=device),
        }  # fmt: skip

    # forward reads hidden and the encoder and writes z; backward reads them and dz, writes their gradients, and needs
    # mu | logvar, which it could only make again by the product. Products: one, two, three.
    encoder = (2 * Z * D + 2 * Z) * 4  # fp32 bytes
    forward = (N * D + N * Z) * dtype.itemsize + encoder
    backward = (2 * N * D + 3 * N * Z) * dtype.itemsize + 2 * encoder
    products, moved = {
        "forward": (1, forward), "backward": (2, backward), "full": (3, forward + backward),
    }[mode]  # fmt: skip
    return Comparison(
        "ib_bottleneck", "ib_bottleneck", {"N": N, "D": D, "Z": Z}, dtype, inputs, PROVIDERS, mode=mode, bytes=moved,
        flop=products * 4 * N * D * Z,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_ib_bottleneck(compare, device, provider, case):
    compare(comparison(device, case), provider)
