"""`python -m ibft_kernels.tune`: measure launch shapes on this machine's CUDA device.

    python -m ibft_kernels.tune [--kernel KEY ...] [--write]

Every candidate of every kernel is timed on a training step's shapes, and a table says what each came to. --write stores
the fastest of each kernel in launch/<architecture>.json, with where and when it was measured. A candidate that the
compiler or the device refuses is a row too, and is passed over. Exit status: 0; 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ._launch import LAUNCH_FOLDER, architecture_of, chosen, shape_key, shapes_of, stored_shape
from ._triton import HAVE_TRITON, triton
from .ops._cross_entropy_triton import cross_entropy_triton_, scatter_rows_triton
from .ops._ib_bottleneck_triton import backward_fused, forward_fused
from .ops._ib_kl_spec import Spec
from .ops._ib_kl_triton import backward_triton, forward_triton
from .ops._philox_triton import launch_philox
from .ops.dropout import launch_dropout
from .ops.ib_bottleneck import ib_bottleneck
from .ops.ib_lora_backward import ib_lora_backward
from .ops.nf4 import launch_nf4_dequantize
from .ops.rms_norm import launch_rms_norm_backward, launch_rms_norm_forward
from .ops.rope import launch_rotate
from .ops.swiglu import launch_swiglu_backward_, launch_swiglu_forward

__all__ = ["KERNELS", "Measurement", "main", "measure", "search", "write_shapes"]

# tokens of a step, rows of a chunk of logits, latent size, hidden size, vocabulary, head size
ROWS, CHUNK, LATENT, HIDDEN, VOCABULARY, HEAD = 8192, 512, 256, 4096, 102_400, 128


@dataclass(frozen=True)
class Work:
    """What to time: it must move `bytes`, or do `flops` where products bound it."""

    run: Callable[[], Any]
    bytes: int = 0
    flops: int = 0

    def rate(self, ms: float) -> str:
        return f"{self.flops / ms * 1e-9:.1f} TFLOP/s" if self.flops else f"{self.bytes / ms * 1e-6:.0f} GB/s"


@dataclass(frozen=True)
class Measurement:
    """What one candidate came to: `error` is empty, or why it cannot run (the time is then infinite)."""

    shape: dict[str, Any]
    ms: float = float("inf")
    rate: str = "-"
    error: str = ""


# --- what is timed --------------------------------------------------------------------------------


_SPARE: dict[str, Any] = {"ids": None, "eps": None, "mask": None, "normalizer": None}  # the launchers' optional tensors


def _philox(dtype: torch.dtype, device: torch.device) -> Work:
    out = torch.empty(ROWS, LATENT, dtype=dtype, device=device)
    return Work(lambda: launch_philox(out, 1, None, normal=True), out.nbytes)


def _dropout(dtype: torch.dtype, device: torch.device) -> Work:
    x = torch.randn(ROWS, HIDDEN, dtype=dtype, device=device)
    y = torch.empty_like(x)
    return Work(lambda: launch_dropout(y, x, 3277, 1, None), 2 * x.nbytes)


def _ib_kl(dtype: torch.dtype, device: torch.device) -> Work:
    """Forward, its reduction and backward: the three share two entries."""
    mu, logvar = torch.randn(ROWS, 2 * LATENT, dtype=dtype, device=device).chunk(2, dim=1)
    dz, dkl = torch.randn(ROWS, LATENT, dtype=dtype, device=device), torch.ones((), device=device)
    spec, spare = Spec(torch.float32, (-4.0, 4.0), "mean", "triton"), dict(_SPARE)

    def run() -> None:
        _, _, inverse = forward_triton(spec, mu, logvar, 1, spare)
        backward_triton(spec, mu, logvar, 1, spare | {"inverse": inverse}, dz, dkl, (True, True))

    return Work(run, 8 * dz.nbytes)


def _cross_entropy(dtype: torch.dtype, device: torch.device) -> Work:
    logits = torch.randn(CHUNK, VOCABULARY, dtype=dtype, device=device)
    labels, loss = torch.zeros(CHUNK, dtype=torch.int64, device=device), torch.empty(CHUNK, device=device)
    return Work(lambda: cross_entropy_triton_(logits, None, labels, loss, -100, True), 2 * logits.nbytes)


def _scatter_rows(dtype: torch.dtype, device: torch.device) -> Work:
    src = torch.randn(ROWS, HIDDEN, dtype=dtype, device=device)
    scale, out = torch.ones((), device=device), torch.empty_like(src)
    return Work(lambda: scatter_rows_triton(src, scale, None, out), 2 * src.nbytes)


def _nf4_dequantize(dtype: torch.dtype, device: torch.device) -> Work:
    """An up-projection of the usual width."""
    out = torch.empty(4 * HIDDEN, HIDDEN, dtype=dtype, device=device)
    packed, absmax = (torch.randint(256, (out.numel() // n,), device=device).to(torch.uint8) for n in (2, 64))
    code, offset, nested_code = (torch.randn(n, device=device) for n in (16, 1, 256))
    nested_absmax = torch.randn(-(-absmax.numel() // 256), device=device)
    arguments = out, packed, absmax, code, offset, nested_absmax, nested_code, 64, 256
    return Work(lambda: launch_nf4_dequantize(*arguments), out.nbytes + packed.nbytes + absmax.nbytes)


def _rms_norm(dtype: torch.dtype, device: torch.device) -> Work:
    """Forward with the residual sum and backward: the two share an entry."""
    x, residual, dy, dh = (torch.randn(ROWS, HIDDEN, dtype=dtype, device=device) for _ in range(4))
    weight = torch.ones(HIDDEN, dtype=dtype, device=device)

    def run() -> None:
        _, h, rstd = launch_rms_norm_forward(x, residual, weight, 1e-6)
        launch_rms_norm_backward(dy, dh, h, weight, rstd)

    return Work(run, 8 * x.nbytes)


def _swiglu(dtype: torch.dtype, device: torch.device) -> Work:
    """On halves of one product. Gradients of gradients grow or vanish, which costs no other time."""
    gate, up = torch.randn(ROWS, 4 * HIDDEN, dtype=dtype, device=device).chunk(2, dim=1)
    dh = torch.randn(ROWS, 2 * HIDDEN, dtype=dtype, device=device)

    def run() -> None:
        launch_swiglu_forward(gate, up)
        launch_swiglu_backward_(dh, gate, up)

    return Work(run, 9 * dh.nbytes)


def _rotate(dtype: torch.dtype, device: torch.device) -> Work:
    """Slices of one projection's output, four query heads to a key head."""
    n_q, n_k = HIDDEN // HEAD, max(1, HIDDEN // HEAD // 4)
    heads = torch.randn(ROWS, n_q + 2 * n_k, HEAD, dtype=dtype, device=device)
    xs = heads[:, :n_q], heads[:, n_q : n_q + n_k]
    cos, sin = torch.randn(2, ROWS, HEAD, dtype=dtype, device=device)
    return Work(lambda: launch_rotate(xs, cos, sin, transposed=False), 2 * sum(x.nbytes for x in (*xs, cos)))


def _encoder(
    dtype: torch.dtype, device: torch.device, backward: str = "ib_bottleneck_backward"
) -> tuple[Spec, torch.Tensor, torch.Tensor, int]:
    """(spec, hidden, weight, flops of one product). The latent is as wide as the stored entry of the `backward` kernel
    says to fit on chip: half of LATENT in fp32, and on sm_75.
    """
    architecture = architecture_of(device)
    stored = stored_shape(architecture, shape_key(backward, architecture, dtype))
    latent = min(LATENT, stored["BLOCK_Z"])
    hidden = torch.randn(ROWS, HIDDEN, dtype=dtype, device=device)
    weight = torch.randn(2 * latent, HIDDEN, dtype=dtype, device=device)
    return Spec(torch.float32, (-4.0, 4.0), "mean", "fused"), hidden, weight, 2 * ROWS * HIDDEN * 2 * latent


def _ib_bottleneck_forward(dtype: torch.dtype, device: torch.device) -> Work:
    spec, hidden, weight, flops = _encoder(dtype, device)
    return Work(lambda: forward_fused(spec, hidden, weight, None, 1, dict(_SPARE)), flops=flops)


def _ib_bottleneck_backward(dtype: torch.dtype, device: torch.device) -> Work:
    spec, dhidden, weight, flops = _encoder(dtype, device)
    mulogvar, dz = (torch.randn(ROWS, weight.shape[0] // n, dtype=dtype, device=device) for n in (1, 2))
    one = torch.ones(1, device=device)
    spare = _SPARE | {"inverse": one}
    return Work(
        lambda: backward_fused(spec, mulogvar, weight, 1, spare, dz, one, dhidden, g_ND=None, keep=True), flops=flops
    )


def _lora_backward(dtype: torch.dtype, device: torch.device, rank: int) -> tuple[Spec, dict[str, Any], int]:
    """(spec, the tensors of `ib_lora_backward` with a trained encoder, flops)."""
    spec, dhidden, weight, flops = _encoder(dtype, device, "ib_lora_backward_fused")
    (n_rows, width), n_pair, one = dhidden.shape, weight.shape[0], torch.ones(1, device=device)
    mulogvar, dz = (torch.randn(n_rows, n_pair // n, dtype=dtype, device=device) for n in (1, 2))
    lora_b = torch.randn(width, rank, dtype=dtype, device=device)
    tensors = {"dhidden": dhidden, "dz": dz, "dkl": one[0], "weight": weight, "mulogvar": mulogvar, "inverse": one}
    return spec, tensors | {"lora_b": lora_b}, flops + 2 * n_rows * width * rank


def _ib_lora_backward_fused(dtype: torch.dtype, device: torch.device) -> Work:
    """At the widest LoRA that the candidates name: what an entry says to fit on chip has then run."""
    spec, tensors, flops = _lora_backward(dtype, device, rank=64)
    g, dz, dkl, weight, mulogvar, inverse, lora_b = tensors.values()
    spare, total = _SPARE | {"inverse": inverse}, torch.empty_like(g)
    return Work(
        lambda: backward_fused(
            spec, mulogvar, weight, 1, spare, dz, dkl, total, g_ND=g, keep=True, lora_DR=lora_b, scaling=0.5
        ),
        flops=flops,
    )


def _ib_lora_backward_routes(dtype: torch.dtype, device: torch.device) -> Work:
    """The whole op, dW included: two products of the same size, and LoRA's."""
    _, tensors, flops = _lora_backward(dtype, device, rank=32)
    tensors |= {"hidden": torch.randn_like(tensors["dhidden"]), "needs_weight": True}
    product_flops = 2 * tensors["hidden"].numel() * tensors["weight"].shape[0]
    return Work(lambda: ib_lora_backward(**tensors, seed=1, scaling=0.5), flops=flops + product_flops)


def _ib_bottleneck_routes(dtype: torch.dtype, device: torch.device) -> Work:
    """The whole op, forward and backward: three products of the same size."""
    _, hidden, weight, flops = _encoder(dtype, device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def run() -> None:
        with torch.enable_grad():
            z, kl = ib_bottleneck(hidden, weight, None, seed=1)
        torch.autograd.grad((z, kl), (hidden, weight), (z, kl))

    return Work(run, flops=3 * flops)


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


_TILES = _grid(TILE=(512, 1024, 2048, 4096), num_warps=(2, 4, 8), num_stages=(1,))

# entry of launch/*.json -> (what to time, candidates). What a candidate leaves out stays as stored: the backwards'
# BLOCK_Z says how wide a latent fits on chip, which the AOT table decides and a clock at one width cannot.
KERNELS: dict[str, tuple[Callable[[torch.dtype, torch.device], Work], list[dict[str, Any]]]] = {
    "philox": (_philox, _TILES),
    "dropout": (_dropout, _TILES),
    "ib_kl": (_ib_kl, _TILES),
    "ib_kl_reduce": (_ib_kl, _grid(BLOCK=(256, 1024, 4096), num_warps=(1, 4, 8), num_stages=(1,))),
    "cross_entropy": (
        _cross_entropy, _grid(BLOCK_V=(1024, 2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32), num_stages=(1,)),
    ),
    "scatter_rows": (_scatter_rows, _TILES),
    "nf4_dequantize": (_nf4_dequantize, _TILES),
    "rms_norm": (_rms_norm, _TILES),
    "swiglu": (_swiglu, _TILES),
    "rotate": (_rotate, _TILES),
    "ib_bottleneck_forward/16": (
        _ib_bottleneck_forward,
        _grid(BLOCK_N=(64, 128), BLOCK_Z=(32, 64, 128), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4)),
    ),
    "ib_bottleneck_forward/32": (
        _ib_bottleneck_forward,
        _grid(BLOCK_N=(32, 64), BLOCK_Z=(16, 32), BLOCK_K=(16, 32), num_warps=(4, 8), num_stages=(2, 3)),
    ),
    "ib_bottleneck_backward/16": (
        _ib_bottleneck_backward,
        _grid(BLOCK_N=(16, 32, 64), BLOCK_D=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
    ),
    "ib_bottleneck_backward/32": (
        _ib_bottleneck_backward,
        _grid(BLOCK_N=(16, 32), BLOCK_D=(32, 64), num_warps=(4, 8), num_stages=(1, 2)),
    ),
    "ib_lora_backward_fused/16": (
        _ib_lora_backward_fused,
        _grid(
            BLOCK_N=(16, 32, 64), BLOCK_D=(32, 64, 128), BLOCK_R=(64,), num_warps=(4, 8), num_stages=(1, 2, 3)
        ),
    ),
    "ib_lora_backward_fused/32": (
        _ib_lora_backward_fused,
        _grid(BLOCK_N=(16, 32), BLOCK_D=(32, 64), BLOCK_R=(64,), num_warps=(4, 8), num_stages=(1, 2, 3)),
    ),
    # last: which of the two ways the op takes, once both have their best shapes
    "ib_lora_backward": (_ib_lora_backward_routes, [{"route": "fused"}, {"route": "product"}]),
    "ib_bottleneck": (_ib_bottleneck_routes, [{"route": "fused"}, {"route": "product"}]),
}  # fmt: skip


# --- search ---------------------------------------------------------------------------------------


def _time_ms(run: Callable[[], Any]) -> float:
    return triton.testing.do_bench(run, return_mode="median")


def measure(key: str, device: torch.device) -> Iterator[Measurement]:
    """Time the candidates of one entry and the shape that it has. An entry without bits is timed in bf16."""
    make, candidates = KERNELS[key]
    work = make(torch.float32 if key.endswith("/32") else torch.bfloat16, device)
    place = (architecture_of(device), key)
    stored, before = stored_shape(*place), chosen.get(place)
    try:
        for shape in [stored, *(made for c in candidates if (made := stored | c) != stored)]:
            chosen[place] = shape  # what the launcher then takes
            try:
                ms = _time_ms(work.run)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                yield Measurement(shape, error=f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                yield Measurement(shape, ms, work.rate(ms))
    finally:
        chosen.pop(place)
        if before is not None:
            chosen[place] = before


def _is_refusal(error: Exception) -> bool:
    """Whether a shape could not be compiled or launched. Anything else is a defect, and must show."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    refused = isinstance(error, (CompilationError, OutOfResources, PTXASError))
    return refused or "PassManager::run failed" in str(error)  # a compiler pass: a plain RuntimeError


def fastest(key: str, measurements: list[Measurement]) -> Measurement:
    best = min(measurements, key=lambda m: m.ms)
    if best.error:
        raise RuntimeError(f"{key}: no launch shape runs on this device; the first: {measurements[0].error}")
    return best


def search(key: str, device: torch.device) -> dict[str, Any]:
    """The fastest shape of one entry, kept for this process: what IBFT_AUTOTUNE=1 calls at a kernel's first use."""
    best = fastest(key, list(measure(key, device)))
    chosen[architecture_of(device), key] = best.shape
    return best.shape


# --- command --------------------------------------------------------------------------------------


def write_shapes(path: Path, shapes: dict[str, dict[str, Any]]) -> None:
    """One entry a line, so that a search's difference reads as one."""
    lines = [f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in shapes.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    shapes_of.cache_clear()


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status: 0, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m ibft_kernels.tune", description="Measure launch shapes.")
    parser.add_argument("--kernel", nargs="+", metavar="KEY", help="entries of launch/*.json; default: all")
    parser.add_argument("--write", action="store_true", help="store the fastest shapes in launch/<architecture>.json")
    options = parser.parse_args(argv)
    if not HAVE_TRITON or not torch.cuda.is_available():
        print("ibft_kernels.tune: cannot measure: no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = architecture_of(device)
    shapes = {key: dict(shape) for key, shape in shapes_of(architecture).items()}
    tunable = [key for key in KERNELS if key in shapes]
    unknown = set(options.kernel or ()) - set(tunable)
    if unknown:
        parser.error(f"--kernel: expected some of {tunable}, got {sorted(unknown)}")
    where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{where}, {architecture}\n{'kernel':<28}{'ms':>9}{'rate':>16}  shape")
    for key in options.kernel or tunable:
        measurements = []
        for found in measure(key, device):
            measurements.append(found)
            print(f"{key:<28}{found.ms:>9.4f}{found.rate:>16}  {found.shape}  {found.error}".rstrip(), flush=True)
        best = fastest(key, measurements)
        print(f"{key:<28}{best.ms:>9.4f}{best.rate:>16}  {best.shape}  fastest", flush=True)
        shapes[key] = best.shape | {"measured": f"{where}, {datetime.date.today()}"}
        if options.write:
            write_shapes(LAUNCH_FOLDER / f"{architecture}.json", shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
