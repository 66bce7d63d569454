"""RMSNorm as transformers' LlamaRMSNorm computes it, alone and after a residual sum."""

from __future__ import annotations

import torch

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """As `ibft_kernels.rms_norm`."""
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    wide = x.to(compute)
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * n.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ibft_kernels.add_rms_norm`."""
    h = x + residual
    return rms_norm(h, weight, eps), h
