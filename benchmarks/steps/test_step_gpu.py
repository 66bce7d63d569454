"""Whole QLoRA steps on a GPU, random base of a published shape (`--shape`), one sample a step, bf16, checkpointed.

Each case is one provider in a process of its own (`step_process`). A card of 8, 24 or 48 GiB is a cap on what the
allocator may take; running out of it is a row, not a failure. The gate, ours against the baseline on the same bytes,
comes before any of them. Times of two cases are minutes apart, so no ratio is in their rows.
"""

import pytest

from benchmarks.steps.step_process import NAMES, step_process

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
