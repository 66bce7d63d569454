"""Whole QLoRA steps on a GPU, random base of a published shape (`--shape`), one sample a step, bf16, checkpointed.

`test_step_in_turns`: ours and the baseline, with the bottleneck and without, in one process: the ratios.
`test_step_gpu`: one provider in a process of its own (`step_process`), for its memory, that of the whole process, model
included. There a card of 8, 24 or 48 GiB is a cap on what the allocator may take; running out of it is a row, not a
failure. Times of two processes are minutes apart, so no ratio is in their rows. The gate comes before any of them;
Unsloth alone has none.
"""

from functools import cache

import pytest

from benchmarks.harness.comparison import each
from benchmarks.steps.step_case import Base, dtype_of, shape_config
from benchmarks.steps.step_comparison import SIDES, StepComparison, step_providers
from benchmarks.steps.step_process import GATE, NAMES, step_process
from benchmarks.steps.step_rows import Rows, batches_of, random_samples

pytestmark = [pytest.mark.part("step"), pytest.mark.gpu]

# provider, tokens, card in GiB
WHOLE = [(name, length, None) for length in (2048, 4096) for name in NAMES]
CARDS = [(name, 2048, card_gib) for card_gib in (8, 24, 48) for name in ("ours", "hf")]


def id_of(case) -> str:
    name, length, card_gib = case
    return f"{name}-{length}-{f'{card_gib}-GiB' if card_gib else 'whole'}"


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("case", WHOLE + CARDS, ids=id_of)
def test_step_gpu(request, compare, device, case):
    name, length, card_gib = case
    compare(step_process(request.config.getoption("--shape"), name, length, card_gib, device), name)


@cache
def in_turns(shape: str, length: int, dtype) -> StepComparison:
    """All four sides hold a model each: this needs a large card; where it does not fit, a row says so."""
    base, config = Base.of(shape), shape_config(length)

    def rows(tokens: int):
        data = random_samples(base.sizes.vocab_size, tokens, 4)
        return data, Rows("one sample", batches_of(data, config))

    providers = step_providers(base, config, *rows(length), *rows(GATE))
    return StepComparison("step_turns", base, dtype, {side: providers[side] for side in SIDES}, rounds=12)


@each({"cuda": [2048, 4096]}, SIDES)
def test_step_in_turns(request, compare, device, case, provider):
    compare(in_turns(request.config.getoption("--shape"), case, dtype_of(device)), provider)
