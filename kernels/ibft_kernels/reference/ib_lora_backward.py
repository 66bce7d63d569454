"""The fused LoRA+IB backward, one product after the other; the loss itself is differentiated by autograd."""

from __future__ import annotations

import torch

from .ib_kl import ib_kl_loss

__all__ = ["ib_lora_backward"]


def ib_lora_backward(
    dhidden: torch.Tensor | None,
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    weight: torch.Tensor,
    mulogvar: torch.Tensor,
    inverse: torch.Tensor,
    lora_b: torch.Tensor | None,
    *,
    hidden: torch.Tensor | None = None,
    scaling: float = 1.0,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    inplace: bool = False,
    needs_weight: bool = False,
    needs_bias: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `ibft_kernels.ib_lora_backward`, as a plain tuple."""
    dtype, compute = mulogvar.dtype, torch.promote_types(mulogvar.dtype, torch.float32)
    pair = mulogvar.detach().to(compute).requires_grad_()
    with torch.enable_grad():
        mu, logvar = pair.chunk(2, dim=1)
        z, kl = ib_kl_loss(
            mu, logvar, seed=0 if seed is None else seed, noise_ids=noise_ids, eps=eps, mask=mask,
            logvar_range=logvar_range, reduction="none",
        )  # fmt: skip
        loss = 0.0 * pair.sum()
        if dz is not None:
            loss = loss + (z * dz.to(compute)).sum()
        if dkl is not None:
            loss = loss + (kl * (dkl if reduction == "none" else dkl * inverse[0])).sum()
    (dpair,) = torch.autograd.grad(loss, pair)

    total = dpair @ weight.to(compute)
    if dhidden is not None:
        total = total + dhidden.to(compute)
    dlora = None if lora_b is None else scaling * (total @ lora_b.to(compute))
    dweight = dpair.t() @ hidden.to(compute) if needs_weight and hidden is not None else None
    dbias = dpair.sum(dim=0) if needs_bias else None
    total = total.to(dtype if dhidden is None else dhidden.dtype)
    if inplace and dhidden is not None:
        total = dhidden.copy_(total)
    return (
        total,
        None if dlora is None else dlora.to(dtype),
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(weight.dtype),
    )
