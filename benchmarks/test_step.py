"""Whole training steps of the bundled model on a CPU, in real tokens a second: ours against the loop of `plain_loop`.

A step is forward, backward, clipping and optimizer over one global batch of the bundled data: four packed rows of up to
512 tokens. The providers take turns step by step in one process, on the same samples, and what is compared is the
median of the rounds' ratios: a busy machine slows both sides of a ratio.

Layouts: `packed`, the very same rows for ours and the baseline; `padded to longest`, the step's samples a row each in
one micro-batch; `padded to 2048`, as the released code has it, every eighth sample of the step, two rows a micro-batch.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import pytest
import torch
from peak_memory import peak_mib
from result_rows import write_row
from step_case import (
    Step,
    bundled_config,
    bundled_data,
    bundled_plain_loop,
    bundled_trainer,
    check,
    step_columns,
    step_of_ours,
    step_of_plain,
    timed_ms,
)

from ibft.data.collate import Batch, collate
from ibft.data.encode import EncodedData
from ibft.data.order import epoch_order
from ibft.loop import Trainer

CPU = torch.device("cpu")
PAD_TO = 2048
WARMUP = 2
TARGET_SPEEDUP, TARGET_COST = 1.2, 0.10  # ours over plain on the same packed rows; the share that alpha > 0 adds


@dataclass
class Provider:
    name: str
    layout: str
    alpha: float
    step: Step
    batches: list[list[Batch]]
    times_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # real tokens a second of each round
    peak: float = 0.0

    def run(self, i: int) -> None:
        tokens = 0

        def step() -> None:
            nonlocal tokens
            tokens = self.step(i)

        self.times_ms.append(timed_ms(step, CPU))
        self.rates.append(1e3 * tokens / self.times_ms[-1])


@pytest.mark.timeout(3600)
def test_step(request, capsys):
    rounds = request.config.getoption("--rounds")
    config, plain_config = bundled_config(), bundled_config("ib.alpha=0")
    tokenizer, data = bundled_data(config)
    check_config = bundled_config("lora.dropout=0")
    check(
        lambda: bundled_trainer(check_config, tokenizer, data), lambda: bundled_plain_loop(check_config), rel=1e-4
    )  # the gate: a wrong step is not timed

    ours = bundled_trainer(config, tokenizer, data)
    ours_without = bundled_trainer(plain_config, tokenizer, data)
    plain, plain_without = bundled_plain_loop(config), bundled_plain_loop(plain_config)
    packed = list(packed_steps(ours, WARMUP + rounds))
    longest = [[collate_padded(samples, None)] for samples in samples_of(packed, data.train, ours)]
    padded = [
        [collate_padded(samples[i : i + 2], PAD_TO) for i in range(0, len(samples), 2)]
        for samples in (samples[::8] for samples in samples_of(packed, data.train, ours))
    ]
    alpha = config.ib.alpha
    providers = [
        Provider("ours", "packed", alpha, step_of_ours(ours, packed), packed),
        Provider("ours", "packed", 0.0, step_of_ours(ours_without, packed), packed),
        Provider("plain", "packed", alpha, step_of_plain(plain, packed), packed),
        Provider("plain", "packed", 0.0, step_of_plain(plain_without, packed), packed),
        Provider("plain", "padded to longest", alpha, step_of_plain(plain, longest), longest),
        Provider("plain", f"padded to {PAD_TO}", alpha, step_of_plain(plain, padded), padded),
    ]
    for i in range(WARMUP):
        for provider in providers:
            provider.step(i)
    for provider in providers:
        provider.peak = peak_mib(lambda step=provider.step: step(0), CPU)
    shuffle = random.Random(0)
    for r in range(rounds):
        # at random: whoever follows a step that fills and frees 2 GiB pays for fresh pages
        for provider in shuffle.sample(providers, len(providers)):
            provider.run(WARMUP + r)
    with capsys.disabled():
        report(providers)
    for provider in providers:
        record(provider, providers[0], rounds)


def packed_steps(trainer: Trainer, count: int) -> Iterator[list[Batch]]:
    """The first `count` global batches of a run, but for the partly filled one that ends an epoch."""
    epoch = 0
    while True:
        steps = list(trainer.batches(trainer.data, epoch=epoch))
        for step in steps[:-1]:
            yield step
            count -= 1
            if count == 0:
                return
        epoch += 1


def samples_of(steps: list[list[Batch]], data: EncodedData, trainer: Trainer) -> Iterator[list]:
    """The (place, sample) pairs of each step, in the epoch's order."""
    for micro_batches in steps:
        ids = torch.cat([batch.noise_ids.view(-1, 3) for batch in micro_batches])
        order = epoch_order(len(data.samples), trainer.config.runtime.seed, int(ids[0, 0]))
        yield [(place, data.samples[order[place]]) for place in ids[:, 1].unique().tolist()]


def collate_padded(samples: list, pad_to: int | None) -> Batch:
    return collate([[pair] for pair in samples], epoch=0, pad_id=0, kl_tokens="real", pad_to=pad_to)


def over(first: Provider, second: Provider) -> float:
    """How many times the second's tokens a second the first reaches: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(first.rates, second.rates, strict=True))


def report(providers: list[Provider]) -> None:
    ours, without, plain, plain_without, *_ = providers
    print(f"\n{'provider':10} {'alpha':>6} {'layout':20} {'tokens/s':>9} {'ours is':>9} {'peak MiB':>9}")
    for p in providers:
        line = f"{p.name:10} {p.alpha:6g} {p.layout:20} {median(p.rates):9.0f} {over(ours, p):8.2f}x {p.peak:9.0f}"
        print(line)
    cost = 1 / over(ours, without) - 1
    print(f"ours over plain on the same packed rows: {over(ours, plain):.2f} (target: {TARGET_SPEEDUP} or more)")
    print(f"the same without the bottleneck on either side: {over(without, plain_without):.2f}")
    print(f"alpha > 0 adds {100 * cost:.1f} % to a step of ours (target: {100 * TARGET_COST:.0f} % or less)")


def record(provider: Provider, ours: Provider, rounds: int) -> None:
    tokens = median(sum(batch.num_tokens for batch in step) for step in provider.batches)
    columns = step_columns(
        provider=provider.name,
        alpha=provider.alpha,
        model="bundled",
        layout=provider.layout,
        N=round(tokens),
        T=max(batch.input_ids.shape[1] for step in provider.batches for batch in step),
        dtype="float32",
        result="ok",
        rounds=rounds,
        tokens_per_s=f"{median(provider.rates):.1f}",
        ours_over_this=f"{over(ours, provider):.3f}",
        peak_mib=f"{provider.peak:.1f}",
    )
    write_row("step", CPU, provider.times_ms, **columns)
