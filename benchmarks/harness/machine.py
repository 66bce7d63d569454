"""What the rows say about the machine: its name, versions, and the rates of a large copy and a large product on it."""

import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.timing import timed_ms

GIB = 1 << 30


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


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
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
