"""NF4 with double quantisation, undone weight by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["nf4_dequantize"]


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_blocksize: int = 256,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """As `ibft_kernels.nf4_dequantize`."""
    weight = torch.arange(math.prod(shape), device=packed.device)
    byte = packed.flatten().long()[weight // 2]
    nibble = torch.where(weight % 2 == 0, byte // 16, byte % 16)
    block = torch.arange(absmax.numel(), device=packed.device)
    scale = nested_code[absmax.flatten().long()] * nested_absmax.flatten()[block // nested_blocksize] + offset
    values = (code[nibble] * scale[weight // blocksize]).to(dtype).view(*shape)
    return values if out is None else out.flatten()[: weight.numel()].view(*shape).copy_(values)
