"""The Triton side of `philox`: tiles that every kernel with noise shares, and the kernel behind `philox_normal`.

The formulas, the constants' origin and the layout of key and counter are in `philox`.
"""

from __future__ import annotations

import torch

from .._launch import launch_shape, tile_blocks
from .._triton import tl, triton
from ._rows import seed_halves

__all__ = [
    "interleave4",
    "launch_philox",
    "load_key",
    "philox_kernel",
    "philox_normal_tile",
    "philox_tile",
    "seed_arguments",
]


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def load_key(seed_ptr, seed_lo, seed_hi):
    """The 64-bit key: from the device if a pointer is given, else from two i32 halves: one signature for all seeds."""
    if seed_ptr is None:  # noqa: SIM108 (the branch is chosen at compile time)
        key = (seed_hi.to(tl.int64) << 32) | (seed_lo.to(tl.int64) & 0xFFFFFFFF)
    else:
        key = tl.load(seed_ptr)
    return key


@triton.jit
def philox_tile(key, ids_ptr, rows_n, mask_n, group_j):
    """Four int32 word tiles [BLOCK_N, J] for int64 rows `rows_n` and int32 column groups `group_j`.

    ids_ptr: int32 [N, 3] = (epoch, sample, position), or None: (0, 0, row).
    """
    if ids_ptr is None:
        position_n = rows_n.to(tl.int32)
        sample_n = tl.zeros_like(position_n)
        epoch_n = tl.zeros_like(position_n)
    else:
        epoch_n = tl.load(ids_ptr + rows_n * 3, mask=mask_n, other=0)
        sample_n = tl.load(ids_ptr + rows_n * 3 + 1, mask=mask_n, other=0)
        position_n = tl.load(ids_ptr + rows_n * 3 + 2, mask=mask_n, other=0)
    zero_nj = tl.zeros([rows_n.shape[0], group_j.shape[0]], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key,
        zero_nj + group_j[None, :],
        zero_nj + position_n[:, None],
        zero_nj + sample_n[:, None],
        zero_nj + epoch_n[:, None],
    )
    return (
        w0.to(tl.int32, bitcast=True),
        w1.to(tl.int32, bitcast=True),
        w2.to(tl.int32, bitcast=True),
        w3.to(tl.int32, bitcast=True),
    )


@triton.jit
def interleave4(t0, t1, t2, t3):
    """Four tiles [N, J] -> [N, 4J], column 4j + i from tile i."""
    pairs = tl.join(tl.join(t0, t2), tl.join(t1, t3))  # [N, J, i // 2, i % 2]
    return tl.reshape(pairs, [t0.shape[0], 4 * t0.shape[1]])


@triton.jit
def _uniform(word):
    return (((word >> 9) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _sin_turns(a):
    q = a * a
    tail = ((39.9422721862793 * q - 76.60961151123047) * q + 81.60400390625) * q - 41.341712951660156
    return (a * q) * tail + 6.2831854820251465 * a


@triton.jit
def _box_muller(radius_word, angle_word):
    r = tl.sqrt_rn(-2.0 * tl.log(_uniform(radius_word)))
    u = _uniform(angle_word)
    quarter_back = u - 0.25
    quarter_back = tl.where(quarter_back > 0.5, quarter_back - 1.0, quarter_back)
    return r * _sin_turns(tl.abs(u - 0.5) - 0.25), r * _sin_turns(0.25 - tl.abs(quarter_back))


@triton.jit
def philox_normal_tile(key, ids_ptr, rows_n, mask_n, first_column, BLOCK_C: tl.constexpr):
    """N(0, 1), fp32 [BLOCK_N, BLOCK_C], for columns first_column .. + BLOCK_C; both are multiples of 4.

    The helper of every kernel that needs noise: forward and backward call it with the same rows and get the same bits.
    """
    group_j = first_column // 4 + tl.arange(0, BLOCK_C // 4)
    w0, w1, w2, w3 = philox_tile(key, ids_ptr, rows_n, mask_n, group_j)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return interleave4(n0, n1, n2, n3)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi"])
def philox_kernel(
    out_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    n_rows,
    n_columns,
    NORMAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [N, C]: normals, or the raw words (int32, four a call)."""
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_C
    columns_c = first + tl.arange(0, BLOCK_C)
    mask_n = rows_n < n_rows
    key = load_key(seed_ptr, seed_lo, seed_hi)
    if NORMAL:
        tile = philox_normal_tile(key, ids_ptr, rows_n, mask_n, first, BLOCK_C)
    else:
        w0, w1, w2, w3 = philox_tile(key, ids_ptr, rows_n, mask_n, first // 4 + tl.arange(0, BLOCK_C // 4))
        tile = interleave4(w0, w1, w2, w3)
    offsets = rows_n[:, None] * n_columns + columns_c[None, :]
    tl.store(
        out_ptr + offsets, tile.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & (columns_c < n_columns)[None, :]
    )


# --- launcher -------------------------------------------------------------------------------------


def seed_arguments(seed: int | torch.Tensor) -> tuple[torch.Tensor | None, int, int]:
    """(seed_ptr, seed_lo, seed_hi) for a kernel. A CPU tensor is read here, at no cost; a device tensor is not."""
    if isinstance(seed, torch.Tensor) and seed.device.type != "cpu":
        return seed, 0, 0
    return (None, *seed_halves(int(seed)))


def launch_philox(out_NC: torch.Tensor, seed: int | torch.Tensor, ids_N3: torch.Tensor | None, *, normal: bool) -> None:
    n_rows, n_columns = out_NC.shape
    if out_NC.numel() == 0:
        return
    shape = launch_shape("philox", out_NC.device, out_NC.dtype)
    block_n, block_c = tile_blocks(shape.pop("TILE"), n_columns)
    grid = (triton.cdiv(n_rows, block_n), triton.cdiv(n_columns, block_c))
    philox_kernel[grid](
        out_NC, ids_N3, *seed_arguments(seed), n_rows, n_columns,
        NORMAL=normal, BLOCK_N=block_n, BLOCK_C=block_c, **shape,
    )  # fmt: skip
