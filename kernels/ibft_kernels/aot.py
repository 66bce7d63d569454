"""`python -m ibft_kernels.aot`: compile every kernel for every supported GPU on a machine that has none.

Prints a row for each kernel, dtype and architecture: registers a thread and bytes of local memory (stack and spills),
read off the binary by the cuobjdump of Triton's wheel, and bytes of shared memory, which Triton asks for at the launch.
No kernel here needs local memory but for a spill, so any local byte is one, and the command then exits 1.
TRITON_INTERPRET must be unset: a kernel defined under the interpreter has no compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._dispatch import INTERPRETED
from ._triton import HAVE_TRITON, triton
from .ops._ib_kl_triton import ib_kl_backward_kernel, ib_kl_forward_kernel, ib_kl_reduce_kernel
from .ops._philox_triton import philox_kernel, tile_shape
from .ops.dropout import dropout_kernel

__all__ = ["ARCHITECTURES", "DTYPES", "Row", "compile_all", "main"]

# Turing, Ampere (A100, consumer), Ada, Hopper, Blackwell (data centre, consumer)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("fp16", "bf16", "fp32")

KERNELS = {
    "philox_normal": philox_kernel,
    "philox_dropout": dropout_kernel,
    "ib_kl_forward": ib_kl_forward_kernel,
    "ib_kl_backward": ib_kl_backward_kernel,
    "ib_kl_reduce": ib_kl_reduce_kernel,
}


@dataclass(frozen=True)
class Row:
    """What one compilation came to. `error` is empty, or why there is no binary (the figures are then 0)."""

    kernel: str
    dtype: str
    arch: int
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.local_bytes > 0


def _arguments(kernel: str, dtype: str) -> dict[str, Any]:
    """The types of a training step at Z = 256: a string is a type, None an absent pointer, else a constexpr."""
    element, fp32, int32, byte = f"*{dtype}", "*fp32", "*i32", "*u8"
    key = {"ids_ptr": int32, "seed_ptr": None, "seed_lo": "i32", "seed_hi": "i32"}
    sizes = {"n_rows": "i32", "n_columns": "i32"}
    compute = triton.language.float32
    rows, columns = tile_shape(256)
    tile = {"COMPUTE": compute, "BLOCK_N": rows, "BLOCK_Z": columns, "LO": -4.0, "HI": 4.0}
    match kernel:
        case "philox_normal":
            return {"out_ptr": element, **key, **sizes, "NORMAL": True, "BLOCK_N": rows, "BLOCK_C": columns}
        case "philox_dropout":
            return {
                "x_ptr": element, "y_ptr": element, **key, "threshold": "i32", **sizes, "stride_xn": "i32",
                "COMPUTE": compute, "BLOCK_N": rows, "BLOCK_C": columns,
            }  # fmt: skip
        case "ib_kl_forward":
            return {
                "mu_ptr": element, "logvar_ptr": element, "z_ptr": element, "row_kl_ptr": None, "partial_kl_ptr": fp32,
                "partial_count_ptr": int32, "mask_ptr": byte, "eps_ptr": None, **key,
                **sizes, "stride_mun": "i32", "stride_lvn": "i32", "stride_epsn": "i32", **tile,
            }  # fmt: skip
        case "ib_kl_backward":
            return {
                "mu_ptr": element, "logvar_ptr": element, "dz_ptr": element, "dkl_ptr": fp32, "inverse_ptr": fp32,
                "dmu_ptr": element, "dlogvar_ptr": element, "mask_ptr": byte, "eps_ptr": None, **key,
                **sizes, "stride_mun": "i32", "stride_lvn": "i32", "stride_dzn": "i32",
                "stride_epsn": "i32", **tile,
            }  # fmt: skip
        case "ib_kl_reduce":
            return {
                "partial_kl_ptr": fp32, "partial_count_ptr": int32, "normalizer_ptr": None, "kl_ptr": fp32,
                "inverse_ptr": fp32, "n_partials": "i32", **sizes, "COMPUTE": compute, "DIVIDE_BY_COUNT": True,
                "DIVIDE_BY_Z": True, "BLOCK": 1024,
            }  # fmt: skip
    raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {kernel!r}")


def compile_one(kernel: str, dtype: str, arch: int) -> Row:
    """Compile one kernel to a cubin and read its resources.

    Pointers, strides and the width are multiples of 16, as torch's allocations and a training step's shapes are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = KERNELS[kernel]
    arguments = _arguments(kernel, dtype)
    names = function.arg_names
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    types = {n: a if isinstance(a, str) else "constexpr" for n, a in ((n, arguments[n]) for n in names)}
    constants = {(i,): arguments[n] for i, n in enumerate(names) if types[n] == "constexpr"}
    even = tuple(n for n in names if types[n].startswith("*") or n.startswith("stride_") or n == "n_columns")
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
    try:
        source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    except Exception as error:  # the table must show which compilation failed, whatever Triton raised
        return Row(kernel, dtype, arch, error=f"{type(error).__name__}: {error}".splitlines()[0])
    return Row(kernel, dtype, arch, *_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, local bytes) as cuobjdump reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def compile_all(architectures: list[int], dtypes: list[str], processes: int) -> Iterator[Row]:
    """Rows in table order, as they are ready. The reduction reads fp32 partials only, so it is compiled once."""
    jobs = [(k, d, a) for k in KERNELS for d in dtypes for a in architectures if k != "ib_kl_reduce"]
    jobs += [("ib_kl_reduce", "fp32", a) for a in architectures]
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_one, *zip(*jobs, strict=True))


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status: 0, 1 on a spill or a failed compilation, 2 where nothing can compile."""
    parser = argparse.ArgumentParser(
        prog="python -m ibft_kernels.aot", description="Compile every kernel without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="capabilities, such as 89")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    if not HAVE_TRITON or INTERPRETED:
        reason = "unset TRITON_INTERPRET" if HAVE_TRITON else "triton is not installed"
        print(f"ibft_kernels.aot: cannot compile: {reason}", file=sys.stderr)
        return 2
    print(f"{'kernel':<16}{'dtype':<7}{'arch':<8}{'registers':>9}{'local_B':>9}{'shared_B':>10}")
    rows = []
    for row in compile_all(options.arch, options.dtype, options.processes):
        rows.append(row)
        figures = row.error or f"{row.registers:>9}{row.local_bytes:>9}{row.shared_bytes:>10}"
        print(f"{row.kernel:<16}{row.dtype:<7}sm_{row.arch:<5}{figures}", flush=True)
    failed = [row for row in rows if row.failed]
    print(f"{len(rows)} compiled, {len(failed)} with a spill or an error")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
