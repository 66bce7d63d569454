"""out[rows[m]] = scale[m] src[m], 0 elsewhere: how a gradient made for some rows becomes one for all, and is scaled.

The product is made in fp32 and rounded once. (PyTorch's type promotion takes a 0-d scale on a GPU to the rows' dtype
first: in bf16 that puts one common error of up to 0.4 % on a whole gradient.) No autograd formula: a second derivative
raises.
Legend: M rows given, N rows out, C columns.
"""

from __future__ import annotations

import torch

from .._library import library_op
from ._cross_entropy_triton import scatter_rows_triton

__all__ = ["scatter_rows"]


@library_op("scatter_rows", "(Tensor src, Tensor scale, Tensor? rows, SymInt n_rows, str backend) -> Tensor")
def scatter_rows(
    src: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor | None, n_rows: int, backend: str
) -> torch.Tensor:
    """src [M, C], scale 0-d or [M] (fp32, or float64), rows int64 [M] without repeats, None: M = n_rows, in order."""
    if backend == "triton":
        make = torch.empty if rows is None else torch.zeros
        out = make(n_rows, src.shape[1], dtype=src.dtype, device=src.device)
        scatter_rows_triton(src.contiguous(), scale.contiguous(), rows, out)
        return out
    scaled = (src.to(scale.dtype) * (scale[:, None] if scale.dim() else scale)).to(src.dtype)
    if rows is None:
        return scaled
    return torch.zeros(n_rows, src.shape[1], dtype=src.dtype, device=src.device).index_copy_(0, rows, scaled)


@scatter_rows.register_fake
def _(src, scale, rows, n_rows, backend):
    return src.new_empty(n_rows, src.shape[1])
