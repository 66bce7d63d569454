"""The latent head folded into one matrix, by associativity:

    head(z W_up^T + b_up) = z (W_head W_up)^T + (W_head b_up + b_head) = z M^T + c

so its cross-entropy costs M Z V a product and not M D V, and is the same `linear_cross_entropy`. The fold itself costs
D Z V, and so does its backward, dW_up = W_head^T dM: from some number of rows on it pays. In multiply-adds a step, with
gradients for z and the up-projection,

    direct  2 M D V          folded  2 D Z V + 3 M Z V

The folded way also moves M [V, Z] and its gradient several times, so it has to need `MARGIN` times fewer.

The gradients dM and dc of all micro-batches of an optimizer step add up in fp32 before one backward through the fold.
No gradient is filtered out by size: an untrained latent head is near uniform, and its whole signal is small.

Legend: M labelled rows, D hidden size, Z latent size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._rows import FLOATS
from .linear_cross_entropy import linear_cross_entropy

__all__ = ["FoldedHead", "fold_head", "fold_pays", "folded_cross_entropy"]


def fold_pays(rows: int, hidden_size: int, latent_dim: int, *, gradients: bool = True) -> bool:
    """Whether folding is faster than the direct way, for all rows that share one fold: by counts and `MARGIN`."""
    D, Z = hidden_size, latent_dim
    folded, direct = (2 * D * Z + 3 * rows * Z, 2 * rows * D) if gradients else (D * Z + rows * Z, rows * D)
    return MARGIN * folded < direct


# On a CPU both ways took the same time where the counts stood at 1.15 (D 1024, Z 256) and 1.5 (D 256, Z 64).
MARGIN = 1.25


def check_fold(
    head_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    head_bias: torch.Tensor | None,
) -> None:
    """Raise ValueError (got / expected) unless the up-projection leads into the head."""
    if head_weight.dim() != 2 or head_weight.dtype not in FLOATS:
        raise ValueError(f"head_weight: expected [V, D], got {head_weight.dtype} of shape {tuple(head_weight.shape)}")
    if up_weight.dim() != 2:
        raise ValueError(f"up_weight: expected [{head_weight.shape[1]}, Z], got {tuple(up_weight.shape)}")
    for name, tensor, shape in (
        ("up_weight", up_weight, (head_weight.shape[1], up_weight.shape[1])),
        ("up_bias", up_bias, head_weight.shape[1:]),
        ("head_bias", head_bias, head_weight.shape[:1]),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != head_weight.device or tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name}: expected a floating tensor on {head_weight.device}, got {tensor.dtype} on {tensor.device}"
            )


def up_project(z: torch.Tensor, up_weight: torch.Tensor, up_bias: torch.Tensor | None) -> torch.Tensor:
    """The direct way: z W_up^T + b_up [..., D] in z's dtype, in an autocast region too."""
    with torch.autocast(z.device.type, enabled=False):
        return F.linear(z, up_weight.to(z.dtype), None if up_bias is None else up_bias.to(z.dtype))


def fold_head(
    head_weight: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    head_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """M = W_head W_up and c = W_head b_up + b_head, under autograd.

    Args:
        head_weight: [V, D], whose dtype is that of the product and of M.
        up_weight: [D, Z]. up_bias: [D] or None. head_bias: [V] or None.

    Returns:
        weight [V, Z]; bias [V], in fp32 (float64 for float64), or None where neither bias is given.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    check_fold(head_weight, up_weight, up_bias, head_bias)
    exact = torch.float64 if head_weight.dtype == torch.float64 else torch.float32
    with torch.autocast(head_weight.device.type, enabled=False):  # the dtype is the head's, not a region's
        weight_VZ = head_weight @ up_weight.to(head_weight.dtype)
        bias_V = None
        if up_bias is not None:
            bias_V = (head_weight @ up_bias.to(head_weight.dtype)).to(exact)
        if head_bias is not None:
            bias_V = head_bias.to(exact) if bias_V is None else bias_V + head_bias
    return weight_VZ, bias_V


class FoldedHead:
    """`fold_head` made once for all micro-batches of an optimizer step.

        folded = FoldedHead(head.weight, up.weight, up.bias)
        for batch in micro_batches:
            linear_cross_entropy(z, folded.weight, labels, bias=folded.bias, normalizer=...).backward()
        folded.backward()          # one product for the gradients of up (and of a trainable head)

    weight [V, Z] and bias [V] are leaves; their `.grad` accumulates in fp32, whatever the weight's dtype.
    """

    def __init__(
        self,
        head_weight: torch.Tensor,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None = None,
        head_bias: torch.Tensor | None = None,
    ) -> None:
        weight_VZ, bias_V = fold_head(head_weight, up_weight, up_bias, head_bias)
        self._graph: list[torch.Tensor] | None = [t for t in (weight_VZ, bias_V) if t is not None]
        self.weight = _leaf(weight_VZ)
        self.bias = None if bias_V is None else _leaf(bias_V)

    def backward(self) -> None:
        """Send what arrived in the leaves' `.grad` through the fold; nothing where nothing arrived.

        Raises:
            RuntimeError: called a second time.
        """
        if self._graph is None:
            raise RuntimeError("this fold's gradients were sent already: make one FoldedHead for each optimizer step")
        leaves = [leaf for leaf in (self.weight, self.bias) if leaf is not None]
        arrived = [
            (made, leaf.grad.to(made.dtype))
            for made, leaf in zip(self._graph, leaves, strict=True)
            if made.requires_grad and leaf.grad is not None
        ]
        self._graph = None
        if arrived:
            torch.autograd.backward([made for made, _ in arrived], [grad for _, grad in arrived])


def _leaf(made: torch.Tensor) -> torch.Tensor:
    leaf = made.detach().requires_grad_(made.requires_grad)
    if leaf.requires_grad and leaf.dtype != torch.float64:
        leaf.grad_dtype = torch.float32
    return leaf


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
    """Cross-entropy of head(z W_up^T + b_up) in one stateless call.

    Args:
        z: [..., Z], in head_weight's dtype. up_weight: [D, Z]. up_bias: [D] or None. head_weight: [V, D].
        labels: int64 [...], or [M] with `rows`, as in `linear_cross_entropy`.
        fold: True, False, or None for whichever is faster at this number of rows (`fold_pays`). A loop that has
            several micro-batches an optimizer step makes one `FoldedHead` instead.
        options: rows, ignore_index, reduction, normalizer, chunk_bytes and backend of `linear_cross_entropy`.

    Returns:
        as `linear_cross_entropy`.

    Raises:
        ValueError: a wrong shape, dtype, device or range.
    """
    if fold is None:
        trains = torch.is_grad_enabled() and (z.requires_grad or up_weight.requires_grad)
        fold = fold_pays(labels.numel(), *up_weight.shape, gradients=trains)
    if fold:
        weight, bias = fold_head(head_weight, up_weight, up_bias, head_bias)
        return linear_cross_entropy(z, weight, labels, bias=bias, **options)
    check_fold(head_weight, up_weight, up_bias, head_bias)
    return linear_cross_entropy(up_project(z, up_weight, up_bias), head_weight, labels, bias=head_bias, **options)
