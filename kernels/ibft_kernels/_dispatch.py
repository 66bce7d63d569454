"""Which implementation runs: `backend="auto" | "triton" | "torch"`, the same rule for every op.

`auto` takes Triton for CUDA tensors, and for CPU tensors under TRITON_INTERPRET=1; else PyTorch. An explicit request
that cannot be met raises and says why. Triton reads TRITON_INTERPRET when a kernel is defined, so set it before
importing this package.
"""

from __future__ import annotations

from typing import Literal

import torch

from ._triton import HAVE_TRITON, triton

__all__ = ["INTERPRETED", "Backend", "resolve_backend"]

Backend = Literal["auto", "triton", "torch"]

# Read once, at the import that also defines the kernels: later changes of the variable do not change them.
INTERPRETED = HAVE_TRITON and bool(triton.knobs.runtime.interpret)


def resolve_backend(backend: str, device: torch.device) -> Literal["triton", "torch"]:
    """The backend that runs for tensors on `device`.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: "triton" was asked for and cannot run on this device.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: expected 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "torch":
        return "torch"
    obstacle = _triton_obstacle(device)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")
    return "torch"


def _triton_obstacle(device: torch.device) -> str | None:
    if not HAVE_TRITON:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return None
    if device.type == "cpu":
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before the import"
    return f"no Triton path for {device.type} tensors"
