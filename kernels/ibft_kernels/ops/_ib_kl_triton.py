"""Kernels and launchers of `ib_kl_loss`; the mathematics is in `ib_kl`. They know no autograd.

Forward reads mu and logvar and writes z, backward reads mu, logvar and dz and writes dmu and dlogvar, each element
once. An optional tensor is a pointer or None, and None removes its code. Lengths are plain arguments: no batch
compiles anew. (Triton does look whether Z is a multiple of 16: without that it could not vectorise.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._launch import launch_shape, tile_blocks
from .._triton import tl, triton
from ._ib_kl_spec import Spec
from ._philox_triton import load_key, philox_normal_tile, seed_arguments

__all__ = [
    "backward_triton",
    "forward_triton",
    "ib_kl_backward_kernel",
    "ib_kl_forward_kernel",
    "ib_kl_reduce_kernel",
]


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _clamped(logvar, LO: tl.constexpr, HI: tl.constexpr):
    if LO is not None:
        lo, hi = tl.full([], LO, logvar.dtype), tl.full([], HI, logvar.dtype)
        logvar = tl.minimum(tl.maximum(logvar, lo, tl.PropagateNan.ALL), hi, tl.PropagateNan.ALL)
    return logvar


@triton.jit
def _eps_tile(
    eps_ptr,
    stride_epsn,
    key,
    ids_ptr,
    rows_n,
    mask_n,
    first,
    columns_z,
    mask_nz,
    COMPUTE: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    if eps_ptr is None:
        eps = philox_normal_tile(key, ids_ptr, rows_n, mask_n, first, BLOCK_Z)
    else:
        eps = tl.load(eps_ptr + rows_n[:, None] * stride_epsn + columns_z[None, :], mask=mask_nz, other=0.0)
    return eps.to(COMPUTE)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi"])
def ib_kl_forward_kernel(
    mu_ptr,
    logvar_ptr,
    z_ptr,
    row_kl_ptr,  # [N] for reduction "none", else None
    partial_kl_ptr,  # [programs], else None
    partial_count_ptr,  # [programs] int32, where the tokens are to be counted, else None
    mask_ptr,  # uint8 [N] or None
    eps_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    n_rows,
    n_columns,
    stride_mun,
    stride_lvn,
    stride_epsn,
    COMPUTE: tl.constexpr,
    LO: tl.constexpr,  # a setting of the run, not of the batch: exact in every dtype. None: no clamp
    HI: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    program = tl.program_id(0)
    rows_n = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < n_rows
    key = load_key(seed_ptr, seed_lo, seed_hi)
    kl_n = tl.zeros([BLOCK_N], COMPUTE)
    for first in range(0, n_columns, BLOCK_Z):
        columns_z = first + tl.arange(0, BLOCK_Z)
        mask_nz = mask_n[:, None] & (columns_z < n_columns)[None, :]
        mu = tl.load(mu_ptr + rows_n[:, None] * stride_mun + columns_z[None, :], mask=mask_nz, other=0.0).to(COMPUTE)
        raw = tl.load(logvar_ptr + rows_n[:, None] * stride_lvn + columns_z[None, :], mask=mask_nz, other=0.0).to(
            COMPUTE
        )
        logvar = _clamped(raw, LO, HI)
        std = tl.exp(0.5 * logvar)
        eps = _eps_tile(eps_ptr, stride_epsn, key, ids_ptr, rows_n, mask_n, first, columns_z, mask_nz, COMPUTE, BLOCK_Z)
        z = mu + std * eps
        tl.store(z_ptr + rows_n[:, None] * n_columns + columns_z[None, :], z.to(z_ptr.dtype.element_ty), mask=mask_nz)
        # where 0 is outside the range, a padding column's clamped logvar is not 0: choose, do not rely on the load
        kl_n += tl.sum(tl.where(mask_nz, std * std + mu * mu - 1.0 - logvar, 0.0), axis=1)
    kl_n *= 0.5
    counted_n = mask_n
    if mask_ptr is not None:
        counted_n = tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0
        kl_n = tl.where(counted_n, kl_n, 0.0)
    if row_kl_ptr is not None:
        tl.store(row_kl_ptr + rows_n, kl_n, mask=mask_n)
    if partial_kl_ptr is not None:
        tl.store(partial_kl_ptr + program, tl.sum(kl_n, axis=0))
    if partial_count_ptr is not None:
        tl.store(partial_count_ptr + program, tl.sum(counted_n.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["n_partials", "n_rows", "n_columns"])
def ib_kl_reduce_kernel(
    partial_kl_ptr,
    partial_count_ptr,
    normalizer_ptr,
    kl_ptr,  # 0-d
    inverse_ptr,  # [1] = 1 / denominator
    n_partials,
    n_rows,
    n_columns,
    COMPUTE: tl.constexpr,
    DIVIDE_BY_COUNT: tl.constexpr,
    DIVIDE_BY_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds the partials in a fixed order and divides. Nothing counted: kl = 0 and no gradient, not NaN."""
    total_b = tl.zeros([BLOCK], COMPUTE)
    count_b = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_partials, BLOCK):
        offs_b = first + tl.arange(0, BLOCK)
        total_b += tl.load(partial_kl_ptr + offs_b, mask=offs_b < n_partials, other=0.0)
        if partial_count_ptr is not None:
            count_b += tl.load(partial_count_ptr + offs_b, mask=offs_b < n_partials, other=0)
    total = tl.sum(total_b, axis=0)
    denominator = tl.full([], 1.0, COMPUTE)
    if DIVIDE_BY_COUNT:
        if normalizer_ptr is not None:
            denominator = tl.load(normalizer_ptr).to(COMPUTE)
        elif partial_count_ptr is not None:
            denominator = tl.sum(count_b, axis=0).to(COMPUTE)
        else:
            denominator = n_rows.to(COMPUTE)
    if DIVIDE_BY_Z:
        denominator *= n_columns.to(COMPUTE)
    empty = denominator == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, denominator))
    tl.store(kl_ptr, total * inverse)
    tl.store(inverse_ptr, inverse)


@triton.jit(do_not_specialize=["n_rows", "seed_lo", "seed_hi"])
def ib_kl_backward_kernel(
    mu_ptr,
    logvar_ptr,
    dz_ptr,  # None: no gradient arrives through z
    dkl_ptr,  # [N] for reduction "none", [1] otherwise; None: no gradient arrives through kl
    inverse_ptr,  # [1] = 1 / denominator; None for reduction "none"
    dmu_ptr,  # None: not asked for
    dlogvar_ptr,  # None: not asked for
    mask_ptr,
    eps_ptr,
    ids_ptr,
    seed_ptr,
    seed_lo,
    seed_hi,
    n_rows,
    n_columns,
    stride_mun,
    stride_lvn,
    stride_dzn,
    stride_dn,  # of dmu and of dlogvar
    stride_epsn,
    COMPUTE: tl.constexpr,
    LO: tl.constexpr,  # a setting of the run, not of the batch: exact in every dtype. None: no clamp
    HI: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows_n < n_rows
    key = load_key(seed_ptr, seed_lo, seed_hi)
    if dkl_ptr is not None:
        if inverse_ptr is None:
            g_n = tl.load(dkl_ptr + rows_n, mask=mask_n, other=0.0)
        else:
            g_n = tl.zeros([BLOCK_N], COMPUTE) + tl.load(dkl_ptr) * tl.load(inverse_ptr)
        if mask_ptr is not None:
            g_n = tl.where(tl.load(mask_ptr + rows_n, mask=mask_n, other=0) != 0, g_n, 0.0)
    for first in range(0, n_columns, BLOCK_Z):
        columns_z = first + tl.arange(0, BLOCK_Z)
        mask_nz = mask_n[:, None] & (columns_z < n_columns)[None, :]
        out_offsets = rows_n[:, None] * stride_dn + columns_z[None, :]
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + rows_n[:, None] * stride_dzn + columns_z[None, :], mask=mask_nz, other=0.0).to(
                COMPUTE
            )
        if dmu_ptr is not None:
            dmu = tl.zeros([BLOCK_N, BLOCK_Z], COMPUTE)
            if dz_ptr is not None:
                dmu += dz
            if dkl_ptr is not None:
                mu_offsets = rows_n[:, None] * stride_mun + columns_z[None, :]
                dmu += g_n[:, None] * tl.load(mu_ptr + mu_offsets, mask=mask_nz, other=0.0).to(COMPUTE)
            tl.store(dmu_ptr + out_offsets, dmu.to(dmu_ptr.dtype.element_ty), mask=mask_nz)
        if dlogvar_ptr is not None:
            lv_offsets = rows_n[:, None] * stride_lvn + columns_z[None, :]
            raw = tl.load(logvar_ptr + lv_offsets, mask=mask_nz, other=0.0).to(COMPUTE)
            std = tl.exp(0.5 * _clamped(raw, LO, HI))
            twice = tl.zeros([BLOCK_N, BLOCK_Z], COMPUTE)
            if dz_ptr is not None:
                eps = _eps_tile(
                    eps_ptr, stride_epsn, key, ids_ptr, rows_n, mask_n, first, columns_z, mask_nz, COMPUTE, BLOCK_Z
                )
                twice += dz * eps * std
            if dkl_ptr is not None:
                twice += g_n[:, None] * (std * std - 1.0)
            dlogvar = 0.5 * twice
            if LO is not None:
                inside = (raw >= tl.full([], LO, COMPUTE)) & (raw <= tl.full([], HI, COMPUTE))
                dlogvar = tl.where(inside, dlogvar, 0.0)
            tl.store(dlogvar_ptr + out_offsets, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=mask_nz)


# --- launchers ------------------------------------------------------------------------------------


def _common(spec: Spec, mu_NZ: torch.Tensor, seed: int | torch.Tensor) -> dict[str, Any]:
    shape = launch_shape("ib_kl", mu_NZ.device, mu_NZ.dtype)
    block_n, block_z = tile_blocks(shape.pop("TILE"), mu_NZ.shape[1])
    seed_ptr, seed_lo, seed_hi = seed_arguments(seed)
    lo, hi = spec.logvar_range or (None, None)
    return {
        "seed_ptr": seed_ptr, "seed_lo": seed_lo, "seed_hi": seed_hi,
        "n_rows": mu_NZ.shape[0], "n_columns": mu_NZ.shape[1],
        "COMPUTE": tl.float64 if mu_NZ.dtype == torch.float64 else tl.float32,
        "LO": lo, "HI": hi, "BLOCK_N": block_n, "BLOCK_Z": block_z, **shape,
    }  # fmt: skip


def forward_triton(
    spec: Spec, mu_NZ: torch.Tensor, logvar_NZ: torch.Tensor, seed: int | torch.Tensor, spare: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(z [N, Z], kl [N] or 0-d, 1 / denominator [1] or None). `spare`: ids, eps, mask, normalizer, each optional."""
    n_rows, n_columns = mu_NZ.shape
    device, compute = mu_NZ.device, spec.compute
    z_NZ = torch.empty(n_rows, n_columns, dtype=mu_NZ.dtype, device=device)
    mask_N, eps_NZ = spare["mask"], spare["eps"]
    common = _common(spec, mu_NZ, seed)
    programs = triton.cdiv(n_rows, common["BLOCK_N"])
    counts = mask_N is not None and spare["normalizer"] is None and spec.reduction in ("mean", "batchmean")
    row_kl_N = torch.empty(n_rows, dtype=compute, device=device) if spec.reduction == "none" else None
    partial_kl = None if spec.reduction == "none" else torch.empty(programs, dtype=compute, device=device)
    partial_count = torch.empty(programs, dtype=torch.int32, device=device) if counts else None
    if programs:
        ib_kl_forward_kernel[(programs,)](
            mu_NZ, logvar_NZ, z_NZ, row_kl_N, partial_kl, partial_count, mask_N, eps_NZ, spare["ids"],
            stride_mun=mu_NZ.stride(0), stride_lvn=logvar_NZ.stride(0),
            stride_epsn=0 if eps_NZ is None else eps_NZ.stride(0), **common,
        )  # fmt: skip
    if row_kl_N is not None:
        return z_NZ, row_kl_N, None
    kl, inverse = torch.empty((), dtype=compute, device=device), torch.empty(1, dtype=compute, device=device)
    ib_kl_reduce_kernel[(1,)](
        partial_kl, partial_count, spare["normalizer"], kl, inverse, programs, n_rows, n_columns,
        COMPUTE=common["COMPUTE"], DIVIDE_BY_COUNT=spec.reduction != "sum", DIVIDE_BY_Z=spec.reduction == "mean",
        **launch_shape("ib_kl_reduce", device, compute),
    )  # fmt: skip
    return z_NZ, kl, inverse


def backward_triton(
    spec: Spec,
    mu_NZ: torch.Tensor,
    logvar_NZ: torch.Tensor,
    seed: int | torch.Tensor,
    spare: dict[str, Any],
    dz_NZ: torch.Tensor | None,
    dkl: torch.Tensor | None,
    needs: tuple[bool, bool],
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor | None]:
    """[dmu, dlogvar], None where not needed; `out` takes them both where it is given: halves of one [N, 2Z]."""
    grads: list[torch.Tensor | None] = (
        [mu_NZ.new_empty(mu_NZ.shape) if need else None for need in needs] if out is None else list(out)
    )
    stride_dn = mu_NZ.shape[1] if out is None else out[0].stride(0)
    common = _common(spec, mu_NZ, seed)
    programs = triton.cdiv(mu_NZ.shape[0], common["BLOCK_N"])
    eps_NZ = spare["eps"]
    if programs:
        ib_kl_backward_kernel[(programs,)](
            mu_NZ, logvar_NZ, dz_NZ, dkl, spare["inverse"], *grads, spare["mask"], eps_NZ, spare["ids"],
            stride_mun=mu_NZ.stride(0), stride_lvn=logvar_NZ.stride(0),
            stride_dzn=0 if dz_NZ is None else dz_NZ.stride(0), stride_dn=stride_dn,
            stride_epsn=0 if eps_NZ is None else eps_NZ.stride(0), **common,
        )  # fmt: skip
    return grads
