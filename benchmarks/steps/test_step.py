"""Whole training steps of the bundled model on a CPU, in real tokens a second: ours against the loop of `plain_loop`.

A step is forward, backward, clipping and optimizer over one global batch of the bundled data: four packed rows of up to
512 tokens. `hf` takes the very same rows; `hf, padded to longest` the same samples a row each, as many a micro-batch
as make a step of like size; `released`, as the released code has it, rows padded to 2048, two of them a step, of
samples of mean length: few, since such a step takes longer than ten of the others. Targets: hf takes at least 1.2 times
as long as ours; the bottleneck adds at most 10 %.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.harness.comparison import each
from benchmarks.steps.step_case import BUNDLED, bundled_config, data_of
from benchmarks.steps.step_comparison import SIDES, StepComparison, step_providers
from benchmarks.steps.step_rows import Rows, batches_of, in_pairs, padded, regrouped, typical

pytestmark = pytest.mark.part("step")

STEPS = 8  # different ones, taken in turn
PAD_TO = 2048
PROVIDERS = (*SIDES, "hf, padded to longest", "released")


@cache
def comparison() -> StepComparison:
    config = bundled_config()
    data = data_of(config)
    packed = Rows("packed", batches_of(data, config)[:STEPS])
    groups = regrouped(packed.steps, data, config)
    longest = Rows("padded to longest", [[padded(group)] for group in groups])
    released = Rows(f"padded to {PAD_TO}", [[padded(pair, PAD_TO)] for pair in in_pairs(typical(groups, 8))])
    providers = step_providers(BUNDLED, config, data, packed, data, packed)
    hf = providers["hf"]
    providers["hf, padded to longest"] = replace(hf, rows=longest)
    providers["released"] = replace(hf, name="released", rows=released, rounds=3)
    return StepComparison("step", BUNDLED, torch.float32, providers, rounds=8)


@each({"cpu": ["bundled"]}, dict.fromkeys(PROVIDERS))
def test_step(compare, device, case, provider):
    compare(comparison(), provider)
