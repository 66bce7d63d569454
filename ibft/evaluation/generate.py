"""Completions of a list of prompts by a model in memory, leaving the model as it was.

The loop is the project's own and not `model.generate`: that merges in whatever the model was published with (sampling,
penalties, lengths), so that "greedy" would depend on the model, and it warns about every such setting. How the next
token is chosen is the caller's: `generate` is greedy, `ibft.evaluation.engines` samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ibft.data.encode import RELEASED, encode_prompts
from ibft.data.templates import SEPARATOR, Template
from ibft.evaluation.prompts import extract_code as extract_code  # goes with `generate`

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)
Choose = Callable[[Tensor], Tensor]  # logits [B, V] -> the next ids [B, 1], on the same device
AllStopped = Callable[[Tensor], bool]  # the ids [B, 1] just chosen -> whether no row need go on


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    template: Template = RELEASED,
    progress: Progress | None = None,
) -> list[str]:
    """Complete each prompt greedily, up to EOS or `max_new_tokens` tokens.

    The prompt ids are those of training (`encode_prompts`). The model runs in evaluation mode without gradients; its
    modules' training flags, its configuration and the random number generators are the same afterwards as before.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        prompts: texts without the separator.
        max_new_tokens: length limit of a completion.
        batch_size: prompts at once, left-padded; prompts of like length go together.
        template: how a prompt is framed, as in training.
        progress: called with (prompts done, prompts in all) after each batch.

    Returns:
        The text after each prompt, in the order of the prompts, special tokens left out.

    Raises:
        ValueError: max_new_tokens or batch_size below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size: got {max_new_tokens} and {batch_size}, expected 1 or more")
    prompt_ids = encode_prompts(prompts, tokenizer, template)
    stop_ids = stop_ids_of(model, tokenizer)
    completions = [""] * len(prompts)
    # Longest first: memory runs out in the first batch or not at all.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        all_stopped = _all_have_one_of(torch.tensor(sorted(stop_ids), device=model.device), len(chosen))
        batch = [prompt_ids[i] for i in chosen]
        new_ids = continue_prompts(
            model, batch, max_new_tokens, choose=greedy, all_stopped=all_stopped, pad_id=pad_id_for(tokenizer, stop_ids)
        )
        for i, ids in zip(chosen, new_ids, strict=True):
            completions[i] = decode_new(tokenizer, before_stop(ids, stop_ids))
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return completions


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def continue_prompts(
    model: Any,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    *,
    choose: Choose,
    all_stopped: AllStopped,
    pad_id: int,
) -> list[list[int]]:
    """New ids of each prompt, all rows equally many: at most max_new_tokens, fewer where `all_stopped` says so.

    One left-padded batch in evaluation mode without gradients. A row that has stopped goes on until the others have:
    what it then adds is the caller's to cut off.
    """
    ids, mask = _left_pad(prompt_ids, pad_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    new_ids: list[Tensor] = []
    with torch.no_grad(), _evaluation_mode(model):
        while True:
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = choose(output.logits[:, -1])
            new_ids.append(ids)
            if all_stopped(ids) or len(new_ids) == max_new_tokens:
                return torch.cat(new_ids, dim=1).tolist()
            cache = output.past_key_values
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1


def stop_ids_of(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS, which training teaches, and those that the model was published with."""
    published = model.generation_config.eos_token_id
    ids = published if isinstance(published, list) else [published]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def pad_id_for(tokenizer: Any, stop_ids: set[int]) -> int:
    return next((i for i in (tokenizer.pad_token_id, *sorted(stop_ids)) if i is not None), 0)


def before_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((place for place, i in enumerate(ids) if i in stop_ids), len(ids))
    return ids[:end]


def decode_new(tokenizer: Any, ids: list[int]) -> str:
    """Text of `ids` as it stands after the separator: alone, a SentencePiece-like tokenizer drops its first space."""
    separator = tokenizer([SEPARATOR], add_special_tokens=False)["input_ids"][0]
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (separator, separator + ids)
    )
    return whole.removeprefix(before)


def _all_have_one_of(stop: Tensor, rows: int) -> AllStopped:
    stopped = torch.zeros(rows, 1, dtype=torch.bool, device=stop.device)

    def all_stopped(ids: Tensor) -> bool:
        stopped.logical_or_(torch.isin(ids, stop))
        return bool(stopped.all())

    return all_stopped


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within, each module's own training flag restored after: they need not all be equal."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _left_pad(sequences: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, T] int64."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask
