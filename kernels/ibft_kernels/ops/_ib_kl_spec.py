"""What `ib_kl_loss` accepts: every check of its arguments, and the plain values that its implementations run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._rows import FLOATS, as_normalizer, as_rows, check_seed, draw_seed, rows_of_ids

__all__ = ["Arguments", "Spec", "check_arguments"]

REDUCTIONS = ("mean", "batchmean", "sum", "none")


@dataclass(frozen=True)
class Spec:
    """What is fixed for a call: arithmetic dtype, clamp, reduction, and the implementation.

    backend: "triton" or "torch"; in `ib_bottleneck` one of its routes, "fused", "product" or "torch".
    """

    compute: torch.dtype
    logvar_range: tuple[float, float] | None
    reduction: str
    backend: str


@dataclass(frozen=True)
class Arguments:
    """Checked arguments as rows: mask_N as uint8, which every Triton version loads alike, normalizer as [1]."""

    compute: torch.dtype
    logvar_range: tuple[float, float] | None
    seed: int | torch.Tensor
    ids_N3: torch.Tensor | None
    eps_NZ: torch.Tensor | None
    mask_N: torch.Tensor | None
    normalizer: torch.Tensor | None


def check_arguments(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: int | torch.Tensor | None,
    noise_ids: torch.Tensor | None,
    eps: torch.Tensor | None,
    mask: torch.Tensor | None,
    logvar_range: tuple[float, float] | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> Arguments:
    """Raise ValueError (got / expected) on the first argument that does not fit `ib_kl_loss`."""
    if mu.dim() < 1 or mu.shape[-1] < 1:
        raise ValueError(f"mu: expected shape [..., Z] with Z >= 1, got {tuple(mu.shape)}")
    if mu.dtype not in FLOATS:
        raise ValueError(f"mu: expected a floating dtype, got {mu.dtype}")
    _same("logvar", logvar, mu.shape, mu.device)
    if logvar.dtype != mu.dtype:
        raise ValueError(f"logvar: expected mu's dtype {mu.dtype}, got {logvar.dtype}")
    if eps is not None:
        _same("eps", eps, mu.shape, mu.device)
        if eps.dtype not in FLOATS:
            raise ValueError(f"eps: expected a floating dtype, got {eps.dtype}")
        eps = as_rows(eps.detach())
    if mask is not None:
        _same("mask", mask, mu.shape[:-1], mu.device)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
        mask = mask.reshape(-1).contiguous().view(torch.uint8)
    if seed is not None:
        check_seed(seed, mu.device)
    elif eps is None:
        seed = draw_seed()
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    compute = torch.float64 if mu.dtype == torch.float64 else torch.float32
    return Arguments(
        compute=compute,
        logvar_range=_bounds(logvar_range),
        seed=0 if seed is None else seed,
        ids_N3=rows_of_ids(noise_ids, mu.shape[:-1], mu.device),
        eps_NZ=eps,
        mask_N=mask,
        normalizer=_normalizer(normalizer, reduction, compute, mu.device),
    )


def _same(name: str, tensor: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _bounds(logvar_range: tuple[float, float] | None) -> tuple[float, float] | None:
    if logvar_range is None:
        return None
    if len(logvar_range) != 2 or not logvar_range[0] <= logvar_range[1]:
        raise ValueError(f"logvar_range: expected (lo, hi) with lo <= hi, or None, got {logvar_range}")
    return float(logvar_range[0]), float(logvar_range[1])


def _normalizer(
    normalizer: float | torch.Tensor | None, reduction: str, compute: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if normalizer is None:
        return None
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"normalizer: reduction {reduction!r} divides by nothing; expected None, got {normalizer!r}")
    return as_normalizer(normalizer, compute, device)
