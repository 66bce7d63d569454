"""The variational bottleneck of IB-FT (arXiv 2510.16022, eq. 4): an encoder q(z | h), a sample z, and a way back to D.

Legend: B batch, T positions, D hidden size, Z latent size.

    mu, logvar = encoder(h)              one [2Z, D] product: mu rows first, then logvar rows
    z          = mu + exp(clamp(logvar) / 2) * eps
    KL         = KL(q(z | h) || N(0, I))
    h'         = z W_up^T + b_up         what the frozen lm_head reads: no final norm, no layers above
"""

from typing import Literal

import torch
from torch import nn

from ibft.priors import LearnedDiagonalPrior, MixturePrior
from ibft_kernels import Latent, ib_bottleneck_latent, ib_kl_loss

LOGVAR_RANGE = (-4.0, 4.0)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region that this code runs in, None outside one."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class InformationBottleneck(nn.Module):
    """Encoder and up-projection, fp32 masters with `nn.Linear` initialisation; runs under autocast like any module.

    Args:
        hidden_size: D of the tapped hidden states.
        latent_dim: Z.
        encoder: "linear" (the released code), "mlp" (the paper's words: Linear, GELU, Linear) or "random_projection"
            (frozen: mu = P h with orthonormal rows, logvar 0).
        mlp_dim: width of the mlp encoder's hidden layer; default 2Z.
        deterministic: z = mu.
        prior: None for N(0, I), or a module whose `kl(mu, logvar, z)` [N, Z] each gives nats per token [N].

    Raises:
        ValueError: a size below 1, an unknown encoder, or a projection to more dimensions than there are.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_dim: int = 256,
        encoder: Literal["linear", "mlp", "random_projection"] = "linear",
        mlp_dim: int | None = None,
        *,
        deterministic: bool = False,
        prior: LearnedDiagonalPrior | MixturePrior | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or latent_dim < 1:
            raise ValueError(f"got hidden_size {hidden_size} and latent_dim {latent_dim}, expected both >= 1")
        self.hidden_size, self.latent_dim = hidden_size, latent_dim
        self.encoder: nn.Module
        self.deterministic, self.prior = deterministic, prior
        if encoder == "linear":
            self.encoder = nn.Linear(hidden_size, 2 * latent_dim)
        elif encoder == "random_projection":
            if latent_dim > hidden_size:
                raise ValueError(f"got latent_dim {latent_dim}, expected at most hidden_size {hidden_size}")
            self.encoder = nn.Linear(hidden_size, 2 * latent_dim).requires_grad_(False)
            nn.init.zeros_(self.encoder.weight)
            nn.init.zeros_(self.encoder.bias)
            nn.init.orthogonal_(self.encoder.weight[:latent_dim])
        elif encoder == "mlp":
            width = mlp_dim or 2 * latent_dim
            self.encoder = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 2 * latent_dim))
        else:
            raise ValueError(f"got encoder {encoder!r}, expected 'linear', 'mlp' or 'random_projection'")
        self.up = nn.Linear(latent_dim, hidden_size)

    @property
    def encoder_head(self) -> nn.Linear:
        """The encoder's last layer: [2Z, D] or, for "mlp", [2Z, mlp_dim]; mu rows first, then logvar rows."""
        layer = self.encoder[-1] if isinstance(self.encoder, nn.Sequential) else self.encoder
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def fuses(self) -> bool:
        """Whether the kernels hold all of it: one layer of encoder, and N(0, I)."""
        return isinstance(self.encoder, nn.Linear) and self.prior is None

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `encoder_head` reads, from hidden states [..., D]: these, or the mlp's hidden layer."""
        hidden = hidden.to(autocast_dtype(hidden.device.type) or self.up.weight.dtype)
        return self.encoder[:-1](hidden) if isinstance(self.encoder, nn.Sequential) else hidden

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
        """Sample z and measure KL; keyword arguments as in `ib_bottleneck`."""
        features, head = self.features(hidden), self.encoder_head
        if self.deterministic:
            seed, noise_ids, eps = None, None, self.no_noise(features)
        if self.prior is None:
            return ib_bottleneck_latent(
                features, head.weight, head.bias, seed=seed, noise_ids=noise_ids, eps=eps, mask=mask,
                logvar_range=LOGVAR_RANGE, reduction=reduction, normalizer=normalizer,
            )  # fmt: skip
        mu, logvar = head(features).chunk(2, dim=-1)
        z, _ = ib_kl_loss(mu, logvar, seed=seed, noise_ids=noise_ids, eps=eps, logvar_range=LOGVAR_RANGE)
        exact = torch.promote_types(mu.dtype, torch.float32)
        with torch.autocast(mu.device.type, enabled=False):
            kl = self.prior.kl(mu.to(exact), logvar.to(exact).clamp(*LOGVAR_RANGE), z.to(exact))
        return Latent(z, reduced(kl, mask, reduction, normalizer, self.latent_dim), mu.detach(), logvar.detach())

    def no_noise(self, like: torch.Tensor) -> torch.Tensor:
        """eps = 0 [..., Z] for `like` [..., any]."""
        return like.new_zeros(*like.shape[:-1], self.latent_dim)


def reduced(
    kl: torch.Tensor,
    mask: torch.Tensor | None,
    reduction: str,
    normalizer: int | float | torch.Tensor | None,
    dims: int,
) -> torch.Tensor:
    """Nats per token [...], over `dims` dimensions, as `ib_kl_loss` reduces them."""
    counted = kl if mask is None else kl * mask
    if reduction == "none":
        return counted
    total = counted.sum()
    if reduction == "sum":
        return total
    tokens = normalizer if normalizer is not None else (kl.numel() if mask is None else mask.sum().clamp(min=1))
    return total / tokens / (dims if reduction == "mean" else 1)
