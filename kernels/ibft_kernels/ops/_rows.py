"""Checks and row views that every op with sample-keyed noise shares: one place decides what a legal argument is. And
the one product of 16-bit factors that is not rounded to 16 bits.

Legend: N rows (tokens: all leading dimensions flattened), C columns.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "as_normalizer",
    "as_rows",
    "check_seed",
    "draw_seed",
    "join_seed",
    "product",
    "rows_of_ids",
    "seed_halves",
    "split_seed",
]

SEED_SCHEMA = "Tensor? seed_tensor, int seed"  # how every registered op takes a seed: `split_seed` makes the pair
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


def draw_seed() -> torch.Tensor:
    """63 bits from torch's CPU generator, a CPU tensor [1]: `torch.manual_seed` governs it, no device is synchronised,
    and a compiled graph draws anew in each call.
    """
    return torch.randint(0, (1 << 63) - 1, (1,), dtype=torch.int64, device="cpu")


def split_seed(seed: int | torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """A checked seed as the arguments of a registered op: (tensor, 0), or (None, the 64 bits as a signed int)."""
    if isinstance(seed, torch.Tensor):
        return seed, 0
    return None, seed - (1 << 64) if seed >= 1 << 63 else seed


def join_seed(seed_tensor: torch.Tensor | None, seed: int) -> int | torch.Tensor:
    return seed if seed_tensor is None else seed_tensor


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


def as_normalizer(normalizer: float | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a mean divides by, as a tensor [1] without a gradient. ValueError unless one finite number >= 0; a tensor's
    value is not read.
    """
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1 or normalizer.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"normalizer: expected a one-element tensor on {device} or cpu, "
                f"got shape {tuple(normalizer.shape)} on {normalizer.device}"
            )
        return normalizer.detach().reshape(1).to(device, dtype)
    if not torch.compiler.is_compiling() and not (math.isfinite(normalizer) and normalizer >= 0):
        raise ValueError(f"normalizer: expected a finite number >= 0, got {normalizer}")
    return torch.full((1,), float(normalizer), dtype=dtype, device=device)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`: of 16-bit factors, accumulated in fp32 and rounded once at most.

    Into a given tensor: autocast would round the factors of a product that makes its own.
    """
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    if dtype != a.dtype and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)
