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

from ibft_kernels import Latent, ib_bottleneck_latent

LOGVAR_RANGE = (-4.0, 4.0)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region that this code runs in, None outside one."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


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

    @property
    def encoder_head(self) -> nn.Linear:
        """The encoder's last layer: [2Z, D] or, for "mlp", [2Z, mlp_dim]; mu rows first, then logvar rows."""
        layer = self.encoder[-1] if isinstance(self.encoder, nn.Sequential) else self.encoder
        assert isinstance(layer, nn.Linear)
        return layer

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
        return ib_bottleneck_latent(
            self.features(hidden),
            self.encoder_head.weight,
            self.encoder_head.bias,
            seed=seed,
            noise_ids=noise_ids,
            eps=eps,
            mask=mask,
            logvar_range=LOGVAR_RANGE,
            reduction=reduction,
            normalizer=normalizer,
        )
