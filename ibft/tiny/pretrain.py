"""Pretrains the bundled base model from nothing: `python -m ibft.tiny.pretrain --out DIR` (27 minutes, one CPU thread).

Its whole recipe is here: the corpus is composed while it trains (`corpus`), so there is nothing to download. Next-token
loss on blocks of whole documents, AdamW, cosine schedule, bf16 autocast; the saved weights are bf16 safetensors.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import INSTRUCTION_SHARE, documents
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. Tokens seen = steps * batch * block."""

    seed: int = 2510
    steps: int = 1600
    batch: int = 8
    block: int = 256
    layers: int = 8
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    vocab_size: int = 1024
    tokenizer_documents: int = 20_000
    instruction_share: float = INSTRUCTION_SHARE


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int = Recipe.layers) -> LlamaForCausalLM:
    """The tiny Llama, randomly initialised, with every part of a big one: grouped-query attention, a head of its own.

    Every linear has a multiple of 64 inputs, so that NF4 blocks never straddle two rows.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        initializer_range=0.05,  # Llama's 0.02 suits thousands of columns; 192 want about 1 / sqrt(192)
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def blocks(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], batch: int, block: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Packed batches, ready for the model: each row starts with a document, has EOS after each, and cuts its last.

    Yields:
        input_ids and labels [batch, block]; position_ids [batch, block], from 0 in each document; attention_mask
        [batch, 1, block, block] bool, causal within a document, so that none sees its neighbours.
    """
    causal = torch.ones(block, block, dtype=torch.bool).tril()
    while True:
        ids, owners, positions = [], [], []
        for _ in range(batch):
            row: list[int] = []
            lengths: list[int] = []
            while len(row) < block:
                document = [*tokenizer(next(texts))["input_ids"], tokenizer.eos_token_id]
                row += document
                lengths.append(len(document))
            ids.append(row[:block])
            owners.append([number for number, length in enumerate(lengths) for _ in range(length)][:block])
            positions.append([position for length in lengths for position in range(length)][:block])
        owner = torch.tensor(owners)
        input_ids = torch.tensor(ids)
        starts = torch.tensor(positions) == 0
        yield {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(starts, -100),  # nothing foretells a document's first token
            "position_ids": torch.tensor(positions),
            "attention_mask": ((owner[:, :, None] == owner[:, None, :]) & causal)[:, None],
        }


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: a norm's gain has no reason to shrink."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bf16 weights, the configuration and the tokenizer; the fp32 `model` is left as it is."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    low = LlamaForCausalLM(model.config)
    low.load_state_dict(weights, assign=True)
    low.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(recipe: Recipe, folder: Path, save_every: int = 0) -> float:
    """Train, print loss and speed, save under `folder`; with `save_every`, also under `folder/step-N`.

    Returns:
        Mean loss of the last 50 steps, nats per token.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(
        islice(documents(recipe.seed + 1, recipe.instruction_share), recipe.tokenizer_documents), recipe.vocab_size
    )
    model = build_model(tokenizer, recipe.layers)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {recipe}", flush=True)
    optimizer = optimizer_for(model, recipe)
    batches = blocks(tokenizer, documents(recipe.seed, recipe.instruction_share), recipe.batch, recipe.block)
    losses: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(islice(batches, recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            tokens = (step + 1) * recipe.batch * recipe.block
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1} loss {recent:.4f} tokens {tokens} tokens/s {tokens / seconds:.0f}", flush=True)
        if save_every and (step + 1) % save_every == 0:
            save(model, tokenizer, folder / f"step-{step + 1}")
    save(model, tokenizer, folder)
    print(f"saved {folder} after {time.perf_counter() - start:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (2048 tokens each)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--save-every", type=int, default=0, help="keep a copy each so many steps")
    arguments = parser.parse_args()
    pretrain(Recipe(seed=arguments.seed, steps=arguments.steps), arguments.out, arguments.save_every)


if __name__ == "__main__":
    main()
