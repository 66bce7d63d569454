"""Inputs of ib_bottleneck."""

import torch

NAMES = ("hidden", "weight", "bias")


def problem(n: int, d: int, z: int, device, dtype=torch.float32, masters=None, spread=3.5) -> dict[str, torch.Tensor]:
    """hidden, weight and bias, with mu of order 1; a `spread` of 3.5 has a quarter of logvar clamped."""
    rows = torch.tensor([1.0, spread]).repeat_interleave(z)
    weight = torch.randn(2 * z, d, dtype=torch.float64) * rows[:, None] / d**0.5
    tensors = torch.randn(n, d, dtype=torch.float64), weight, torch.randn(2 * z, dtype=torch.float64)
    dtypes = dtype, masters or dtype, masters or dtype
    return {k: t.to(device, x).requires_grad_() for k, t, x in zip(NAMES, tensors, dtypes, strict=True)}
