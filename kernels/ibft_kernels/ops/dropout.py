"""Dropout whose mask is a function of the sample: a packed, resumed or re-batched run drops the same elements.

    y = x * keep / (1 - t / 65536)        t = round(p * 65536)        keep = (16 random bits, signed) >= t - 32768

Sixteen bits decide one element, so a Philox call (key and counter as in `philox`) serves eight columns: counter word
0 is column // 8, word i of call j decides column 8j + 2i with its low half and 8j + 2i + 1 with its high half. That
halves the integer work of four columns a call, and costs p a rounding of at most 2^-17 (the scale uses the rounded p,
so the mean stays exact). The counters repeat those of the normals; the stream in the key keeps the two apart.

`dropout_add_` adds y to what a buffer holds, in the same visit: how a gradient through the mask joins others.

Saved for backward: nothing on the Triton path (the mask is recomputed); one byte an element on the torch path, where
recomputing costs ten times what reading the byte does.
Legend: N rows, C columns, J = ceil(C / 8) calls a row.
"""

from __future__ import annotations

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape, tile_blocks
from .._library import library_op
from .._triton import tl, triton
from ._philox_triton import interleave4, load_key, philox_tile, seed_arguments
from ._rows import FLOATS, SEED_SCHEMA, as_rows, check_seed, join_seed, rows_of_ids, split_seed
from .philox import word_chunks

__all__ = ["philox_dropout"]

LEVELS = 1 << 16


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _low_half(word):
    return (word << 16) >> 16  # arithmetic: the low 16 bits, sign-extended


@triton.jit(do_not_specialize=["n_rows", "threshold", "seed_lo", "seed_hi"])
def dropout_kernel(
    x_ptr,
    y_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    threshold,
    n_rows,
    n_columns,
    stride_xn,
    stride_yn,
    ADD: tl.constexpr,  # to what y holds
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x * keep * scale. With dy for x it is the whole backward. Each element is read once and written once."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_C
    columns_c = first + tl.arange(0, BLOCK_C)
    mask_n = rows_n < n_rows
    mask_nc = mask_n[:, None] & (columns_c < n_columns)[None, :]
    key = load_key(seed_ptr, seed_lo, seed_hi)
    w0, w1, w2, w3 = philox_tile(key, ids_ptr, rows_n, mask_n, first // 8 + tl.arange(0, BLOCK_C // 8))
    words = interleave4(w0, w1, w2, w3)
    bits = tl.reshape(tl.join(_low_half(words), words >> 16), [BLOCK_N, BLOCK_C])
    kept = (65536 - threshold).to(COMPUTE)
    if COMPUTE == tl.float64:  # noqa: SIM108, SIM300 (the branch is chosen at compile time)
        scale = 65536.0 / kept
    else:
        scale = tl.div_rn(65536.0, kept)  # `/` may be two units off in fp32
    x = tl.load(x_ptr + rows_n[:, None] * stride_xn + columns_c[None, :], mask=mask_nc).to(COMPUTE)
    # a product, not a choice: a NaN under a dropped element still shows, as in torch
    y = x * tl.where(bits >= threshold - 32768, scale, 0.0)
    y_ptrs = y_ptr + rows_n[:, None] * stride_yn + columns_c[None, :]
    if ADD:
        y += tl.load(y_ptrs, mask=mask_nc).to(COMPUTE)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_nc)


# --- launcher and torch path ----------------------------------------------------------------------


def launch_dropout(
    y_NC: torch.Tensor,
    x_NC: torch.Tensor,
    threshold: int,
    seed: int | torch.Tensor,
    ids_N3: torch.Tensor | None,
    *,
    add: bool = False,
) -> None:
    """Fill y, or add to it; adjacent columns, rows of any stride."""
    if x_NC.numel() == 0:
        return
    n_rows, n_columns = x_NC.shape
    shape = launch_shape("dropout", x_NC.device, x_NC.dtype)
    block_n, block_c = tile_blocks(shape.pop("TILE"), n_columns)
    grid = (triton.cdiv(n_rows, block_n), triton.cdiv(n_columns, block_c))
    compute = tl.float64 if x_NC.dtype == torch.float64 else tl.float32
    dropout_kernel[grid](
        x_NC, y_NC, ids_N3, *seed_arguments(seed), threshold, n_rows, n_columns, x_NC.stride(0), y_NC.stride(0),
        ADD=add, COMPUTE=compute, BLOCK_N=block_n, BLOCK_C=block_c, **shape,
    )  # fmt: skip


def _keep_mask(
    n_rows: int,
    columns: int,
    threshold: int,
    seed: int | torch.Tensor,
    ids_N3: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """1 for a kept element, 0 for a dropped one: uint8 [N, C]."""
    calls = -(-columns // 8)
    keep_NC = torch.empty(n_rows, columns, dtype=torch.uint8, device=device)
    for rows, words in word_chunks(seed, ids_N3, n_rows, calls, device):
        packed = torch.empty(*words[0].shape, 4, dtype=torch.int32, device=device)
        for i, word in enumerate(words):
            packed[..., i].copy_(word)
        # keep = clamp(bits, s - 1, s) - (s - 1), s = threshold - 32768: vectorised, as a comparison to bool is not
        bits = packed.view(torch.int16).flatten(1)
        keep_NC[rows].copy_(bits.clamp_(threshold - 32769, threshold - 32768).sub_(threshold - 32769)[:, :columns])
    return keep_NC


def _scaled(x: torch.Tensor, keep: torch.Tensor, threshold: int) -> torch.Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return keep.to(compute).mul_(LEVELS / (LEVELS - threshold)).mul_(x).to(x.dtype)


# --- library and autograd -------------------------------------------------------------------------

_ARGUMENTS = f"Tensor? noise_ids, int threshold, {SEED_SCHEMA}, str backend"


@library_op("philox_dropout", f"(Tensor x, {_ARGUMENTS}) -> (Tensor y, Tensor keep)")
def _dropout_op(x, noise_ids, threshold, seed_tensor, seed, backend):
    """keep: the torch path's mask, uint8 [N, C]; empty on the Triton path."""
    key = join_seed(seed_tensor, seed)
    if backend == "triton":
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch_dropout(y, x, threshold, key, noise_ids)
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    keep = _keep_mask(*x.shape, threshold, key, noise_ids, x.device)
    return _scaled(x, keep, threshold), keep


@_dropout_op.register_fake
def _(x, noise_ids, threshold, seed_tensor, seed, backend):
    return x.new_empty(x.shape), x.new_empty(0 if backend == "triton" else x.shape, dtype=torch.uint8)


@library_op("philox_dropout_backward", f"(Tensor dy, Tensor keep, {_ARGUMENTS}) -> Tensor")
def _dropout_backward_op(dy, keep, noise_ids, threshold, seed_tensor, seed, backend):
    if backend == "triton":
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        launch_dropout(dx, dy, threshold, join_seed(seed_tensor, seed), noise_ids)
        return dx
    return _scaled(dy, keep, threshold)


@_dropout_backward_op.register_fake
def _(dy, keep, noise_ids, threshold, seed_tensor, seed, backend):
    return dy.new_empty(dy.shape)


@library_op("philox_dropout_add_", f"(Tensor(a!) dx, Tensor dy, Tensor keep, {_ARGUMENTS}) -> ()", mutates=["dx"])
def _dropout_add_op(dx, dy, keep, noise_ids, threshold, seed_tensor, seed, backend):
    """dx [N, C] += the gradient of what dropped; one visit."""
    if backend == "triton":
        launch_dropout(dx, dy, threshold, join_seed(seed_tensor, seed), noise_ids, add=True)
    elif dx.dtype in (torch.float32, torch.float64):
        dx.addcmul_(dy, keep.to(dx.dtype), value=LEVELS / (LEVELS - threshold))
    else:
        dx.copy_(dx.float().addcmul_(dy.float(), keep.float(), value=LEVELS / (LEVELS - threshold)))


@_dropout_add_op.register_fake
def _(dx, dy, keep, noise_ids, threshold, seed_tensor, seed, backend):
    return None


def _setup_context(ctx, inputs, output):
    _, noise_ids, ctx.threshold, seed_tensor, ctx.seed, ctx.backend = inputs
    keep = output[1]
    ctx.mark_non_differentiable(keep)
    ctx.set_materialize_grads(False)  # else a zero "gradient" of the mask
    ctx.save_for_backward(keep, noise_ids, seed_tensor)


def _backward(ctx, dy, _):
    keep, noise_ids, seed_tensor = ctx.saved_tensors
    dx = _dropout_backward_op(as_rows(dy), keep, noise_ids, ctx.threshold, seed_tensor, ctx.seed, ctx.backend)
    return dx, None, None, None, None, None


_dropout_op.register_autograd(_backward, setup_context=_setup_context)


# --- public ---------------------------------------------------------------------------------------


def philox_dropout(
    x: torch.Tensor,
    p: float,
    *,
    seed: int | torch.Tensor,
    noise_ids: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Dropout with a mask from Philox: a sample's position and stream decide what drops, however it is batched.

    Args:
        x: [..., C], any floating dtype; rows may be strided.
        p: probability of dropping an element, 0 <= p < 1, rounded to a multiple of 2^-16; 0 then returns `x`.
        seed: 64-bit key (`noise_key(run_seed, stream)`, one stream a module): an int or a one-element int64 tensor.
        noise_ids: int32 [..., 3] = (epoch, sample, position) of each row; default (0, 0, row number).
        backend: "auto", "triton" or "torch"; the masks are equal.

    Returns:
        [..., C], dtype of `x`. Differentiable once.

    Raises:
        ValueError: p outside [0, 1), or a wrong shape, dtype, device or range.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected 0 <= p < 1, got {p}")
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected a floating tensor [..., C], got {x.dtype} of shape {tuple(x.shape)}")
    check_seed(seed, x.device)
    ids_N3 = rows_of_ids(noise_ids, x.shape[:-1], x.device)
    chosen = resolve_backend(backend, x.device)
    threshold = min(round(p * LEVELS), LEVELS - 1)
    if threshold == 0:
        return x
    y_NC, _ = _dropout_op(as_rows(x), ids_N3, threshold, *split_seed(seed), chosen)
    return y_NC.view(x.shape)
