"""The bottleneck's sample and KL, as the formulas stand (arXiv 2510.16022 eq. 4)."""

from __future__ import annotations

import torch

from .dropout import default_ids
from .philox import philox_normal

__all__ = ["ib_kl_loss"]


def ib_kl_loss(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    *,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ibft_kernels.ib_kl_loss`."""
    compute = torch.float64 if mu.dtype == torch.float64 else torch.float32
    if eps is None:
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
        ids = default_ids(mu.shape[:-1], mu.device) if noise_ids is None else noise_ids
        eps = philox_normal(seed, ids, mu.shape[-1])
    m, lv, noise = mu.to(compute), logvar.to(compute), eps.detach().to(compute)
    if logvar_range is not None:
        lv = lv.clamp(*logvar_range)
    z = (m + torch.exp(lv / 2) * noise).to(mu.dtype)

    kl = 0.5 * (torch.exp(lv) + m**2 - 1 - lv).sum(dim=-1)
    if mask is not None:
        kl = torch.where(mask, kl, 0.0)
    if reduction == "none":
        return z, kl
    if reduction == "sum":
        return z, kl.sum()
    if normalizer is None:
        count = torch.tensor(kl.numel(), device=mu.device) if mask is None else mask.sum()
    else:
        count = torch.as_tensor(normalizer, device=mu.device)
    denominator = count.to(compute) * (mu.shape[-1] if reduction == "mean" else 1)
    return z, torch.where(denominator > 0, kl.sum() / denominator.clamp(min=torch.finfo(compute).tiny), 0.0)
