"""Cross-entropy of a linear head, with all its logits (in fp32 at least)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["fold_head", "folded_cross_entropy", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """As `ibft_kernels.linear_cross_entropy`."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    h = hidden.flatten(0, -2).to(compute)
    targets = labels.flatten()
    if rows is not None:
        h = h[rows]
    logits = h @ weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses.sum()
    count = (targets != ignore_index).sum() if normalizer is None else torch.as_tensor(normalizer)
    return losses.sum() / count.to(losses) if count > 0 else losses.sum() * 0


def fold_head(
    head_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    head_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `ibft_kernels.fold_head`."""
    compute = torch.float64 if head_weight.dtype == torch.float64 else torch.float32
    W = head_weight.to(compute)
    bias = None if head_bias is None else head_bias.to(compute)
    if up_bias is not None:
        bias = W @ up_bias.to(compute) + (0 if bias is None else bias)
    return (W @ up_weight.to(compute)).to(head_weight.dtype), bias


def folded_cross_entropy(
    z: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    head_bias: torch.Tensor | None = None,
    fold: bool | None = None,
    **options,
) -> torch.Tensor:
    """As `ibft_kernels.folded_cross_entropy`: the direct way, up-projection and then the head."""
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    hidden = F.linear(z.to(compute), up_weight.to(compute), None if up_bias is None else up_bias.to(compute))
    return linear_cross_entropy(hidden, head_weight, labels, bias=head_bias, **options)
