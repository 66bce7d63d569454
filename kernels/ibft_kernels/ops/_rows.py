"""Checks and row views that every op with sample-keyed noise shares: one place decides what a legal argument is.

Legend: N rows (tokens: all leading dimensions flattened), C columns.
"""

from __future__ import annotations

import torch

__all__ = ["as_rows", "check_seed", "draw_seed", "rows_of_ids", "seed_halves"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_seed(seed: int | torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless `seed` is a 64-bit int, signed or not, or an int64 tensor [1] on the CPU or `device`."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected an int or a one-element int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        if seed.device.type != "cpu" and seed.device != device:
            raise ValueError(f"seed: expected a tensor on the CPU or {device}, got {seed.device}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an int or a one-element int64 tensor, got {type(seed).__name__}")
    elif not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")


def draw_seed() -> int:
    """63 bits from torch's CPU generator: `torch.manual_seed` governs it, and no device is synchronised."""
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64))


def seed_halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits, each as a signed int: one kernel signature (i32, i32) whatever the seed."""
    return _signed32(seed), _signed32(seed >> 32)


def _signed32(word: int) -> int:
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def rows_of_ids(noise_ids: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """`noise_ids` [*shape, 3] as contiguous [N, 3], None as None. ValueError on a wrong shape, dtype or device."""
    if noise_ids is None:
        return None
    if noise_ids.dtype != torch.int32:
        raise ValueError(f"noise_ids: expected torch.int32, got {noise_ids.dtype}")
    if noise_ids.shape != (*shape, 3):
        raise ValueError(f"noise_ids: expected shape {(*shape, 3)}, got {tuple(noise_ids.shape)}")
    if noise_ids.device != device:
        raise ValueError(f"noise_ids: expected device {device}, got {noise_ids.device}")
    return noise_ids.reshape(-1, 3).contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [N, C] with adjacent columns. A half of a [..., 2C] tensor stays a view, with its row stride."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns) if columns else x.reshape(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or columns <= 1 else rows.contiguous()
