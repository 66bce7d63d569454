"""A frozen NF4 weight, dequantised (QLoRA, arXiv 2305.14314, with double quantisation): bitsandbytes' bits.

    absmax = nested_code[absmax_u8] * nested_absmax[block // nested_blocksize] + offset      one a block of weights
    w      = code[nibble] * absmax                                                           row-major [out, in]

A byte holds two weights, the high nibble first. All is fp32, and every product and sum rounds by itself: a fused
multiply-add would give other bits, so Triton is told not to make any. The result rounds once, to the output dtype.

Traffic a weight: half a byte of nibbles, 1 / blocksize of absmax, and one store. The tables (16 and 256 levels) and
nested_absmax (four bytes for 16,384 weights) come from cache. Nothing is saved: the weight is frozen, and has no
gradient. Legend: B blocks of weights, J bytes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape
from .._library import library_op
from .._triton import tl, triton

__all__ = ["nf4_dequantize"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKSIZES = tuple(1 << i for i in range(5, 13))  # those that bitsandbytes makes
CHUNK = 1 << 18  # weights that the torch path works on at once: a few MB in a core's cache, and no index of them all
EXACT = {"enable_fp_fusion": False}  # launch option: absmax is a rounded product plus the offset, no multiply-add


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    offset_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    out_ptr,
    n_weights,
    n_bytes,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """BLOCK_B blocks of weights; only the last block of all may be partial, and its last byte half used.

    n_bytes is (n_weights + 1) // 2, an argument so that its divisibility by 16 is known and the loads stay wide.
    """
    BYTES: tl.constexpr = BLOCKSIZE // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    blocks_b = first + tl.arange(0, BLOCK_B)
    mask_b = blocks_b * BLOCKSIZE < n_weights
    # to int32 first: a byte added to a pointer would be sign-extended
    level_b = tl.load(absmax_ptr + blocks_b, mask=mask_b, other=0).to(tl.int32)
    nested_b = tl.load(nested_absmax_ptr + blocks_b // NESTED_BLOCKSIZE, mask=mask_b, other=0.0)
    absmax_b = tl.load(nested_code_ptr + level_b) * nested_b + tl.load(offset_ptr)

    # flat from here on: in two dimensions Triton 3.6 lays the lookups out anew, through shared memory
    absmax_j = tl.reshape(tl.broadcast_to(absmax_b[:, None], [BLOCK_B, BYTES]), [BLOCK_B * BYTES])
    bytes_j = first * BYTES + tl.arange(0, BLOCK_B * BYTES)
    packed_j = tl.load(packed_ptr + bytes_j, mask=bytes_j < n_bytes, other=0).to(tl.int32)
    high_j = tl.load(code_ptr + (packed_j >> 4)) * absmax_j
    low_j = tl.load(code_ptr + (packed_j & 15)) * absmax_j
    w = tl.interleave(high_j, low_j).to(out_ptr.dtype.element_ty)
    weights = first * BLOCKSIZE + tl.arange(0, BLOCK_B * BLOCKSIZE)
    tl.store(out_ptr + weights, w, mask=weights < n_weights)


# --- launcher and torch path ----------------------------------------------------------------------


def launch_nf4_dequantize(
    out: torch.Tensor,
    packed: torch.Tensor,
    absmax_B: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """Fill `out`, contiguous. TILE in launch/*.json counts bytes of `packed`."""
    shape = launch_shape("nf4_dequantize", out.device, out.dtype)
    block_b = max(1, shape.pop("TILE") // (blocksize // 2))
    nf4_dequantize_kernel[(triton.cdiv(absmax_B.numel(), block_b),)](
        packed, absmax_B, code, offset, nested_absmax, nested_code, out, out.numel(), packed.numel(),
        BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, BLOCK_B=block_b, **EXACT, **shape,
    )  # fmt: skip


def _dequantize_torch(
    out: torch.Tensor,
    packed: torch.Tensor,
    absmax_B: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """As the launcher. A byte is looked up whole, among the 256 pairs of levels: as one int64, a third of the time."""
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.int64).view(-1)
    nested_B = nested_absmax.repeat_interleave(nested_blocksize)[: absmax_B.numel()]
    scale_B = nested_code.index_select(0, absmax_B.int()).mul_(nested_B).add_(offset)
    out = out.view(-1)
    for first in range(0, out.numel(), CHUNK):
        part = out[first : first + CHUNK]
        w = pairs.index_select(0, packed[first // 2 : (first + CHUNK) // 2].int()).view(torch.float32)
        scale_b = scale_B[first // blocksize : (first + CHUNK) // blocksize]
        part.copy_(w[: part.numel()].mul_(scale_b.repeat_interleave(blocksize)[: part.numel()]))


def _dequantize(out: torch.Tensor, *tensors_and_sizes: Any, backend: str) -> None:
    if out.numel():
        (launch_nf4_dequantize if backend == "triton" else _dequantize_torch)(out, *tensors_and_sizes)


# --- library --------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor offset, Tensor nested_absmax, Tensor nested_code, "
    "int blocksize, int nested_blocksize"
)


@library_op(
    "nf4_dequantize", f"({_ARGUMENTS}, SymInt n_rows, SymInt n_columns, ScalarType dtype, str backend) -> Tensor"
)
def _dequantize_op(packed, *arguments):
    """Checked tensors, each of one dimension. No autograd formula."""
    *others, n_rows, n_columns, dtype, backend = arguments
    out = torch.empty(n_rows, n_columns, dtype=dtype, device=packed.device)
    _dequantize(out, packed, *others, backend=backend)
    return out


@_dequantize_op.register_fake
def _(packed, *arguments):
    *_, n_rows, n_columns, dtype, _ = arguments
    return packed.new_empty(n_rows, n_columns, dtype=dtype)


@library_op("nf4_dequantize_", f"(Tensor(a!) out, {_ARGUMENTS}, str backend) -> ()", mutates=["out"])
def _dequantize_into_op(out, *arguments):
    """As `nf4_dequantize`; out: contiguous, as many elements as there are weights."""
    *others, backend = arguments
    _dequantize(out, *others, backend=backend)


@_dequantize_into_op.register_fake
def _(out, *arguments):
    return None


# --- public ---------------------------------------------------------------------------------------


def _check(name: str, x: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if x.dtype != dtype or x.device != device:
        raise ValueError(f"{name}: expected {dtype} on {device}, got {x.dtype} on {x.device}")
    if x.numel() != numel or not x.is_contiguous():
        kind = "contiguous" if x.is_contiguous() else "strided"
        raise ValueError(
            f"{name}: expected {numel} contiguous elements, got {x.numel()} ({kind}, shape {tuple(x.shape)})"
        )
    if x.requires_grad:
        raise ValueError(f"{name}: expected a frozen tensor, got one that requires a gradient")


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
    """The weight of an NF4 layer with double quantisation, equal to bitsandbytes' to the bit.

    Every tensor is contiguous, of any shape, on one device. With B = ceil(out * in / blocksize):

    Args:
        packed: uint8, ceil(out * in / 2) bytes of two weights each, the high nibble first.
        absmax: uint8, B; the quantised absolute maximum of each block.
        code: fp32, 16; the levels of NF4.
        offset: fp32, one element; what was taken from every absmax before it was quantised.
        nested_absmax: fp32, ceil(B / nested_blocksize).
        nested_code: fp32, 256; the levels of an absmax.
        shape: (out, in).
        dtype: of the result: torch.float16, torch.bfloat16 or torch.float32.
        blocksize: weights that share an absmax: a power of two from 32 to 4096.
        nested_blocksize: blocks that share an element of `nested_absmax`, 1 or more.
        out: contiguous buffer of `dtype` with at least out * in elements, overwritten. One serves layer after layer.
        backend: "auto", "triton" or "torch"; they give the same bits.

    Returns:
        [out, in]: the start of `out` if given, else new memory. Without a gradient: the weight is frozen.

    Raises:
        ValueError: a wrong shape, dtype, device or size, or a tensor that requires a gradient; nothing is written.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape: expected (out, in), got {tuple(shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected a power of two from 32 to 4096, got {blocksize}")
    if nested_blocksize < 1:
        raise ValueError(f"nested_blocksize: expected 1 or more, got {nested_blocksize}")
    rows, columns = shape
    n_weights, device = rows * columns, packed.device
    n_blocks = -(-n_weights // blocksize)
    _check("packed", packed, torch.uint8, -(-n_weights // 2), device)
    _check("absmax", absmax, torch.uint8, n_blocks, device)
    _check("code", code, torch.float32, 16, device)
    _check("offset", offset, torch.float32, 1, device)
    _check("nested_absmax", nested_absmax, torch.float32, -(-n_blocks // nested_blocksize), device)
    _check("nested_code", nested_code, torch.float32, 256, device)
    if out is not None:
        _check("out", out, dtype, max(out.numel(), n_weights), device)
    chosen = resolve_backend(backend, device)
    flat = [x.view(-1) for x in (packed, absmax, code, offset, nested_absmax, nested_code)]
    if out is None:
        return _dequantize_op(*flat, blocksize, nested_blocksize, rows, columns, dtype, chosen)
    weight = out.view(-1)[:n_weights].view(rows, columns)
    _dequantize_into_op(weight, *flat, blocksize, nested_blocksize, chosen)
    return weight
