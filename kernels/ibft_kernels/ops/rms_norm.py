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
CPU_CHUNK = 1 << 15  # elements that the torch path works on at once on a CPU


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


# --- torch path -----------------------------------------------------------------------------------


def _row_chunks(x_NC: torch.Tensor) -> list[slice]:
    n_rows, n_columns = x_NC.shape
    rows = max(1, CPU_CHUNK // n_columns) if x_NC.device.type == "cpu" else max(1, n_rows)
    return [slice(first, min(first + rows, n_rows)) for first in range(0, n_rows, rows)]


def _forward_torch(
    x_NC: torch.Tensor, residual_NC: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd); h is x where there is no residual."""
    n_rows, n_columns = x_NC.shape
    compute = compute_dtype(x_NC, weight)
    y_NC = torch.empty(n_rows, n_columns, dtype=torch.promote_types(x_NC.dtype, weight.dtype), device=x_NC.device)
    h_NC = x_NC if residual_NC is None else torch.empty(n_rows, n_columns, dtype=x_NC.dtype, device=x_NC.device)
    rstd_N = torch.empty(n_rows, dtype=compute, device=x_NC.device)
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


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward_torch(x, residual, weight, eps)


def _fake_outputs(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[0], dtype=compute_dtype(x, weight))


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


@library_op(
    "rms_norm_backward", "(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, str backend) -> Tensor"
)
def _backward_op(dy, dh, h, weight, rstd, backend):
    return _backward_torch(dy, dh, h, weight, rstd)


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
    return _backward_op(as_rows(dy), None if dh is None else as_rows(dh), *ctx.saved_tensors, ctx.backend)


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
    y_NC, _ = _rms_norm_op(as_rows(x), weight.contiguous(), float(eps), _backend_for(backend, x))
    return y_NC.view(x.shape)


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
    y_NC, h_NC, _ = _add_rms_norm_op(
        as_rows(x), as_rows(residual), weight.contiguous(), float(eps), _backend_for(backend, x)
    )
    return y_NC.view(x.shape), h_NC.view(x.shape)
