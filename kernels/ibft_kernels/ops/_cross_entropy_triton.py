"""Kernels and launchers of `linear_cross_entropy`; the mathematics is there. They know no autograd.

A row of logits is read twice (its sum of exponentials must be known before the first gradient) and written once; rows
of 100,000 columns do not fit a block's registers, and the second read mostly hits the L2 cache.
"""

from __future__ import annotations

import torch

from .._launch import launch_shape
from .._triton import tl, triton

__all__ = ["cross_entropy_kernel", "cross_entropy_triton_", "scatter_rows_kernel", "scatter_rows_triton"]


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _logits_tile(logits_ptr, bias_ptr, columns_v, mask_v, COMPUTE: tl.constexpr):
    x = tl.load(logits_ptr + columns_v, mask=mask_v, other=float("-inf")).to(COMPUTE)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns_v, mask=mask_v, other=0.0).to(COMPUTE)
    return x


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits_ptr,  # [m, V]: logits in, gradient out
    bias_ptr,  # [V] or None
    labels_ptr,  # int64 [m]
    loss_ptr,  # [m]
    n_columns,
    stride_n,
    ignore_index,
    COMPUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row: loss = logsumexp(x) - x[label], and in place of x its gradient softmax(x) - onehot(label).

    An ignored row: loss 0, gradient 0. A label outside 0 .. V-1: loss NaN, which no check for finiteness misses.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    in_range = (label >= 0) & (label < n_columns)
    # read before the first store: the reductions below keep every thread behind this load
    x_label = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(COMPUTE)
    if bias_ptr is not None:
        x_label += tl.load(bias_ptr + label, mask=in_range, other=0.0).to(COMPUTE)

    # each lane keeps its own maximum and sum: warps exchange nothing before the end of the row
    lowest = -3.0e38  # finite, so that a lane which saw only padding has exp(-inf - lowest) = 0 and not NaN
    max_b = tl.full([BLOCK_V], lowest, COMPUTE)
    sum_b = tl.zeros([BLOCK_V], COMPUTE)
    for first in range(0, n_columns, BLOCK_V):
        columns_v = first + tl.arange(0, BLOCK_V)
        x = _logits_tile(logits_ptr, bias_ptr, columns_v, columns_v < n_columns, COMPUTE)
        new_b = tl.maximum(max_b, x)
        sum_b = sum_b * tl.exp(max_b - new_b) + tl.exp(x - new_b)
        max_b = new_b
    top = tl.max(max_b, axis=0)
    logsumexp = top + tl.log(tl.sum(sum_b * tl.exp(max_b - top), axis=0))
    tl.store(loss_ptr + row, tl.where(counted, logsumexp - x_label, 0.0))

    if GRADIENT:
        for first in range(0, n_columns, BLOCK_V):
            columns_v = first + tl.arange(0, BLOCK_V)
            mask_v = columns_v < n_columns
            x = _logits_tile(logits_ptr, bias_ptr, columns_v, mask_v, COMPUTE)
            gradient = tl.exp(x - logsumexp) - tl.where(columns_v == label, 1.0, 0.0)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(logits_ptr + columns_v, gradient.to(logits_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["n_rows"])
def scatter_rows_kernel(
    src_ptr,  # [M, C]
    scale_ptr,  # [1] or [M]
    rows_ptr,  # int64 [M], or None: row m goes to row m
    out_ptr,  # [N, C]
    n_rows,
    n_columns,
    stride_scale,  # 0: one scale for all rows
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows_m = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = rows_m < n_rows
    mask_mc = mask_m[:, None] & (columns_c < n_columns)[None, :]
    scale_m = tl.load(scale_ptr + rows_m * stride_scale, mask=mask_m, other=0.0).to(COMPUTE)
    src = tl.load(src_ptr + rows_m[:, None] * n_columns + columns_c[None, :], mask=mask_mc, other=0.0).to(COMPUTE)
    target_m = rows_m
    if rows_ptr is not None:
        target_m = tl.load(rows_ptr + rows_m, mask=mask_m, other=0)
    out = (src * scale_m[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + target_m[:, None] * n_columns + columns_c[None, :], out, mask=mask_mc)


# --- launchers ------------------------------------------------------------------------------------


def _compute(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def cross_entropy_triton_(
    logits_mV: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_m: torch.Tensor,
    loss_m: torch.Tensor,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Writes loss_m, and with `gradient` the gradient over the logits."""
    rows, columns = logits_mV.shape
    shape = launch_shape("cross_entropy", logits_mV.device, logits_mV.dtype)
    shape["BLOCK_V"] = min(shape["BLOCK_V"], max(16, triton.next_power_of_2(columns)))
    cross_entropy_kernel[(rows,)](
        logits_mV, bias_V, labels_m, loss_m, columns, logits_mV.stride(0), ignore_index,
        COMPUTE=_compute(logits_mV.dtype), GRADIENT=gradient, **shape,
    )  # fmt: skip


def scatter_rows_triton(
    src_MC: torch.Tensor, scale: torch.Tensor, rows_M: torch.Tensor | None, out_NC: torch.Tensor
) -> None:
    rows, columns = src_MC.shape
    if not src_MC.numel():
        return
    shape = launch_shape("scatter_rows", src_MC.device, src_MC.dtype)
    block_c = min(256, max(16, triton.next_power_of_2(columns)))
    block_n = shape.pop("TILE") // block_c
    scatter_rows_kernel[(triton.cdiv(rows, block_n), triton.cdiv(columns, block_c))](
        src_MC, scale, rows_M, out_NC, rows, columns, int(scale.numel() > 1),
        COMPUTE=_compute(src_MC.dtype), BLOCK_N=block_n, BLOCK_C=block_c, **shape,
    )  # fmt: skip
