"""Rotary position embedding as transformers' apply_rotary_pos_emb computes it, in fp32 (float64 for float64)."""

from __future__ import annotations

import torch

__all__ = ["rotate"]


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ibft_kernels.rotate`."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    compute = torch.float64 if torch.float64 in (x.dtype, cos.dtype) else torch.float32
    x1, x2 = x.to(compute).chunk(2, dim=-1)
    cos, sin = (table[:, None].to(compute) for table in (cos, sin))
    return (torch.cat((x1, x2), dim=-1) * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)
