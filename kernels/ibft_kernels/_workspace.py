"""The buffer of logits. On a CPU each thread keeps its own between calls, grown to the largest asked for: the kernel
zeroes fresh pages, which costs a twentieth of a whole objective (docs/decisions/0003). On a GPU torch's allocator hands
the same block out again at no cost, and may lend it to others in between, so nothing is kept.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["logits_buffer", "release_logits_buffer"]

_kept = threading.local()


def logits_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[numel], uninitialised; on a CPU the same memory as the calling thread's last one, which must be done with."""
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    size = numel * dtype.itemsize
    if getattr(_kept, "bytes", None) is None or _kept.bytes.numel() < size:
        _kept.bytes = None  # before the larger one is made
        _kept.bytes = torch.empty(size, dtype=torch.uint8)
    return _kept.bytes[:size].view(dtype)


def release_logits_buffer() -> None:
    """Give the calling thread's buffer back to the system."""
    _kept.bytes = None
