"""LoRA layers as PEFT computes them, but with one dropout mask for the readers of one input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .dropout import philox_dropout
from .ib_bottleneck import ib_bottleneck

__all__ = ["ib_lora_mlp", "lora_linear", "lora_mlp", "lora_qkv"]


def lora_linear(x: torch.Tensor, projection: Any, *, dropout: Any = None, **_: Any) -> torch.Tensor:
    """As `ibft_kernels.lora_linear`; a shadow is not looked at."""
    weight, bias, lora_a, lora_b, scaling = projection
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x.dtype).clone()
    y = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora_a is None:
        return y
    dropped = x if dropout is None else philox_dropout(x, dropout.p, seed=dropout.seed, noise_ids=dropout.noise_ids)
    return y + scaling * F.linear(F.linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def lora_qkv(
    x: torch.Tensor, q: Any, k: Any, v: Any, *, dropout: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ibft_kernels.lora_qkv`."""
    first, second, third = (lora_linear(x, projection, dropout=dropout) for projection in (q, k, v))
    return first, second, third


def lora_mlp(
    x: torch.Tensor, gate: Any, up: Any, down: Any, *, dropout: Any = None, down_dropout: Any = None, **_: Any
) -> torch.Tensor:
    """As `ibft_kernels.lora_mlp`."""
    h = F.silu(lora_linear(x, gate, dropout=dropout)) * lora_linear(x, up, dropout=dropout)
    return lora_linear(h, down, dropout=down_dropout)


def ib_lora_mlp(
    x: torch.Tensor,
    residual: torch.Tensor,
    gate: Any,
    up: Any,
    down: Any,
    encoder_weight: torch.Tensor,
    encoder_bias: torch.Tensor | None,
    *,
    dropout: Any = None,
    down_dropout: Any = None,
    shadow: Any = None,
    recompute: bool = False,
    **bottleneck: Any,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """As `ibft_kernels.ib_lora_mlp`; of the latent, z and kl."""
    hidden = residual + lora_mlp(x, gate, up, down, dropout=dropout, down_dropout=down_dropout)
    return hidden, ib_bottleneck(hidden, encoder_weight, encoder_bias, **bottleneck)
