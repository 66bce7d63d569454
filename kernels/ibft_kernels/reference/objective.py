"""The objective as the released code computes it: two whole heads at every position, no fold, no rows left out."""

from __future__ import annotations

from typing import Any

import torch

from .ib_bottleneck import ib_bottleneck
from .linear_cross_entropy import folded_cross_entropy, linear_cross_entropy

__all__ = ["ib_objective"]


def ib_objective(
    last_hidden: torch.Tensor,
    tapped: torch.Tensor,
    labels: torch.Tensor,
    *,
    head: tuple[torch.Tensor, torch.Tensor | None],
    encoder: tuple[torch.Tensor, torch.Tensor | None],
    up: tuple[torch.Tensor, torch.Tensor | None],
    alpha: float,
    beta: float,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    **bottleneck: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ce, kl, ce_z). Arguments as `ibft_kernels.ib_objective`, but `up` is weight and bias."""
    if rows is not None:
        full = torch.full(last_hidden.shape[:-1], ignore_index, device=labels.device).flatten()
        labels = full.index_copy(0, rows, labels).view(last_hidden.shape[:-1])
    z, kl = ib_bottleneck(tapped, *encoder, normalizer=bottleneck.pop("kl_normalizer", None), **bottleneck)
    shared: dict[str, Any] = {"ignore_index": ignore_index, "normalizer": normalizer}
    ce = linear_cross_entropy(last_hidden, head[0], labels, bias=head[1], **shared)
    ce_z = folded_cross_entropy(z, *up, head[0], labels, head_bias=head[1], **shared)
    return ce + alpha * (kl + beta * ce_z), ce, kl, ce_z
