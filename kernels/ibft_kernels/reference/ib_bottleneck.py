"""The bottleneck as an encoder layer and its loss, one after the other (arXiv 2510.16022 eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .ib_kl import ib_kl_loss

__all__ = ["ib_bottleneck"]


def ib_bottleneck(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
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
    """As `ibft_kernels.ib_bottleneck`."""
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    mu, logvar = F.linear(hidden, weight, bias).chunk(2, dim=-1)
    return ib_kl_loss(
        mu, logvar, seed=seed, noise_ids=noise_ids, eps=eps, mask=mask, logvar_range=logvar_range,
        reduction=reduction, normalizer=normalizer,
    )  # fmt: skip
