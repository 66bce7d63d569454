"""Samples to batches, batches to optimizer steps.

Legend: B rows of a micro-batch, T their length, M label positions. A *row* is a list of samples: one, or several when
packing. All counts are taken here on the CPU, so that no training step has to ask the device for a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ibft.attention import Segments
from ibft.data.encode import EncodedData
from ibft.data.order import epoch_order, group_by_length, pack
from ibft.data.samples import Sample

KLTokens = Literal["all", "real", "response"]
IndexedSample = tuple[int, Sample]  # (place in the epoch's order, sample)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: [B, T] int64, padded on the right.
        position_ids: [B, T] int64. Packed: restart at 0 with each sample, and with the padding; else 0 .. T-1.
        attention_mask: [B, T] int64, 1 = real token; None when packed, where transformers derives the block-diagonal
            mask from position_ids (it does so only if the mask is None and there is no cache).
        label_rows: [M] int64, the flat positions b * T + t whose next token is a label, ascending.
        targets: [M] int64, that next token.
        kl_mask: [B, T] bool, positions that count in the KL term.
        noise_ids: [B, T, 3] int32, (epoch, place of the sample in the epoch's order, position in the sample): the key
            of all per-token randomness. Padding continues the positions of the row's last sample.
        segments: packed: the samples and each row's padding as segments of the flattened [B * T] tokens; else None, and
            the attention mask rules.
        num_label_tokens, num_kl_tokens: M, and the True entries of kl_mask.
        num_tokens: real tokens, padding not counted.
        embeds: [B, T, D], the ids' embeddings, where the trainer looks them up on the host (model.offload_embeddings).
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    label_rows: Tensor
    targets: Tensor
    kl_mask: Tensor
    noise_ids: Tensor
    segments: Segments | None
    num_label_tokens: int
    num_kl_tokens: int
    num_tokens: int
    embeds: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        movable = {name: value for name, value in values.items() if isinstance(value, Tensor | Segments)}
        return Batch(**values | {name: x.to(device, non_blocking=non_blocking) for name, x in movable.items()})


def collate(
    rows: Sequence[Sequence[IndexedSample]],
    *,
    epoch: int,
    pad_id: int,
    kl_tokens: KLTokens,
    pad_to: int | None = None,
    packed: bool = False,
) -> Batch:
    """Lay rows of samples side by side into one micro-batch.

    Args:
        rows: B rows; exactly one sample each unless packed.
        epoch: number of the epoch, for noise_ids.
        pad_id: id of the padding; masked by position, so it may be the EOS id.
        kl_tokens: "all" positions, padding too; "real" = no padding; "response" = the positions in label_rows.
        pad_to: length T of the rows; None = the longest row of this batch.
        packed: rows may hold several samples.

    Raises:
        ValueError: no rows, an empty row, several samples in a row when not packed, a row longer than pad_to, or
            kl_tokens="all" where the padding has no fixed length (packed, or pad_to=None): the KL term would then
            depend on how samples happen to be grouped.
    """
    if not rows or not all(rows):
        raise ValueError(f"rows: got {[len(row) for row in rows]} samples a row, expected at least one row and sample")
    if not packed and any(len(row) != 1 for row in rows):
        raise ValueError(f"rows: got {[len(row) for row in rows]} samples a row, expected one each when not packed")
    if kl_tokens not in ("all", "real", "response"):
        raise ValueError(f"kl_tokens: got {kl_tokens!r}, expected 'all', 'real' or 'response'")
    if kl_tokens == "all" and (packed or pad_to is None):
        raise ValueError(f"kl_tokens='all' needs padding to a fixed length: got packed={packed}, pad_to={pad_to}")
    lengths = [sum(len(sample.input_ids) for _, sample in row) for row in rows]
    T = max(lengths) if pad_to is None else pad_to
    if max(lengths) > T:
        raise ValueError(f"rows: got a row of {max(lengths)} tokens, expected at most pad_to = {T}")

    input_ids = torch.full((len(rows), T), pad_id)
    position_ids = torch.empty(len(rows), T, dtype=torch.int64)
    noise_ids = torch.empty(len(rows), T, 3, dtype=torch.int32)
    noise_ids[..., 0] = epoch
    label_rows: list[Tensor] = []
    targets: list[Tensor] = []
    segment_lengths: list[int] = []
    for b, row in enumerate(rows):
        start = 0
        for order_index, sample in row:
            ids = torch.tensor(sample.input_ids)
            n, labels = len(ids), torch.from_numpy(sample.label_positions())
            input_ids[b, start : start + n] = ids
            position_ids[b, start : start + n] = torch.arange(n)
            # To the end of the row: the next sample overwrites it, or else the padding goes on counting.
            noise_ids[b, start:, 1] = order_index
            noise_ids[b, start:, 2] = torch.arange(T - start)
            label_rows.append(labels + (b * T + start - 1))
            targets.append(ids[labels])
            segment_lengths.append(n)
            start += n
        # Packed padding is a segment of its own; it attends to itself only. Otherwise positions just go on.
        position_ids[b, start:] = torch.arange(T - start) + (0 if packed else start)
        if start < T:
            segment_lengths.append(T - start)

    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    flat_labels = torch.cat(label_rows)
    if kl_tokens == "response":
        kl_mask = torch.zeros(len(rows) * T, dtype=torch.bool)
        kl_mask[flat_labels] = True
        kl_mask = kl_mask.view(len(rows), T)
    else:
        kl_mask = real.clone() if kl_tokens == "real" else torch.ones_like(real)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=None if packed else real.long(),
        label_rows=flat_labels,
        targets=torch.cat(targets),
        kl_mask=kl_mask,
        noise_ids=noise_ids,
        segments=Segments.of(segment_lengths) if packed else None,
        num_label_tokens=len(flat_labels),
        num_kl_tokens=int(kl_mask.sum()),
        num_tokens=sum(lengths),
    )


def num_steps_per_epoch(
    data: EncodedData, *, micro_rows: int, accumulation: int, packing: bool, max_length: int
) -> int:
    """Optimizer steps of an epoch, the last and possibly smaller one included; the same for every epoch."""
    rows = len(pack(data.lengths, max_length)) if packing else len(data.samples)
    return -(-rows // _global_rows(micro_rows, accumulation))


def steps_of_epoch(
    data: EncodedData,
    *,
    epoch: int,
    seed: int,
    micro_rows: int,
    accumulation: int,
    packing: bool,
    max_length: int,
    kl_tokens: KLTokens,
    pad_to: int | None,
    pad_id: int,
    shuffle: bool = True,
    grouped: bool = False,
    start: int = 0,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step of an epoch.

    A step takes micro_rows * accumulation rows, so which samples meet in a step does not depend on how that product is
    split. The last step of an epoch keeps the rows that remain. No state is held: step `start` of `epoch` can be
    asked for directly, which is how a run resumes.

    Args:
        data: encoded samples.
        epoch, seed: choose the order (see `epoch_order`).
        micro_rows: rows of a micro-batch.
        accumulation: micro-batches of a step.
        packing: pack the epoch's samples into rows of `max_length` tokens; else a sample a row.
        kl_tokens, pad_to, pad_id: see `collate`.
        shuffle: False keeps the order of the data (evaluation).
        grouped: without packing, rows of like length meet in a step (see `group_by_length`).
        start: steps to leave out at the beginning.

    Raises:
        ValueError: a setting out of range, or see `collate`.
    """
    step_rows = _global_rows(micro_rows, accumulation)
    if start < 0:
        raise ValueError(f"start: got {start}, expected 0 or more")
    grouped = grouped and not packing
    order = places_of_epoch(data, epoch=epoch, seed=seed, shuffle=shuffle, rows_per_step=step_rows if grouped else None)
    packs = pack(data.lengths[order], max_length) if packing else [[place] for place in range(len(order))]
    for first in range(start * step_rows, len(packs), step_rows):
        step = [
            [(place, data.samples[order[place]]) for place in members] for members in packs[first : first + step_rows]
        ]
        yield [
            collate(
                step[i : i + micro_rows],
                epoch=epoch,
                pad_id=pad_id,
                kl_tokens=kl_tokens,
                pad_to=pad_to,
                packed=packing,
            )
            for i in range(0, len(step), micro_rows)
        ]


def places_of_epoch(
    data: EncodedData, *, epoch: int, seed: int, shuffle: bool = True, rows_per_step: int | None = None
) -> list[int]:
    """Which sample is at each place of the epoch's order. rows_per_step: those of like length meet in a step."""
    order = epoch_order(len(data.samples), seed, epoch, shuffle=shuffle)
    if rows_per_step is None or not shuffle:
        return order
    return group_by_length(order, data.lengths, rows_per_step=rows_per_step, seed=seed, epoch=epoch)


def _global_rows(micro_rows: int, accumulation: int) -> int:
    if micro_rows < 1 or accumulation < 1:
        raise ValueError(f"micro_rows and accumulation: got {micro_rows} and {accumulation}, expected 1 or more")
    return micro_rows * accumulation
