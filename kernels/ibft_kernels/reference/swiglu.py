"""SwiGLU, and its gradients by autograd."""

from __future__ import annotations

import torch

__all__ = ["swiglu_backward_", "swiglu_forward"]


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """As `ibft_kernels.swiglu_forward`."""
    compute = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return torch.nn.functional.silu(gate.to(compute)).to(gate.dtype) * up


def swiglu_backward_(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> None:
    """As `ibft_kernels.swiglu_backward_`."""
    compute = torch.float64 if gate.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        wide_gate, wide_up = (x.detach().to(compute).requires_grad_() for x in (gate, up))
        h = torch.nn.functional.silu(wide_gate) * wide_up
    dgate, dup = torch.autograd.grad(h, (wide_gate, wide_up), dh.detach().to(compute))
    dh.copy_(swiglu_forward(gate, up))
    gate.copy_(dgate)
    up.copy_(dup)
