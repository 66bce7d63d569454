"""Priors p(z) of the bottleneck beside N(0, I), and KL(q(z | h) || p) against them, in nats per token.

q(z | h) = N(mu, diag exp(logvar)). Legend: N tokens, Z latent size, K components; everything in fp32 or wider.
"""

import math

import torch
from torch import nn


class LearnedDiagonalPrior(nn.Module):
    """N(m, diag exp(s)), m and s trained; starts at N(0, I).

        KL = 1/2 sum_z [exp(logvar - s) + (mu - m)^2 exp(-s) - 1 - logvar + s]

    With a linear encoder this is N(0, I) in other coordinates, z' = (z - m) exp(-s / 2): it optimises differently and
    can express nothing more.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(latent_dim))
        self.logvar = nn.Parameter(torch.zeros(latent_dim))

    def kl(self, mu: torch.Tensor, logvar: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """mu, logvar, z [N, Z] -> [N]; exact, z is not read."""
        gap = logvar - self.logvar
        return 0.5 * (gap.exp() + (mu - self.mean).square() * (-self.logvar).exp() - 1 - gap).sum(-1)


class MixturePrior(nn.Module):
    """sum_k w_k N(m_k, diag exp(s_k)), all trained; equal weights, unit variances and means drawn from N(0, 1/4) first.

    Its KL has no closed form. One sample of z gives an unbiased estimate, which may be negative:

        log q(z | h) - log sum_k w_k N(z; m_k, exp(s_k))
    """

    def __init__(self, latent_dim: int, components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(0.5 * torch.randn(components, latent_dim))
        self.logvars = nn.Parameter(torch.zeros(components, latent_dim))

    def kl(self, mu: torch.Tensor, logvar: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """mu, logvar, z [N, Z] -> [N]; z is the sample."""
        log_q = log_normal(z, mu, logvar)
        # [N, K] from products of [N, Z] and [Z, K]: no [N, K, Z]
        precision = (-self.logvars).exp()
        distance = (
            z.square() @ precision.T - 2 * z @ (self.means * precision).T + (self.means.square() * precision).sum(-1)
        )
        log_each = -0.5 * (distance + self.logvars.sum(-1) + z.shape[-1] * math.log(2 * math.pi))
        return log_q - (self.logits.log_softmax(-1) + log_each).logsumexp(-1)


def log_normal(z: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """log N(z; mean, diag exp(logvar)), summed over the last dimension."""
    return -0.5 * ((z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


def make_prior(name: str, latent_dim: int, components: int) -> LearnedDiagonalPrior | MixturePrior | None:
    """Of `ib.prior`; None for N(0, I)."""
    if name == "standard":
        return None
    return LearnedDiagonalPrior(latent_dim) if name == "learned_diagonal" else MixturePrior(latent_dim, components)
