"""RMSNorm with a frozen weight, alone or after the residual sum: what a QLoRA step does with a base model's norms.

    h = x + residual                      rounded to x's dtype; without a residual h = x
    r = (mean(h^2) + eps)^(-1/2)          one a row
    y = w * n,   n = h r                  n rounded to x's dtype before the product, as transformers' LlamaRMSNorm

    g  = w dy
    dh = r (g - n mean(g n)) + dh_in      dh_in: what arrives at h itself; dh is the gradient of x and of residual

The base's norms never train, so no dw is computed: it would cost a reduction over all rows. Computed in fp32, in
float64 where x or w is float64. Saved for backward: h (x itself, or the output h) and r, one number a row. No copy of
x in fp32.

Traffic on the Triton path: forward reads x (and residual) and writes y (and h), backward reads dy and h (and dh_in) and
writes dh, each element once: a program holds whole rows. The torch path works on a few rows at a time, which stay in a
core's cache.
Legend: N rows, C columns.
"""

from __future__ import annotations

from typing import Any

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape
from .._library import library_op
from .._triton import tl, triton
from ._rows import FLOATS, as_rows

__all__ = ["add_rms_norm", "rms_norm"]

WIDEST = 1 << 14  # columns that a program can hold: 16 a thread
# Elements that the torch path works on at once: on a CPU its buffers stay in cache, a GPU wants length.
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 22


def _dtypes(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(y's, the one computed in)."""
    y = torch.promote_types(x.dtype, weight.dtype)
    return y, torch.float64 if y == torch.float64 else torch.float32


def _outputs(
    x_NC: torch.Tensor, residual_NC: torch.Tensor | None, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd), not filled; h is x where there is no residual."""
    y_dtype, compute = _dtypes(x_NC, weight)
    y_NC = torch.empty(x_NC.shape, dtype=y_dtype, device=x_NC.device)
    h_NC = x_NC if residual_NC is None else torch.empty(x_NC.shape, dtype=x_NC.dtype, device=x_NC.device)
    return y_NC, h_NC, torch.empty(x_NC.shape[0], dtype=compute, device=x_NC.device)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,  # None: h = x
    weight_ptr,
    y_ptr,
    h_ptr,  # None where the residual is
    rstd_ptr,
    n_rows,
    n_columns,
    stride_xn,
    stride_rn,
    COMPUTE: tl.constexpr,
    EPS: tl.constexpr,  # a setting of the model, not of the batch: exact in every dtype
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_N whole rows: BLOCK_C is the power of two that holds one."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_c = tl.arange(0, BLOCK_C)
    mask_n, mask_c = rows_n < n_rows, columns_c < n_columns
    mask_nc = mask_n[:, None] & mask_c[None, :]
    out_offsets = rows_n[:, None] * n_columns + columns_c[None, :]
    element = x_ptr.dtype.element_ty
    h = tl.load(x_ptr + rows_n[:, None] * stride_xn + columns_c[None, :], mask=mask_nc, other=0.0).to(COMPUTE)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows_n[:, None] * stride_rn + columns_c[None, :], mask=mask_nc, other=0.0)
        rounded = (h + residual.to(COMPUTE)).to(element)
        tl.store(h_ptr + out_offsets, rounded, mask=mask_nc)
        h = rounded.to(COMPUTE)
    rstd_n = tl.rsqrt(tl.sum(h * h, axis=1) / n_columns + tl.full([], EPS, COMPUTE))
    tl.store(rstd_ptr + rows_n, rstd_n, mask=mask_n)
    n = (h * rstd_n[:, None]).to(element).to(COMPUTE)
    weight_c = tl.load(weight_ptr + columns_c, mask=mask_c, other=0.0).to(COMPUTE)
    tl.store(y_ptr + out_offsets, (n * weight_c[None, :]).to(y_ptr.dtype.element_ty), mask=mask_nc)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    dh_ptr,  # what arrives at h; None: nothing
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    n_rows,
    n_columns,
    stride_dyn,
    stride_dhn,
    stride_hn,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_c = tl.arange(0, BLOCK_C)
    mask_n, mask_c = rows_n < n_rows, columns_c < n_columns
    mask_nc = mask_n[:, None] & mask_c[None, :]
    rstd_n = tl.load(rstd_ptr + rows_n, mask=mask_n, other=0.0)
    weight_c = tl.load(weight_ptr + columns_c, mask=mask_c, other=0.0).to(COMPUTE)
    dy = tl.load(dy_ptr + rows_n[:, None] * stride_dyn + columns_c[None, :], mask=mask_nc, other=0.0).to(COMPUTE)
    h = tl.load(h_ptr + rows_n[:, None] * stride_hn + columns_c[None, :], mask=mask_nc, other=0.0).to(COMPUTE)
    g = dy * weight_c[None, :]
    n = h * rstd_n[:, None]
    mean_n = tl.sum(g * n, axis=1) / n_columns
    dx = rstd_n[:, None] * (g - n * mean_n[:, None])
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + rows_n[:, None] * stride_dhn + columns_c[None, :], mask=mask_nc, other=0.0).to(COMPUTE)
    tl.store(dx_ptr + rows_n[:, None] * n_columns + columns_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask_nc)


# --- launchers ------------------------------------------------------------------------------------


def row_blocks(shape: dict[str, Any], n_columns: int) -> dict[str, int]:
    """BLOCK_N and BLOCK_C for whole rows, and the warps for them: a row wider than TILE has more of them, so that a
    thread's share stays what TILE and num_warps say.
    """
    block_c = max(16, 1 << (n_columns - 1).bit_length())
    warps = min(32, shape["num_warps"] * max(1, block_c // shape["TILE"]))
    return {"BLOCK_N": max(1, shape["TILE"] // block_c), "BLOCK_C": block_c, "num_warps": warps}


def _common(x_NC: torch.Tensor, compute: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and what both kernels take."""
    n_rows, n_columns = x_NC.shape
    shape = launch_shape("rms_norm", x_NC.device, x_NC.dtype)
    blocks = row_blocks(shape, n_columns)
    del shape["TILE"]
    sizes = {"n_rows": n_rows, "n_columns": n_columns, "COMPUTE": tl.float64 if compute.itemsize == 8 else tl.float32}
    return (triton.cdiv(n_rows, blocks["BLOCK_N"]),), sizes | shape | blocks


def launch_rms_norm_forward(
    x_NC: torch.Tensor, residual_NC: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd); h is x where there is no residual."""
    y_NC, h_NC, rstd_N = _outputs(x_NC, residual_NC, weight)
    if x_NC.numel():
        grid, common = _common(x_NC, rstd_N.dtype)
        rms_norm_forward_kernel[grid](
            x_NC, residual_NC, weight, y_NC, None if residual_NC is None else h_NC, rstd_N, stride_xn=x_NC.stride(0),
            stride_rn=0 if residual_NC is None else residual_NC.stride(0), EPS=eps, **common,
        )  # fmt: skip
    return y_NC, h_NC, rstd_N


def launch_rms_norm_backward(
    dy_NC: torch.Tensor, dh_NC: torch.Tensor | None, h_NC: torch.Tensor, weight: torch.Tensor, rstd_N: torch.Tensor
) -> torch.Tensor:
    dx_NC = torch.empty(h_NC.shape, dtype=h_NC.dtype, device=h_NC.device)
    if dx_NC.numel():
        grid, common = _common(h_NC, rstd_N.dtype)
        rms_norm_backward_kernel[grid](
            dy_NC, dh_NC, h_NC, weight, rstd_N, dx_NC, stride_dyn=dy_NC.stride(0),
            stride_dhn=0 if dh_NC is None else dh_NC.stride(0), stride_hn=h_NC.stride(0), **common,
        )  # fmt: skip
    return dx_NC


# --- torch path -----------------------------------------------------------------------------------


def _row_chunks(x_NC: torch.Tensor) -> list[slice]:
    n_rows, n_columns = x_NC.shape
    rows = max(1, (CPU_CHUNK if x_NC.device.type == "cpu" else DEVICE_CHUNK) // n_columns)
    return [slice(first, min(first + rows, n_rows)) for first in range(0, n_rows, rows)]


def _forward_torch(
    x_NC: torch.Tensor, residual_NC: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `launch_rms_norm_forward`."""
    y_NC, h_NC, rstd_N = _outputs(x_NC, residual_NC, weight)
    compute, n_columns = rstd_N.dtype, x_NC.shape[1]
    for rows in _row_chunks(x_NC):
        if residual_NC is not None:
            torch.add(x_NC[rows], residual_NC[rows], out=h_NC[rows])
        h_nc, y_nc, rstd_n = h_NC[rows].to(compute), y_NC[rows], rstd_N[rows]
        torch.linalg.vector_norm(h_nc, dim=1, out=rstd_n)  # the one reduction that squares as it reads
        rstd_n.square_().mul_(1.0 / n_columns).add_(eps).rsqrt_()
        if x_NC.dtype == compute:
            torch.mul(h_nc, rstd_n[:, None], out=y_nc).mul_(weight)
        else:
            n_nc = h_nc.mul_(rstd_n[:, None]).to(x_NC.dtype)
            torch.mul(n_nc, weight, out=y_nc)
    return y_NC, h_NC, rstd_N


def _backward_torch(
    dy_NC: torch.Tensor, dh_NC: torch.Tensor | None, h_NC: torch.Tensor, weight: torch.Tensor, rstd_N: torch.Tensor
) -> torch.Tensor:
    compute, n_columns = rstd_N.dtype, h_NC.shape[1]
    weight = weight.to(compute)
    dx_NC = torch.empty(h_NC.shape, dtype=h_NC.dtype, device=h_NC.device)
    chunks = _row_chunks(h_NC)
    size = chunks[0].stop if chunks else 0
    g, gh = (torch.empty(size, n_columns, dtype=compute, device=h_NC.device) for _ in range(2))
    for rows in chunks:
        n = rows.stop - rows.start
        h_nc, rstd_n1 = h_NC[rows].to(compute), rstd_N[rows, None]
        # where no cast follows, the result is its own scratch
        g_nc = dx_NC[rows] if dx_NC.dtype == compute else g[:n]
        torch.mul(dy_NC[rows], weight, out=g_nc)
        slope_n1 = torch.mul(g_nc, h_nc, out=gh[:n]).sum(dim=1, keepdim=True)
        slope_n1.mul_(rstd_n1).mul_(rstd_n1).mul_(1.0 / n_columns)  # mean(g n) r: g - n mean(g n) = g - h slope
        g_nc.addcmul_(h_nc, slope_n1, value=-1.0).mul_(rstd_n1)
        if dh_NC is not None:
            g_nc.add_(dh_NC[rows])
        if g_nc.dtype != dx_NC.dtype:
            dx_NC[rows].copy_(g_nc)
    return dx_NC


# --- library and autograd -------------------------------------------------------------------------
# The ops take [..., C] and flatten inside: x and residual then get one tensor as their gradient, which autograd sees
# and does not hand to two leaves. Behind a view each, both would keep that memory as their own.


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    forward = launch_rms_norm_forward if backend == "triton" else _forward_torch
    y_NC, h_NC, rstd_N = forward(as_rows(x), None if residual is None else as_rows(residual), weight, eps)
    return y_NC.view(x.shape), h_NC if residual is None else h_NC.view(x.shape), rstd_N


def _fake_outputs(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y_dtype, compute = _dtypes(x, weight)
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(x.shape[:-1].numel(), dtype=compute)


@library_op("rms_norm", "(Tensor x, Tensor weight, float eps, str backend) -> (Tensor y, Tensor rstd)")
def _rms_norm_op(x, weight, eps, backend):
    y, _, rstd = _forward(x, None, weight, eps, backend)
    return y, rstd


@_rms_norm_op.register_fake
def _(x, weight, eps, backend):
    return _fake_outputs(x, weight)


@library_op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, str backend) -> (Tensor y, Tensor h, Tensor rstd)",
)
def _add_rms_norm_op(x, residual, weight, eps, backend):
    return _forward(x, residual, weight, eps, backend)


@_add_rms_norm_op.register_fake
def _(x, residual, weight, eps, backend):
    y, rstd = _fake_outputs(x, weight)
    return y, x.new_empty(x.shape), rstd


@library_op("rms_norm_backward", "(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, str backend) -> Tensor")
def _backward_op(dy, dh, h, weight, rstd, backend):
    backward = launch_rms_norm_backward if backend == "triton" else _backward_torch
    dx_NC = backward(as_rows(dy), None if dh is None else as_rows(dh), as_rows(h), weight, rstd)
    return dx_NC.view(h.shape)


@_backward_op.register_fake
def _(dy, dh, h, weight, rstd, backend):
    return h.new_empty(h.shape)


def _setup_rms_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.backend = inputs
    _, rstd = output
    _setup(ctx, x, weight, rstd)


def _setup_add_rms_norm(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, weight, _, ctx.backend = inputs
    _, h, rstd = output
    _setup(ctx, h, weight, rstd)


def _setup(ctx: Any, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> None:
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # a gradient that does not arrive is not read
    ctx.save_for_backward(h, weight, rstd)


def _dh(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> torch.Tensor | None:
    if dy is None:
        return dh
    return _backward_op(dy, dh, *ctx.saved_tensors, ctx.backend)


def _backward_rms_norm(ctx, dy, _):
    return _dh(ctx, dy, None), None, None, None


def _backward_add_rms_norm(ctx, dy, dh, _):
    both = _dh(ctx, dy, dh)
    dx, dresidual = (both if needed else None for needed in ctx.needs_input_grad[:2])
    return dx, dresidual, None, None, None


_rms_norm_op.register_autograd(_backward_rms_norm, setup_context=_setup_rms_norm)
_add_rms_norm_op.register_autograd(_backward_add_rms_norm, setup_context=_setup_add_rms_norm)


# --- public ---------------------------------------------------------------------------------------


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    if x.dim() < 1 or x.dtype not in FLOATS or x.shape[-1] < 1:
        raise ValueError(f"x: expected a floating tensor [..., C], C >= 1, got {x.dtype} of shape {tuple(x.shape)}")
    if weight.shape != x.shape[-1:] or weight.dtype not in FLOATS or weight.device != x.device:
        raise ValueError(
            f"weight: expected a floating tensor of shape {tuple(x.shape[-1:])} on {x.device}, "
            f"got {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        )
    if weight.requires_grad:
        raise ValueError("weight: expected a frozen tensor, got one that requires a gradient")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected 0 or more, got {eps}")


def _backend_for(backend: str, x: torch.Tensor) -> str:
    """`resolve_backend`, and the torch path for rows wider than a program can hold."""
    chosen = resolve_backend(backend, x.device)
    if chosen == "torch" or x.shape[-1] <= WIDEST:
        return chosen
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: rows of {x.shape[-1]} columns, {WIDEST} at most")
    return "torch"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """RMSNorm under a weight that does not train.

    Args:
        x: [..., C], any floating dtype; rows may be strided.
        weight: [C], any floating dtype, without a gradient.
        eps: added to the mean square, 0 or more. A setting of the model: each value is compiled in.
        backend: "auto", "triton" (C at most 16,384; "auto" takes the torch path beyond) or "torch".

    Returns:
        [..., C], the promoted dtype of `x` and `weight`. Differentiable once, in `x`.

    Raises:
        ValueError: a wrong shape, dtype, device or range, or a weight that requires a gradient.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    _check(x, weight, eps)
    return _rms_norm_op(x, weight.contiguous(), float(eps), _backend_for(backend, x))[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual sum and its RMSNorm in one visit: (y, h), h = x + residual, y = rms_norm(h, weight, eps).

    The gradients of `x` and of `residual` are one tensor: do not add into it.

    Args:
        x, residual: [..., C], one shape and floating dtype; rows may be strided.
        weight, eps, backend: as `rms_norm`.

    Returns:
        y as `rms_norm`; h [..., C], dtype of `x`. Both differentiable once, in `x` and `residual`.

    Raises:
        ValueError, RuntimeError: as `rms_norm`.
    """
    _check(x, weight, eps)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual: expected {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {residual.dtype} of shape {tuple(residual.shape)} on {residual.device}"
        )
    return _add_rms_norm_op(x, residual, weight.contiguous(), float(eps), _backend_for(backend, x))[:2]
