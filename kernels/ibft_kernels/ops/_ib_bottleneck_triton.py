"""Kernels and launchers of the fused route of `ib_bottleneck` and `ib_lora_backward`, where the mathematics is. They
know no autograd.

Forward: a program owns a [BLOCK_N, BLOCK_Z] tile of the latent. It multiplies the hidden rows with the weight's rows
*interleaved*, mu row j beside logvar row j, so one product gives both; the accumulator's adjacent columns lie in one
thread, hence splitting them moves nothing. Sample and KL follow on the fp32 accumulator.

Backward: a program owns BLOCK_N rows. It forms dmu and dlogvar once, over all of Z, and walks hidden's columns with
them on chip; each tile of hidden's gradient may meet LoRA's B before it leaves. Few rows would leave most of a device
idle, so hidden's columns are then split between programs, and each has its part of the product with B.

An optional tensor is a pointer or None, and None removes its code. Lengths are plain arguments.
"""

from __future__ import annotations

from typing import Any

import torch

from .._launch import architecture_of, launch_shape, shapes_of
from .._triton import tl, triton
from ._ib_kl_spec import Spec
from ._ib_kl_triton import _clamped, _eps_tile, ib_kl_reduce_kernel
from ._philox_triton import load_key, seed_arguments

__all__ = [
    "backward_fused",
    "fits_on_chip",
    "forward_fused",
    "ib_bottleneck_backward_kernel",
    "ib_bottleneck_forward_kernel",
    "rank_block",
]


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi"])
def ib_bottleneck_forward_kernel(
    h_ptr,
    w_ptr,  # [2Z, D] in hidden's dtype: mu rows, then logvar rows
    b_ptr,  # [2Z] or None
    z_ptr,
    mulogvar_ptr,  # [N, 2Z], for backward
    row_kl_ptr,  # [z tiles, N] for reduction "none", else None
    partial_kl_ptr,  # [programs], else None
    partial_count_ptr,  # [programs] int32, where the tokens are to be counted, else None
    mask_ptr,  # uint8 [N] or None
    eps_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    n_rows,
    n_latent,
    n_hidden,
    stride_hn,
    stride_epsn,
    LO: tl.constexpr,
    HI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    z_tiles = tl.cdiv(n_latent, BLOCK_Z)
    tile_n, tile_z = program // z_tiles, program % z_tiles  # neighbours read the same hidden rows: L2 serves them
    rows_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tile_z * BLOCK_Z
    columns_z = first + tl.arange(0, BLOCK_Z)
    mask_n = rows_n < n_rows
    mask_nz = mask_n[:, None] & (columns_z < n_latent)[None, :]

    # past the end, rows and columns repeat the last one: the loop masks K alone, and what they give is not stored
    offs_p = tl.arange(0, 2 * BLOCK_Z)
    rows_p = tl.minimum(first + offs_p // 2, n_latent - 1) + (offs_p % 2) * n_latent
    offs_k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + tl.minimum(rows_n, n_rows - 1)[:, None] * stride_hn + offs_k[None, :]
    w_ptrs = w_ptr + rows_p.to(tl.int64)[None, :] * n_hidden + offs_k[:, None]
    acc_np = tl.zeros([BLOCK_N, 2 * BLOCK_Z], tl.float32)
    for first_k in range(0, n_hidden, BLOCK_K):
        mask_k = offs_k < n_hidden - first_k
        h_nk = tl.load(h_ptrs + first_k, mask=mask_k[None, :], other=0.0)
        w_kp = tl.load(w_ptrs + first_k, mask=mask_k[:, None], other=0.0)
        acc_np = tl.dot(h_nk, w_kp, acc_np, input_precision=PRECISION)
    if b_ptr is not None:
        acc_np += tl.load(b_ptr + rows_p).to(tl.float32)[None, :]
    mu, raw = tl.split(tl.reshape(acc_np, [BLOCK_N, BLOCK_Z, 2]))

    saved_ptrs = mulogvar_ptr + rows_n[:, None] * (2 * n_latent) + columns_z[None, :]
    tl.store(saved_ptrs, mu.to(mulogvar_ptr.dtype.element_ty), mask=mask_nz)
    tl.store(saved_ptrs + n_latent, raw.to(mulogvar_ptr.dtype.element_ty), mask=mask_nz)
    logvar = _clamped(raw, LO, HI)
    std = tl.exp(0.5 * logvar)
    key = load_key(seed_ptr, seed_lo, seed_hi)
    eps = _eps_tile(eps_ptr, stride_epsn, key, ids_ptr, rows_n, mask_n, first, columns_z, mask_nz, tl.float32, BLOCK_Z)
    z = mu + std * eps
    tl.store(z_ptr + rows_n[:, None] * n_latent + columns_z[None, :], z.to(z_ptr.dtype.element_ty), mask=mask_nz)

    kl_n = 0.5 * tl.sum(tl.where(mask_nz, std * std + mu * mu - 1.0 - logvar, 0.0), axis=1)
    counted_n = mask_n
    if mask_ptr is not None:
        counted_n = tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0
        kl_n = tl.where(counted_n, kl_n, 0.0)
    if row_kl_ptr is not None:
        tl.store(row_kl_ptr + tile_z.to(tl.int64) * n_rows + rows_n, kl_n, mask=mask_n)
    if partial_kl_ptr is not None:
        # summed as a row: Triton 3.6 cannot compile a rank-1 sum of what comes from tensor memory (sm_100)
        tl.store(partial_kl_ptr + program + tl.arange(0, 1), tl.sum(kl_n[None, :], axis=1))
    if partial_count_ptr is not None:  # a token counts once, not once a tile
        tl.store(partial_count_ptr + program, tl.where(tile_z == 0, tl.sum(counted_n.to(tl.int32), axis=0), 0))


@triton.jit(do_not_specialize=["n_rows", "split_tiles", "seed_lo", "seed_hi"])
def ib_bottleneck_backward_kernel(
    mulogvar_ptr,
    dz_ptr,  # None: no gradient arrives through z
    dkl_ptr,  # [N] for reduction "none", [1] otherwise; None: no gradient arrives through kl
    inverse_ptr,  # [1] = 1 / denominator; None for reduction "none"
    w_ptr,
    g_ptr,  # hidden's gradient from elsewhere, which is added; may be dh. None: nothing
    dh_ptr,  # None: not asked for
    lora_ptr,  # LoRA's B [D, R] in hidden's dtype, or None
    dlora_ptr,  # [splits, N, R], a part from each split
    dmulogvar_ptr,  # [N, 2Z], what the weight's gradient needs; None: not asked for
    mask_ptr,
    eps_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    n_rows,
    n_latent,
    n_hidden,
    n_rank,
    split_tiles,  # a program's share of hidden's columns, in BLOCK_D
    stride_dzn,
    stride_gn,
    stride_dhn,
    stride_epsn,
    scaling,  # LoRA's
    LO: tl.constexpr,
    HI: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,  # >= Z
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # >= R
):
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_z = tl.arange(0, BLOCK_Z)
    mask_n = rows_n < n_rows
    mask_nz = mask_n[:, None] & (columns_z < n_latent)[None, :]
    pair_offsets = rows_n[:, None] * (2 * n_latent) + columns_z[None, :]

    # a masked load's 0 makes both gradients 0: columns past Z add nothing to the product
    raw = tl.load(mulogvar_ptr + pair_offsets + n_latent, mask=mask_nz, other=0.0).to(tl.float32)
    std = tl.exp(0.5 * _clamped(raw, LO, HI))
    dmu = tl.zeros([BLOCK_N, BLOCK_Z], tl.float32)
    twice = tl.zeros([BLOCK_N, BLOCK_Z], tl.float32)
    if dz_ptr is not None:
        dz = tl.load(dz_ptr + rows_n[:, None] * stride_dzn + columns_z[None, :], mask=mask_nz, other=0.0)
        dmu += dz.to(tl.float32)
        key = load_key(seed_ptr, seed_lo, seed_hi)
        eps = _eps_tile(eps_ptr, stride_epsn, key, ids_ptr, rows_n, mask_n, 0, columns_z, mask_nz, tl.float32, BLOCK_Z)
        twice += dz.to(tl.float32) * eps * std
    if dkl_ptr is not None:
        if inverse_ptr is None:
            g_n = tl.load(dkl_ptr + rows_n, mask=mask_n, other=0.0)
        else:
            g_n = tl.zeros([BLOCK_N], tl.float32) + tl.load(dkl_ptr) * tl.load(inverse_ptr)
        if mask_ptr is not None:
            g_n = tl.where(tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0, g_n, 0.0)
        dmu += g_n[:, None] * tl.load(mulogvar_ptr + pair_offsets, mask=mask_nz, other=0.0).to(tl.float32)
        twice += g_n[:, None] * (std * std - 1.0)
    dlogvar = 0.5 * twice
    if LO is not None:
        inside = (raw >= tl.full([], LO, tl.float32)) & (raw <= tl.full([], HI, tl.float32))
        dlogvar = tl.where(inside, dlogvar, 0.0)
    dmu_nz = dmu.to(mulogvar_ptr.dtype.element_ty)
    dlv_nz = dlogvar.to(mulogvar_ptr.dtype.element_ty)
    if dmulogvar_ptr is not None:  # noqa: SIM102 (chosen at compile time, the inner one is not)
        if tl.program_id(1) == 0:
            tl.store(dmulogvar_ptr + pair_offsets, dmu_nz, mask=mask_nz)
            tl.store(dmulogvar_ptr + pair_offsets + n_latent, dlv_nz, mask=mask_nz)

    if dh_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        rows_z = tl.minimum(columns_z, n_latent - 1)
        w_ptrs = w_ptr + rows_z.to(tl.int64)[:, None] * n_hidden + offs_d[None, :]
        lv_ptrs = w_ptr + (rows_z + n_latent).to(tl.int64)[:, None] * n_hidden + offs_d[None, :]
        dh_ptrs = dh_ptr + rows_n[:, None] * stride_dhn + offs_d[None, :]
        if g_ptr is not None:
            g_ptrs = g_ptr + rows_n[:, None] * stride_gn + offs_d[None, :]
        if lora_ptr is not None:
            columns_r = tl.arange(0, BLOCK_R)
            mask_r = columns_r < n_rank
            lora_ptrs = lora_ptr + offs_d.to(tl.int64)[:, None] * n_rank + columns_r[None, :]
            dlora_nr = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        # counted in tiles: the compiler then knows that every column offset is a multiple of BLOCK_D, and vectorises
        start = tl.program_id(1) * split_tiles
        for tile_d in range(start, tl.minimum(start + split_tiles, tl.cdiv(n_hidden, BLOCK_D))):
            first_d = tile_d * BLOCK_D
            mask_d = offs_d < n_hidden - first_d
            mask_nd = mask_n[:, None] & mask_d[None, :]
            w_mu_zd = tl.load(w_ptrs + first_d, mask=mask_d[None, :], other=0.0)
            w_lv_zd = tl.load(lv_ptrs + first_d, mask=mask_d[None, :], other=0.0)
            dh_nd = tl.dot(dmu_nz, w_mu_zd, input_precision=PRECISION)
            dh_nd = tl.dot(dlv_nz, w_lv_zd, dh_nd, input_precision=PRECISION)
            if g_ptr is not None:
                dh_nd += tl.load(g_ptrs + first_d, mask=mask_nd, other=0.0).to(tl.float32)
            tl.store(dh_ptrs + first_d, dh_nd.to(dh_ptr.dtype.element_ty), mask=mask_nd)
            if lora_ptr is not None:
                mask_dr = mask_d[:, None] & mask_r[None, :]
                lora_dr = tl.load(lora_ptrs + first_d.to(tl.int64) * n_rank, mask=mask_dr, other=0.0)
                low_nd = dh_nd.to(lora_ptr.dtype.element_ty)
                dlora_nr = tl.dot(low_nd, lora_dr, dlora_nr, input_precision=PRECISION)
        if lora_ptr is not None:
            split_rows_n = tl.program_id(1).to(tl.int64) * n_rows + rows_n
            dlora_ptrs = dlora_ptr + split_rows_n[:, None] * n_rank + columns_r[None, :]
            dlora_nr = (scaling * dlora_nr).to(dlora_ptr.dtype.element_ty)
            tl.store(dlora_ptrs, dlora_nr, mask=mask_n[:, None] & mask_r[None, :])


# --- launchers ------------------------------------------------------------------------------------


def fits_on_chip(device: torch.device, dtype: torch.dtype, n_latent: int, n_rank: int | None = None) -> bool:
    """Whether the fused route can run: the backward entry's BLOCK_Z is the widest latent whose gradient tiles stay on
    chip, as the AOT table shows, and its BLOCK_R the widest LoRA (n_rank None: no LoRA). float64 has no entry.
    """
    shape = shapes_of(architecture_of(device)).get(f"{_backward_entry(n_rank)}/{8 * dtype.itemsize}")
    return shape is not None and n_latent <= shape["BLOCK_Z"] and (n_rank or 0) <= shape.get("BLOCK_R", 0)


def _backward_entry(n_rank: int | None) -> str:
    return "ib_bottleneck_backward" if n_rank is None else "ib_lora_backward_fused"


def rank_block(shape: dict[str, Any], n_rank: int) -> int:
    """BLOCK_R for a LoRA of n_rank columns. It is wider than BLOCK_N: else Triton lays the warps of all three chained
    products along the rows, of which there are too few, and they repeat each other's work (fourfold, by the AOT table).
    """
    return min(shape.get("BLOCK_R", 16), max(2 * shape["BLOCK_N"], triton.next_power_of_2(n_rank)))


def _settings(spec: Spec, seed: int | torch.Tensor) -> dict[str, Any]:
    seed_ptr, seed_lo, seed_hi = seed_arguments(seed)
    lo, hi = spec.logvar_range or (None, None)
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"  # of fp32 products
    return {
        "seed_ptr": seed_ptr, "seed_lo": seed_lo, "seed_hi": seed_hi, "LO": lo, "HI": hi, "PRECISION": precision
    }  # fmt: skip


def _column_splits(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """Programs that share one row tile: enough to give every multiprocessor one, and no more than there are columns."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(column_tiles, triton.cdiv(processors, row_tiles))


def forward_fused(
    spec: Spec,
    h_ND: torch.Tensor,
    w_2ZD: torch.Tensor,
    b_2Z: torch.Tensor | None,
    seed: int | torch.Tensor,
    spare: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(z [N, Z], kl [N] or 0-d, 1 / denominator [1] or None, mu | logvar [N, 2Z]). `spare` as in `ib_kl`'s launcher."""
    (n_rows, n_hidden), n_latent, device = h_ND.shape, w_2ZD.shape[0] // 2, h_ND.device
    shape = launch_shape("ib_bottleneck_forward", device, h_ND.dtype)
    z_tiles = triton.cdiv(n_latent, shape["BLOCK_Z"])
    programs = triton.cdiv(n_rows, shape["BLOCK_N"]) * z_tiles
    mask_N, eps_NZ, by_row = spare["mask"], spare["eps"], spec.reduction == "none"
    counts = mask_N is not None and spare["normalizer"] is None and spec.reduction in ("mean", "batchmean")

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    z_NZ, mulogvar_N2Z = empty(n_rows, n_latent, dtype=h_ND.dtype), empty(n_rows, 2 * n_latent, dtype=h_ND.dtype)
    row_kl = empty(z_tiles, n_rows) if by_row else None
    partial_kl = None if by_row else empty(programs)
    partial_count = empty(programs, dtype=torch.int32) if counts else None
    if programs:
        ib_bottleneck_forward_kernel[(programs,)](
            h_ND, w_2ZD, b_2Z, z_NZ, mulogvar_N2Z, row_kl, partial_kl, partial_count, mask_N, eps_NZ, spare["ids"],
            n_rows=n_rows, n_latent=n_latent, n_hidden=n_hidden, stride_hn=h_ND.stride(0),
            stride_epsn=0 if eps_NZ is None else eps_NZ.stride(0), **_settings(spec, seed), **shape,
        )  # fmt: skip
    if row_kl is not None:
        return z_NZ, row_kl[0] if z_tiles == 1 else row_kl.sum(dim=0), None, mulogvar_N2Z
    kl, inverse = empty(), empty(1)
    ib_kl_reduce_kernel[(1,)](
        partial_kl, partial_count, spare["normalizer"], kl, inverse, programs, n_rows, n_latent,
        COMPUTE=tl.float32, DIVIDE_BY_COUNT=spec.reduction != "sum", DIVIDE_BY_Z=spec.reduction == "mean",
        **launch_shape("ib_kl_reduce", device, torch.float32),
    )  # fmt: skip
    return z_NZ, kl, inverse, mulogvar_N2Z


def backward_fused(
    spec: Spec,
    mulogvar_N2Z: torch.Tensor,
    w_2ZD: torch.Tensor,
    seed: int | torch.Tensor,
    spare: dict[str, Any],
    dz_NZ: torch.Tensor | None,
    dkl: torch.Tensor | None,
    dh_ND: torch.Tensor | None,
    *,
    g_ND: torch.Tensor | None,
    keep: bool,
    lora_DR: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write hidden's gradient, g added, to dh [N, D] (rows of any stride; None: not wanted). g may be dh itself.

    Returns dmu | dlogvar [N, 2Z] if `keep`, which the weight's gradient needs, and scaling * dh @ B [N, R] if B is
    given, contiguous; both in hidden's dtype.
    """
    n_rows, n_latent, n_hidden = mulogvar_N2Z.shape[0], w_2ZD.shape[0] // 2, w_2ZD.shape[1]
    device, dtype, eps_NZ = mulogvar_N2Z.device, mulogvar_N2Z.dtype, spare["eps"]
    n_rank = None if lora_DR is None else lora_DR.shape[1]
    dmulogvar_N2Z = torch.empty_like(mulogvar_N2Z) if keep else None
    if n_rows == 0 or (dh_ND is None and not keep):
        return dmulogvar_N2Z, None if n_rank is None else mulogvar_N2Z.new_empty(n_rows, n_rank)
    shape = launch_shape(_backward_entry(n_rank), device, dtype)
    shape["BLOCK_Z"] = min(shape["BLOCK_Z"], max(16, triton.next_power_of_2(n_latent)))
    shape["BLOCK_R"] = rank_block(shape, n_rank or 0)
    assert n_latent <= shape["BLOCK_Z"]
    assert (n_rank or 0) <= shape["BLOCK_R"]
    row_tiles = triton.cdiv(n_rows, shape["BLOCK_N"])
    column_tiles = triton.cdiv(n_hidden, shape["BLOCK_D"])
    splits = 1 if dh_ND is None else _column_splits(row_tiles, column_tiles, device)
    dlora_SNR = None
    if n_rank is not None:  # a lone split's part is the whole: rounded as it is stored
        dlora_SNR = mulogvar_N2Z.new_empty(splits, n_rows, n_rank, dtype=dtype if splits == 1 else torch.float32)
    ib_bottleneck_backward_kernel[(row_tiles, splits)](
        mulogvar_N2Z, dz_NZ, dkl, spare["inverse"], w_2ZD, g_ND, dh_ND, lora_DR, dlora_SNR, dmulogvar_N2Z,
        spare["mask"], eps_NZ, spare["ids"],
        n_rows=n_rows, n_latent=n_latent, n_hidden=n_hidden, n_rank=n_rank or 0, scaling=scaling,
        split_tiles=triton.cdiv(column_tiles, splits), stride_dzn=0 if dz_NZ is None else dz_NZ.stride(0),
        stride_gn=0 if g_ND is None else g_ND.stride(0), stride_dhn=0 if dh_ND is None else dh_ND.stride(0),
        stride_epsn=0 if eps_NZ is None else eps_NZ.stride(0), **_settings(spec, seed), **shape,
    )  # fmt: skip
    if dlora_SNR is None:
        return dmulogvar_N2Z, None
    return dmulogvar_N2Z, dlora_SNR[0] if splits == 1 else dlora_SNR.sum(dim=0).to(dtype)
