"""What the objective needs to know of a Hugging Face batch: which tokens count, and the keys of their noise.

Legend: B rows, T positions.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ibft.errors import DataError

NOISE_COLUMNS = ("noise_ids", "sample_ids")
IGNORE = -100


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raises DataError: no mapping, no ids or labels [B, T], an attention mask or noise columns of another shape."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"the data collator made a {type(batch).__name__}, expected a mapping with input_ids and labels"
        )
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            raise DataError(f"the data collator made {', '.join(batch)}: expected also {name}, a tensor [rows, tokens]")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2:
        raise DataError(f"input_ids: got shape {shape}, expected [rows, tokens]")
    expected = {"labels": shape, "attention_mask": shape, "noise_ids": (*shape, 3), "sample_ids": shape[:1]}
    for name, wanted in expected.items():
        value = batch.get(name)
        if value is not None and tuple(value.shape) != wanted:
            raise DataError(f"{name}: got shape {tuple(value.shape)}, expected {wanted} (input_ids are {shape})")


def decoder_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what the decoder does not read."""
    return {name: value for name, value in batch.items() if name not in ("labels", "use_cache", *NOISE_COLUMNS)}


def without_noise(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a plain model takes it."""
    return {name: value for name, value in batch.items() if name not in NOISE_COLUMNS}


def kl_mask_of(batch: Mapping[str, Any], tokens: Literal["real", "response"]) -> Tensor:
    """[B, T] bool. real: what the attention mask shows, all where there is none; response: what predicts a label."""
    if tokens == "response":
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        return following != IGNORE
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def noise_ids_of(batch: Mapping[str, Any], *, epoch: int, step: int, first_row: int) -> Tensor:
    """[B, T, 3] int32, the counter of all per-token randomness; the first of these that can be had:

        noise_ids                               the batch's own
        (epoch, sample_ids[row], position)      noise follows the sample, whatever it is batched with
        (step, first_row + row, position)       noise follows the place in the global batch

    A position counts from the row's first real token: padding on the left moves nothing.
    """
    given: Tensor | None = batch.get("noise_ids")
    samples: Tensor | None = batch.get("sample_ids")
    if given is not None:
        return given.int()
    ids: Tensor = batch["input_ids"]
    B, T = ids.shape
    position = torch.arange(T, device=ids.device).expand(B, T)
    if (mask := batch.get("attention_mask")) is not None:
        pads = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        position = (position - pads).clamp(min=0)
    time = step if samples is None else epoch
    sample = torch.arange(first_row, first_row + B, device=ids.device) if samples is None else samples
    return torch.stack((torch.full_like(position, time), sample[:, None].expand(B, T), position), dim=-1).int()
