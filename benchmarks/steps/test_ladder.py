"""The longest sequence that trains on a card of 8 to 80 GiB (`ladder`), ours against transformers + PEFT +
bitsandbytes with gradient checkpointing, QLoRA with the bottleneck at batch 1, random base of `--shape`."""

import pytest

from benchmarks.steps.ladder import CARDS_GIB, Rung
from benchmarks.steps.step_case import dtype_of

pytestmark = [pytest.mark.part("ladder"), pytest.mark.gpu]


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("card_gib", CARDS_GIB)
@pytest.mark.parametrize("provider", ["ours", "hf"])
def test_ladder(request, compare, device, card_gib, provider):
    compare(Rung(request.config.getoption("--shape"), provider, card_gib, dtype_of(device)), provider)
