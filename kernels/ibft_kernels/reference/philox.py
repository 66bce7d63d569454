"""Philox-4x32-10 and Box-Muller, written as in the paper (Salmon et al., SC 2011): out of place, one line a step."""

from __future__ import annotations

import math

import torch

__all__ = ["noise_key", "philox_4x32", "philox_normal", "philox_words"]

MASK = 2**32 - 1


def noise_key(run_seed: int, stream: int) -> int:
    """run_seed in the low 32 bits, stream in the high 32 bits."""
    return (stream % 2**32) * 2**32 + run_seed % 2**32


def philox_4x32(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Ten rounds on four int64 tensors that hold unsigned 32-bit words; four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * 0xD2511F53  # modulo 2^64, as int64: the sign is the top bit
        product1 = c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & MASK, product0 & MASK
        high1, low1 = (product1 >> 32) & MASK, product1 & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def philox_words(
    seed: int | torch.Tensor, noise_ids: torch.Tensor, calls: int, *, backend: str = "auto"
) -> torch.Tensor:
    """Unsigned words as int64 [..., calls, 4]. (The op returns the same bits as int32.)"""
    epoch, sample, position = (noise_ids.long() & MASK).unbind(-1)
    column = torch.arange(calls, device=noise_ids.device).expand(*noise_ids.shape[:-1], calls)
    rows = [word[..., None].expand_as(column) for word in (position, sample, epoch)]
    return torch.stack(philox_4x32([column, *rows], (int(seed) & MASK, (int(seed) >> 32) & MASK)), dim=-1)


def philox_normal(
    seed: int | torch.Tensor,
    noise_ids: torch.Tensor,
    columns: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """As `ibft_kernels.philox_normal`, through float64: the exact normals of the same uniforms, then cast."""
    words = philox_words(seed, noise_ids, -(-columns // 4))
    uniforms = ((words >> 9).double() + 0.5) * 2.0**-23
    u0, u1 = uniforms.unflatten(-1, (2, 2)).unbind(-1)  # [..., calls, pair]
    radius, angle = (-2.0 * u0.log()).sqrt(), 2.0 * math.pi * u1
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.flatten(-3)[..., :columns].to(dtype)
