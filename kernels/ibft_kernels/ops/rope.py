"""Rotary position embedding of queries and keys, in one launch for both (transformers' half-rotation layout).

With x1, x2 the halves of a head and c1, c2, s1, s2 those of cos and sin (c1 = c2 and s1 = s2 in transformers; not
assumed here),

    y1 = x1 c1 - x2 s1          y2 = x2 c2 + x1 s2          y = R x
    dx1 = dy1 c1 + dy2 s2       dx2 = dy2 c2 - dy1 s1       dx = R^T dy

R depends on the position alone, so only cos and sin are saved; R^T is R with -s2 for s1 and -s1 for s2. Inputs are
read where they lie (q and k are slices of a projection's output) and are not written. liger-kernel's rope is no help:
it copies slices to contiguous tensors first and, where they are contiguous already, overwrites its inputs and the
gradients that it is given, which autograd may have handed to others too.

The Triton path computes in fp32, in float64 where an input is float64. A program walks all heads of some tokens, so
that cos and sin are read once, as is every element of q and k. The torch path computes in the promoted dtype of x and
cos: with 16-bit tables its sum rounds twice, as transformers' own.
Legend: N tokens, Hq query heads, Hkv key heads, H either, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape
from .._library import library_op
from .._triton import tl, triton
from ._rows import FLOATS, as_rows

__all__ = ["rotate"]


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _turn_heads(
    x_ptr,
    y_ptr,
    c1,
    c2,
    s1,
    s2,
    rows_n,
    mask_n,
    n_heads,
    stride_xn,
    stride_xh,
    COMPUTE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of the tokens at a time; c1 to s2 are [BLOCK_N, 1, BLOCK_D]. y is contiguous."""
    columns_d = tl.arange(0, BLOCK_D)
    for first in range(0, n_heads, BLOCK_H):
        heads_h = first + tl.arange(0, BLOCK_H).to(tl.int64)
        mask = mask_n[:, None, None] & (heads_h < n_heads)[None, :, None] & (columns_d < HALF)[None, None, :]
        x_offsets = rows_n[:, None, None] * stride_xn + heads_h[None, :, None] * stride_xh + columns_d[None, None, :]
        x1 = tl.load(x_ptr + x_offsets, mask=mask).to(COMPUTE)
        x2 = tl.load(x_ptr + x_offsets + HALF, mask=mask).to(COMPUTE)
        heads_nh = rows_n[:, None, None] * n_heads + heads_h[None, :, None]
        y_offsets = heads_nh * (2 * HALF) + columns_d[None, None, :]
        tl.store(y_ptr + y_offsets, (x1 * c1 - x2 * s1).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + y_offsets + HALF, (x2 * c2 + x1 * s2).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def rotate_kernel(
    q_ptr,
    q_out_ptr,
    k_ptr,  # None: one tensor alone
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    n_rows,
    n_q_heads,
    n_k_heads,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_cosn,
    stride_sinn,
    COMPUTE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HALF: tl.constexpr,  # d / 2, a size of the model, not of the batch: x2 then loads as wide as x1
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the power of two that holds HALF
):
    """R x, or R^T x where TRANSPOSED, for all heads of BLOCK_N tokens."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_d = tl.arange(0, BLOCK_D)
    mask_n = rows_n < n_rows
    mask_nd = mask_n[:, None] & (columns_d < HALF)[None, :]
    cos_ptrs = cos_ptr + rows_n[:, None] * stride_cosn + columns_d[None, :]
    sin_ptrs = sin_ptr + rows_n[:, None] * stride_sinn + columns_d[None, :]
    c1 = tl.load(cos_ptrs, mask=mask_nd).to(COMPUTE)[:, None, :]
    c2 = tl.load(cos_ptrs + HALF, mask=mask_nd).to(COMPUTE)[:, None, :]
    s1 = tl.load(sin_ptrs, mask=mask_nd).to(COMPUTE)[:, None, :]
    s2 = tl.load(sin_ptrs + HALF, mask=mask_nd).to(COMPUTE)[:, None, :]
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    _turn_heads(
        q_ptr, q_out_ptr, c1, c2, s1, s2, rows_n, mask_n, n_q_heads, stride_qn, stride_qh, COMPUTE, HALF, BLOCK_H,
        BLOCK_D,
    )  # fmt: skip
    if k_ptr is not None:
        _turn_heads(
            k_ptr, k_out_ptr, c1, c2, s1, s2, rows_n, mask_n, n_k_heads, stride_kn, stride_kh, COMPUTE, HALF, BLOCK_H,
            BLOCK_D,
        )  # fmt: skip


# --- launcher and torch path ----------------------------------------------------------------------


def head_blocks(tile: int, fewest_heads: int, half: int) -> dict[str, int]:
    """`tile` elements whatever the heads: half a head across, no more heads than the tensor with the fewest fills."""
    block_d = triton.next_power_of_2(half)
    block_h = min(triton.next_power_of_2(fewest_heads), max(1, tile // block_d))
    return {"BLOCK_N": max(1, tile // (block_d * block_h)), "BLOCK_H": block_h, "BLOCK_D": block_d}


def _with_adjacent_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_rotate(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool
) -> list[torch.Tensor]:
    """R x (R^T x where `transposed`) of one or two tensors [N, H, d], in one launch."""
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    filled = [(_with_adjacent_columns(x), y) for x, y in zip(xs, ys, strict=True) if x.numel()]
    if filled:
        (q, q_out), (k, k_out) = filled[0], filled[1] if len(filled) == 2 else (None, None)
        cos, sin = as_rows(cos), as_rows(sin)
        n_rows, n_heads, d = q.shape
        shape = launch_shape("rotate", q.device, q.dtype)
        blocks = head_blocks(shape.pop("TILE"), min(x.shape[1] for x, _ in filled), d // 2)
        exact = torch.float64 in (cos.dtype, *(x.dtype for x, _ in filled))
        n_k_heads, stride_kn, stride_kh = (0, 0, 0) if k is None else (k.shape[1], k.stride(0), k.stride(1))
        rotate_kernel[(triton.cdiv(n_rows, blocks["BLOCK_N"]),)](
            q, q_out, k, k_out, cos, sin, n_rows, n_heads, n_k_heads, q.stride(0), q.stride(1), stride_kn, stride_kh,
            cos.stride(0), sin.stride(0), COMPUTE=tl.float64 if exact else tl.float32, TRANSPOSED=transposed,
            HALF=d // 2, **blocks, **shape,
        )  # fmt: skip
    return ys


def _rotate_torch(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, *, transposed: bool
) -> list[torch.Tensor]:
    s1, s2 = sin[:, None].chunk(2, -1)
    return [_product(x, cos, s2, s1, 1) if transposed else _product(x, cos, s1, s2, -1) for x in xs]


def _product(x: torch.Tensor, cos: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, sign: int) -> torch.Tensor:
    """[x1 c1 + sign x2 s1, x2 c2 - sign x1 s2] in two passes over x; contiguous, of x's dtype."""
    half = x.shape[-1] // 2
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))  # an fp32 cos under autocast stays fp32
    torch.mul(x, cos[:, None], out=y)
    y[..., :half].addcmul_(x[..., half:], s1, value=sign)
    y[..., half:].addcmul_(x[..., :half], s2, value=-sign)
    return y.to(x.dtype)


# --- library and autograd -------------------------------------------------------------------------


@library_op("rotate", "(Tensor q, Tensor k, Tensor cos, Tensor sin, str backend) -> (Tensor q_out, Tensor k_out)")
def _rotate_op(q, k, cos, sin, backend):
    run = launch_rotate if backend == "triton" else _rotate_torch
    q_out, k_out = run((q, k), cos, sin, transposed=False)
    return q_out, k_out


@_rotate_op.register_fake
def _(q, k, cos, sin, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@library_op("rotate_backward", "(Tensor[] dys, Tensor cos, Tensor sin, str backend) -> Tensor[]")
def _rotate_backward_op(dys, cos, sin, backend):
    """Of the gradients that arrived at what needs one: both, or one alone."""
    run = launch_rotate if backend == "triton" else _rotate_torch
    return run(dys, cos, sin, transposed=True)


@_rotate_backward_op.register_fake
def _(dys, cos, sin, backend):
    return [dy.new_empty(dy.shape) for dy in dys]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cos, sin, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # a gradient that does not arrive is not read
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    asked = [i for i, dy in enumerate((dq, dk)) if dy is not None and ctx.needs_input_grad[i]]
    gradients = [None] * 5
    if asked:
        found = _rotate_backward_op([(dq, dk)[i] for i in asked], *ctx.saved_tensors, ctx.backend)
        for i, dx in zip(asked, found, strict=True):
            gradients[i] = dx
    return tuple(gradients)


_rotate_op.register_autograd(_backward, setup_context=_setup_context)


# --- public ---------------------------------------------------------------------------------------


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q, k: got {tuple(q.shape)} and {tuple(k.shape)}, expected [N, Hq, d] and [N, Hkv, d]")
    if q.shape[2] % 2 or not q.shape[2]:
        raise ValueError(f"q, k: got d = {q.shape[2]}, expected d even and at least 2")
    if cos.shape != sin.shape or cos.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"cos, sin: got {tuple(cos.shape)} and {tuple(sin.shape)}, expected [N, d] = {(q.shape[0], q.shape[2])}; "
            "partial rotary embedding is not supported"
        )
    for name, x in {"q": q, "k": k, "cos": cos, "sin": sin}.items():
        if x.dtype not in FLOATS or x.device != q.device:
            raise ValueError(f"{name}: got {x.dtype} on {x.device}, expected a floating tensor on {q.device}")
    if cos.dtype != sin.dtype:
        raise ValueError(f"cos, sin: got {cos.dtype} and {sin.dtype}, expected one dtype")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos, sin: expected constants, got a tensor that requires a gradient")


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by their positions; the inputs stay as they are.

    Args:
        q: [N, Hq, d], d even, any floating dtype; a view with adjacent columns is read in place, whatever its other
            strides: a slice of one projection's [N, out].
        k: [N, Hkv, d], the same.
        cos, sin: [N, d] as transformers' rotary embedding gives them, flattened (scaling is inside); constants of one
            floating dtype, which need not be q's.
        backend: "auto", "triton" or "torch".

    Returns:
        New contiguous [N, Hq, d] and [N, Hkv, d] of q's and k's dtypes. Differentiable once, in q and k.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an odd d, cos narrower than d (a partial rotary
            embedding), or a cos or sin that requires a gradient.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    _check(q, k, cos, sin)
    out: tuple[torch.Tensor, torch.Tensor] = _rotate_op(q, k, cos, sin, resolve_backend(backend, q.device))
    return out
