"""The whole IB-FT objective of a micro-batch (arXiv 2510.16022): L = CE + alpha (KL + beta CE_z):

    z, KL = ib_bottleneck(tapped)                           one encoder product for mu and logvar
    CE    = CE(last W_head^T + b_head, y)                   } one loop over the labelled rows, one buffer of logits,
    CE_z  = CE(z M^T + c, y),  M = W_head W_up              } one reading of the labels
    L     = CE + alpha (KL + beta CE_z)

With few rows a step, where folding does not pay, the second head reads z W_up^T + b_up and is W_head itself, in the
same loop.
Legend: N tokens, M labelled rows, D hidden size, Z latent size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._labelled_rows import inverse_count, labelled_rows
from ._rows import as_rows
from .fold import FoldedHead, check_fold, fold_head, fold_pays, up_project
from .ib_bottleneck import Latent, ib_bottleneck_latent
from .linear_cross_entropy import accumulator, check_chunk_bytes, check_head, cross_entropies

__all__ = ["Linear", "ObjectiveParts", "ib_objective"]


class Linear(NamedTuple):
    """x W^T + b: weight [out, in], bias [out] or None. A plain pair does as well."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class ObjectiveParts(NamedTuple):
    """0-d tensors in nats, all with a graph, and what the encoder made."""

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    ce_z: torch.Tensor
    latent: Latent


def ib_objective(
    last_hidden: torch.Tensor,
    tapped: torch.Tensor | Latent,
    labels: torch.Tensor,
    *,
    head: Linear,
    encoder: Linear,
    up: Linear | FoldedHead,
    alpha: float,
    beta: float,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    **bottleneck: Any,
) -> ObjectiveParts:
    """CE, KL and CE_z together.

    Args:
        last_hidden: [..., D] after the final norm. tapped: [..., D'], what the encoder reads; same leading shape. Or
            the `Latent` that `ib_bottleneck_latent` or `ib_lora_mlp` already made of it: then the encoder and the
            settings in `bottleneck` are not looked at.
        labels, rows, ignore_index: as in `linear_cross_entropy`; normalizer divides both cross-entropies.
        head: the language-model head [V, D]. encoder: [2Z, D'], mu rows first. up: the up-projection [D, Z]; or the
            step's `FoldedHead` of it and `head`, whose `backward` the caller then owes.
        alpha, beta: the weights of the bottleneck and of its cross-entropy within it.
        bottleneck: seed, noise_ids, eps, mask, logvar_range, reduction and `kl_normalizer` of `ib_bottleneck`.

    Raises:
        ValueError: a wrong shape, dtype, device or range, before the first product.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    # every check before the first product
    head, encoder = Linear(*head), Linear(*encoder)
    found, targets = labelled_rows(last_hidden, labels, rows, head.weight.shape[0], ignore_index)
    inverse = inverse_count(normalizer, targets, ignore_index, accumulator(last_hidden.dtype))
    check_head((last_hidden, *head), targets, found, last_hidden.dtype)
    check_chunk_bytes(chunk_bytes)
    read = tapped.z if isinstance(tapped, Latent) else tapped
    if read.shape[:-1] != last_hidden.shape[:-1]:
        raise ValueError(f"tapped: expected shape [*{tuple(last_hidden.shape[:-1])}, D], got {tuple(read.shape)}")
    if bottleneck.get("reduction") == "none":
        raise ValueError("reduction: expected 'mean', 'batchmean' or 'sum', got 'none'")
    if not isinstance(up, FoldedHead):
        up = Linear(*up)
        check_fold(head.weight, *up, head.bias)
    kl_normalizer = bottleneck.pop("kl_normalizer", None)
    latent = (
        tapped
        if isinstance(tapped, Latent)
        else ib_bottleneck_latent(tapped, *encoder, normalizer=kl_normalizer, backend=backend, **bottleneck)
    )

    first, second = as_rows(last_hidden), as_rows(latent.z).to(last_hidden.dtype)
    if isinstance(up, FoldedHead):
        latent_head = Linear(up.weight, up.bias)
    elif fold_pays(targets.shape[0], *up.weight.shape, gradients=torch.is_grad_enabled()):
        latent_head = Linear(*fold_head(head.weight, *up, head.bias))
    else:
        if found is not None:
            first, second, found = first.index_select(0, found), second.index_select(0, found), None
        second, latent_head = up_project(second, *up), head
    ce, ce_z = (
        total * inverse
        for total in cross_entropies(
            [(first, *head), (second, *latent_head)], found, targets,
            ignore_index=ignore_index, summed=True, chunk_bytes=chunk_bytes, backend=backend,
        )
    )  # fmt: skip
    return ObjectiveParts(ce + alpha * (latent.kl + beta * ce_z), ce, latent.kl, ce_z, latent)
