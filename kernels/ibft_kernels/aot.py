"""`python -m ibft_kernels.aot`: compile every kernel for every supported GPU on a machine that has none.

Every kernel is compiled with the launch shape that its architecture's file ships. A row for each kernel, dtype and
architecture says, off the binary: registers a thread, bytes of local memory (stack and spills), bytes of shared memory
a block, tensor-core instructions, and global loads of 128 bits or more. A row fails, and the command then exits 1, on

    a compilation error                  local memory: no kernel here needs any but for a spill
    more shared memory than a block has  tensor cores or wide loads absent where `_aot_cases` expects them

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

import torch

from ._aot_cases import CASES, DTYPES
from ._dispatch import INTERPRETED
from ._launch import ARCHITECTURES, shape_key, stored_shape
from ._triton import HAVE_TRITON, triton

__all__ = ["Row", "compile_all", "main"]

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Shared memory that one block can ask for, bytes (CUDA programming guide, compute capabilities)
SHARED_LIMITS = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# In PTX. A pipelined load goes to shared memory with cp.async, 16 bytes at a time.
TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
WIDE_LOAD = re.compile(
    r"ld\.global\S*\.(?:v4\.\w32|v8\.\w32|v2\.\w64|v4\.\w64)\b|cp\.async\.c[ag]\.shared\.global[^;]*0x10\b"
)


@dataclass(frozen=True)
class Row:
    """What one compilation came to. `error` is empty, or why there is no binary (the figures are then 0)."""

    kernel: str
    dtype: str
    arch: int
    registers: int = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    tensor_cores: int = 0
    wide_loads: int = 0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What is wrong with it: nothing, for a row that passes."""
        if self.error:
            return [self.error]
        case = CASES[self.kernel]
        dot = case.dot and self.dtype != "fp32" and self.arch >= 80
        found = {
            "local memory": self.local_bytes > 0,
            f"over {SHARED_LIMITS[self.arch]} B of shared memory": self.shared_bytes > SHARED_LIMITS[self.arch],
            "no tensor cores": dot and not self.tensor_cores,
            "no wide loads": case.wide and not self.wide_loads,
        }
        return [name for name, wrong in found.items() if wrong]


def compile_one(kernel: str, dtype: str, arch: int) -> Row:
    """Compile one kernel to a cubin and read its resources.

    What Triton may specialise is a multiple of 16 here, as torch's allocations and a training step's widths are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, architecture = CASES[kernel], f"sm_{arch}"
    shape = stored_shape(architecture, shape_key(case.launch, architecture, TORCH_DTYPES[dtype]))
    arguments = case.arguments(f"*{dtype}", shape)
    names = case.kernel.arg_names
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    types, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(case.kernel.params):
        value = types[parameter.name] = arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            types[parameter.name], constants[(i,)] = "constexpr", value
        elif not parameter.do_not_specialize:
            aligned[(i,)] = [["tt.divisibility", 16]]
    try:
        source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=aligned)
        extra = case.options(shape) if callable(case.options) else case.options
        options = {name: shape[name] for name in ("num_warps", "num_stages")} | extra
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the table must show which compilation failed, whatever Triton raised
        return Row(kernel, dtype, arch, error=f"{type(error).__name__}: {error}".splitlines()[0])
    ptx = compiled.asm["ptx"]
    tensor_cores, wide_loads = (len(pattern.findall(ptx)) for pattern in (TENSOR_CORE, WIDE_LOAD))
    resources = (*_resources(compiled.asm["cubin"]), compiled.metadata.shared)
    return Row(kernel, dtype, arch, *resources, tensor_cores, wide_loads)


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
    """Rows in table order, as they are ready. A kernel with fewer dtypes than asked for is compiled in its own."""
    jobs = [
        (kernel, dtype, arch)
        for kernel, case in CASES.items()
        for dtype in ([d for d in dtypes if d in case.dtypes] or case.dtypes)
        for arch in architectures
    ]
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_one, *zip(*jobs, strict=True))


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status: 0, 1 where a row fails, 2 where nothing can compile."""
    parser = argparse.ArgumentParser(
        prog="python -m ibft_kernels.aot", description="Compile every kernel without a GPU."
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, help="such as 89"
    )
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    if not HAVE_TRITON or INTERPRETED:
        reason = "unset TRITON_INTERPRET" if HAVE_TRITON else "triton is not installed"
        print(f"ibft_kernels.aot: cannot compile: {reason}", file=sys.stderr)
        return 2
    print(f"{'kernel':<27}{'dtype':<7}{'arch':<8}{'registers':>9}{'local_B':>9}{'shared_B':>10}{'mma':>6}{'wide':>6}")
    rows = []
    for row in compile_all(options.arch, options.dtype, options.processes):
        rows.append(row)
        figures = (
            f"{row.registers:>9}{row.local_bytes:>9}{row.shared_bytes:>10}{row.tensor_cores:>6}{row.wide_loads:>6}"
        )
        print(f"{row.kernel:<27}{row.dtype:<7}sm_{row.arch:<5}{figures}  {'; '.join(row.faults)}".rstrip(), flush=True)
    failed = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
