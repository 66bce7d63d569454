"""Dropout with a Philox mask: sixteen bits an element, eight columns a call."""

from __future__ import annotations

import torch

from .philox import philox_words

__all__ = ["philox_dropout"]


def philox_dropout(
    x: torch.Tensor,
    p: float,
    *,
    seed: int | torch.Tensor,
    noise_ids: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """As `ibft_kernels.philox_dropout`."""
    threshold = min(round(p * 2**16), 2**16 - 1)
    if threshold == 0:
        return x
    if noise_ids is None:
        noise_ids = default_ids(x.shape[:-1], x.device)
    columns = x.shape[-1]
    words = philox_words(seed, noise_ids, -(-columns // 8))
    halves = torch.stack([words % 2**16, words // 2**16], dim=-1).flatten(-3)[..., :columns]
    signed = torch.where(halves < 2**15, halves, halves - 2**16)
    keep = (signed >= threshold - 2**15).to(x.dtype)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(compute) * keep / (1.0 - threshold / 2**16)).to(x.dtype)


def default_ids(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """(0, 0, row number) for each row, int32 [*shape, 3]."""
    ids = torch.zeros(*shape, 3, dtype=torch.int32, device=device)
    ids[..., 2] = torch.arange(shape.numel(), device=device).view(shape)
    return ids
