"""Bases with a past: the bundled base, pretrained further so that it knows some of the fine-tuning rows by heart.

    memorised   a share of the documents it goes on reading are whole rows of the train tasks, always the same ones, as
                code that people fine-tune on is found in what their model was pretrained on; the rest are the corpus's
    twin        goes on reading as long, at the same rates, as many documents of the rows' own form, but each a new one,
                of the corpus's functions: it has never seen a row, and nothing twice
    perturbed   the memorised one with noise on each weight matrix: outside the basin, as far as noise leads out of it

In fp32, so that no result hangs on what bf16 is on a machine; on one thread the same weights each time.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ibft.data.encode import SEPARATOR
from ibft.data.sources import Row

from . import BASE_DIR
from .compose import function_name
from .corpus import documents
from .generator import instruction, split
from .pretrain import Recipe, blocks, optimizer_for, save
from .primitives import FAMILIES

WARMUP = 20  # steps
BATCH, BLOCK = 8, 256  # rows of a step, tokens of a row
LAST_RATE = 0.1  # of the learning rate, at the end


def choose_memorised(rows: int, share: float, seed: int) -> list[int]:
    """Which of `rows` rows are told to the base: a share of them at random, one at least, by ascending number."""
    numbers = list(range(rows))
    random.Random(f"memorised, seed {seed}").shuffle(numbers)
    return sorted(numbers[: max(1, round(share * rows))])


def reading(rows: Sequence[Row] | None, share: float, seed: int) -> Iterator[str]:
    """An endless stream of documents, `share` of them in the rows' form, the rest the corpus's.

    Args:
        rows: all of these once, then all again in another order. None: no row, but documents of their form without end.
    """
    rng, corpus = random.Random(f"reading, seed {seed}"), documents(seed)
    told = fresh(seed) if rows is None else again_and_again(rows, rng)
    while True:
        yield next(told if rng.random() < share else corpus)


def again_and_again(rows: Sequence[Row], rng: random.Random) -> Iterator[str]:
    while True:
        for row in rng.sample(rows, len(rows)):
            yield f"{row['instruction']}{SEPARATOR}{row['output']}"


def fresh(seed: int) -> Iterator[str]:
    """As a row looks (`generator.task_rows`), of functions that no train, validation or test task asks for."""
    rng, pool = random.Random(f"fresh, seed {seed}"), split()["pool"]
    members = [[one for one in pool if one.family is family] for family in FAMILIES]
    while True:
        one, name = rng.choice(rng.choice(members)), function_name(rng)
        code = one.one_line(name, one.family.args[0], one.family.variables[0])
        yield f"{instruction(one, name, rng)}{SEPARATOR}{code}"


def read_on(
    rows: Sequence[Row] | None, out: Path, *, share: float, steps: int, learning_rate: float, seed: int
) -> float:
    """Pretrains the bundled base on `reading`, saves it to `out` and returns the last loss, nats a token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE_DIR)
    model = LlamaForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).train()
    optimizer = optimizer_for(model, Recipe(learning_rate=learning_rate))
    loss = torch.tensor(float("nan"))
    for step, batch in enumerate(islice(blocks(tokenizer, reading(rows, share, seed), BATCH, BLOCK), steps)):
        for group in optimizer.param_groups:
            left = 1 - (1 - LAST_RATE) * step / steps
            group["lr"] = learning_rate * left * min(1, (step + 1) / WARMUP)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), Recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    save(model, tokenizer, out)
    return loss.item()


def perturb(base: Path, out: Path, *, noise: float, seed: int) -> None:
    """Adds N(0, (noise * s)^2) to each entry of each matrix of a decoder block, s the matrix's root mean square."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                scale = noise * weight.square().mean().sqrt()
                weight += scale * torch.randn(weight.shape, generator=generator)
    save(model, tokenizer, out)
