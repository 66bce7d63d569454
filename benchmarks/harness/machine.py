"""What the rows say about the machine: its name, versions, and the rates of a large copy and a large product on it."""

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.timing import timed_ms

GIB = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 23, 25  # linux/mman.h


def folder_name(device: torch.device) -> str:
    """Of benchmarks/results: the GPU's name, or cpu-<architecture>."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return re.sub(r"[^\w.-]+", "-", name)


def where(device: torch.device, *packages: str) -> dict[str, object]:
    """The columns device, threads and versions; `packages` beside torch and triton."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": "" if on_gpu else torch.get_num_threads(),
        "versions": " ".join(f"{name}={_version(name)}" for name in ("torch", "triton", *packages)),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def keep_freed_memory() -> None:
    """What glibc's malloc is given back stays with the process, as with torch's allocator on a GPU.

    Else each large tensor is made of fresh pages, and what those cost is a state of the machine that lasts for minutes
    and changes twofold. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):  # no block of its own; nothing is trimmed
        mallopt(parameter, value)


def back_heap() -> None:
    """Makes room at the end of the heap and gives all of it memory now, in huge pages: no timed call waits for a page.

    Before, peaks were measured with freed pages given back to the system, and a virtual machine may give them back to
    its host. Room: glibc before 2.38 takes more for an aligned block than the one of that size that was just freed.
    Linux alone has this; a kernel that refuses an advice (huge pages off, before 6.1) leaves the heap as it is.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(GIB))))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    heaps = [line.split()[0].split("-") for line in maps if line.endswith("[heap]")]
    for start, end in ([int(address, 16) for address in heap] for heap in heaps):
        for advice in (MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


@contextmanager
def threads_for(comparison: Any, device: torch.device) -> Iterator[None]:
    """On a CPU the number of threads that the comparison asks for."""
    before = torch.get_num_threads()
    if device.type == "cpu" and comparison.one_thread:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy, by the threads that there are now."""
    return _copy_rate(device, torch.get_num_threads())


@cache
def _copy_rate(device: torch.device, threads: int) -> float:
    size = (1 if device.type == "cuda" else 0.25) * GIB
    source = torch.ones(int(size) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the library's product of two square random matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _seconds(call, device: torch.device) -> float:
    times = [timed_ms([call], device) for _ in range(13)]
    return median(times[3:]) / 1e3
