"""The variational bottleneck of IB-FT (arXiv 2510.16022, eq. 4): an encoder q(z | h), a sample z, and a way back to D.

Legend: B batch, T positions, D hidden size, Z latent size.

    mu, logvar = encoder(h)              one [2Z, D] product: mu rows first, then logvar rows
    z          = mu + exp(clamp(logvar) / 2) * eps
    KL         = KL(q(z | h) || N(0, I))
    h'         = z W_up^T + b_up         what the frozen lm_head reads: no final norm, no layers above
"""

from typing import Literal, NamedTuple

import torch
from torch import nn

from ibft_kernels import ib_kl_loss

LOGVAR_RANGE = (-4.0, 4.0)


class Latent(NamedTuple):
    """What the bottleneck makes of hidden states [..., D]."""

    z: torch.Tensor  # [..., Z]
    kl: torch.Tensor  # nats; scalar, or [...] for reduction "none"
    mu: torch.Tensor  # [..., Z]
    logvar: torch.Tensor  # [..., Z], before the clamp


class InformationBottleneck(nn.Module):
    """Encoder and up-projection, fp32 masters with `nn.Linear` initialisation; runs under autocast like any module.

    Args:
        hidden_size: D of the tapped hidden states.
        latent_dim: Z.
        encoder: "linear" (the released code) or "mlp" (the paper's words: Linear, GELU, Linear).
        mlp_dim: width of the mlp encoder's hidden layer; default 2Z.

    Raises:
        ValueError: a size below 1, or an unknown encoder.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_dim: int = 256,
        encoder: Literal["linear", "mlp"] = "linear",
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or latent_dim < 1:
            raise ValueError(f"got hidden_size {hidden_size} and latent_dim {latent_dim}, expected both >= 1")
        self.hidden_size, self.latent_dim = hidden_size, latent_dim
        self.encoder: nn.Module
        if encoder == "linear":
            self.encoder = nn.Linear(hidden_size, 2 * latent_dim)
        elif encoder == "mlp":
            width = mlp_dim or 2 * latent_dim
            self.encoder = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 2 * latent_dim))
        else:
            raise ValueError(f"got encoder {encoder!r}, expected 'linear' or 'mlp'")
        self.up = nn.Linear(latent_dim, hidden_size)

    def encode(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [..., D] to (mu, logvar), each [..., Z]; logvar is not clamped yet."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.up.weight.dtype)
        mu, logvar = self.encoder(hidden).chunk(2, dim=-1)
        return mu, logvar

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        noise_ids: torch.Tensor | None = None,
        eps: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        reduction: Literal["mean", "batchmean", "sum", "none"] = "mean",
        normalizer: int | float | torch.Tensor | None = None,
    ) -> Latent:
        """Sample z and measure KL; keyword arguments as in `ib_kl_loss`."""
        mu, logvar = self.encode(hidden)
        z, kl = ib_kl_loss(
            mu,
            logvar,
            seed=seed,
            noise_ids=noise_ids,
            eps=eps,
            mask=mask,
            logvar_range=LOGVAR_RANGE,
            reduction=reduction,
            normalizer=normalizer,
        )
        return Latent(z, kl, mu, logvar)
