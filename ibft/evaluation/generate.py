"""Greedy completions of a list of prompts, leaving the model as it was.

The loop is the project's own and not `model.generate`: that merges in whatever the model was published with (sampling,
penalties, lengths), so that "greedy" would depend on the model, and it warns about every such setting.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ibft.data.encode import SEPARATOR, encode_prompts

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)

FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
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
        progress: called with (prompts done, prompts in all) after each batch.

    Returns:
        The text after each prompt, in the order of the prompts, special tokens left out.

    Raises:
        ValueError: max_new_tokens or batch_size below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size: got {max_new_tokens} and {batch_size}, expected 1 or more")
    prompt_ids = encode_prompts(prompts, tokenizer)
    stop_ids = _stop_ids(model, tokenizer)
    pad_id = next((i for i in (tokenizer.pad_token_id, *sorted(stop_ids)) if i is not None), 0)
    completions = [""] * len(prompts)
    # Longest first: memory runs out in the first batch or not at all.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    with torch.no_grad(), _evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, attention_mask = _left_pad([prompt_ids[i] for i in chosen], pad_id)
            stop = torch.tensor(sorted(stop_ids), device=model.device)
            new_ids = _greedy(model, input_ids.to(model.device), attention_mask.to(model.device), max_new_tokens, stop)
            for i, ids in zip(chosen, new_ids.tolist(), strict=True):
                completions[i] = _decode(tokenizer, _before_stop(ids, stop_ids))
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return completions


def extract_code(completion: str) -> str:
    """The inside of the first ``` fence (to the end where it is not closed); without a fence, the text itself."""
    match = FENCE.search(completion)
    return match.group(1) if match else completion


def _greedy(model: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, stop: Tensor) -> Tensor:
    """Continue left-padded ids [B, T], mask [B, T], by [B, new] ids; new <= max_new_tokens, less if all rows stop."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stopped = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    cache = None
    new_ids: list[Tensor] = []
    while True:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        new_ids.append(ids)
        stopped |= torch.isin(ids, stop)
        if len(new_ids) == max_new_tokens or stopped.all():
            return torch.cat(new_ids, dim=1)
        cache = output.past_key_values
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS, which training teaches, and those that the model was published with."""
    published = model.generation_config.eos_token_id
    ids = published if isinstance(published, list) else [published]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


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


def _left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, T] int64."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def _before_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    end = next((place for place, i in enumerate(ids) if i in stop_ids), len(ids))
    return ids[:end]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of `ids` as it stands after the separator: alone, a SentencePiece-like tokenizer drops its first space."""
    separator = tokenizer([SEPARATOR], add_special_tokens=False)["input_ids"][0]
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (separator, separator + ids)
    )
    return whole.removeprefix(before)
