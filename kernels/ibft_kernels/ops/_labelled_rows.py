"""Which rows have a label: given by the caller, or found; and how many of them a mean divides by.

Legend: N rows, M labelled rows.
"""

from __future__ import annotations

import torch

from ._rows import as_normalizer

__all__ = ["inverse_count", "labelled_rows"]


def labelled_rows(
    hidden: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None, n_columns: int, ignore_index: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(rows [M], targets [M]): the caller's, or those found in labels [...]; rows None where every row has a label.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected device {hidden.device}, got {labels.device}")
    if rows is None:
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
        labels = labels.reshape(-1).contiguous()
        found = (labels != ignore_index).nonzero().squeeze(1)
        targets = labels if found.numel() == labels.numel() else labels[found]
        _check_range(targets, n_columns, ignore_index)
        return (None if targets is labels else found), targets
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != hidden.device:
        raise ValueError(
            f"rows: expected int64 [M] on {hidden.device}, "
            f"got {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
        )
    if labels.shape != rows.shape:
        raise ValueError(f"labels: expected shape {tuple(rows.shape)}, one a row of `rows`, got {tuple(labels.shape)}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(labels, n_columns, ignore_index)
        n_rows = hidden.shape[:-1].numel()
        if rows.numel() and not (rows[0] >= 0 and rows[-1] < n_rows and bool((rows[1:] > rows[:-1]).all())):
            raise ValueError(f"rows: expected strictly increasing indices in 0 .. {n_rows - 1}, got {_brief(rows)}")
    return rows.contiguous(), labels.contiguous()


def _check_range(targets: torch.Tensor, n_columns: int, ignore_index: int) -> None:
    counted = targets[targets != ignore_index]
    if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < n_columns):
        wrong = counted[(counted < 0) | (counted >= n_columns)]
        raise ValueError(f"labels: expected 0 .. {n_columns - 1} or ignore_index {ignore_index}, got {int(wrong[0])}")


def _brief(rows: torch.Tensor) -> str:
    return str(rows.tolist() if rows.numel() <= 8 else [*rows[:4].tolist(), "...", *rows[-2:].tolist()])


def inverse_count(
    normalizer: float | torch.Tensor | None, targets: torch.Tensor, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """1 / normalizer, or 1 / labelled rows, 0-d on the targets' device; 0 where nothing is to be counted, not NaN."""
    if normalizer is None:
        count = (targets != ignore_index).sum().to(dtype)
    else:
        count = as_normalizer(normalizer, dtype, targets.device)[0]
    return torch.where(count == 0, 0.0, 1.0 / count)
