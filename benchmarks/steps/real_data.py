"""Whole training steps on real instruction data, in real tokens a second: what packing is worth where lengths vary.

Rows of new_codealpaca.jsonl.gz (../shared/data, or $IBFT_DATA), up to 2048 tokens long; a step is one packed row of
2048 tokens. `padded to longest` has the same samples a row each, as many a micro-batch as make a step of like size;
`released` pads rows to 2048, two a micro-batch: on a CPU two a step, of samples of mean length. On a CPU the bundled
model learns them; on a GPU a random base (`--shape`), with the bundled tokenizer's ids, of which one stands for 1.9
characters: a larger vocabulary makes 3 to 4 of it, so samples are longer here than they would be.
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.harness.providers import OURS
from benchmarks.harness.result_rows import ROOT
from benchmarks.steps.step_case import BUNDLED, Base, bundled_config, data_of, dtype_of, shape_config
from benchmarks.steps.step_comparison import SIDES, StepComparison, step_providers
from benchmarks.steps.step_rows import Rows, batches_of, in_pairs, padded, regrouped, typical

FILE = Path(os.environ.get("IBFT_DATA", ROOT.parent / "shared" / "data")) / "new_codealpaca.jsonl.gz"
T = 2048
SAMPLES, STEPS = 200, 6
PROVIDERS = (*SIDES[:2], "ours, padded to longest", "hf, padded to longest", "released")


@cache
def comparison(device, shape: str) -> StepComparison:
    on_cpu = device.type == "cpu"
    base = BUNDLED if on_cpu else Base.of(shape)
    settings = [
        f"data.path={FILE}", f"data.max_samples={SAMPLES}", "data.val_size=0", "data.packing=true",
        "train.per_device_train_batch_size=1",
    ]  # fmt: skip
    config = bundled_config(f"data.max_length={T}", *settings) if on_cpu else shape_config(T, *settings)
    data = data_of(config)
    packed = Rows("packed", batches_of(data, config)[:STEPS])
    groups = regrouped(packed.steps, data, config)
    longest = Rows("padded to longest", [[padded(group)] for group in groups])
    released = Rows(
        f"padded to {T}",
        [[padded(pair, T)] for pair in in_pairs(typical(groups, 8))] if on_cpu
        else [[padded(pair, T) for pair in in_pairs(group)] for group in groups],
    )  # fmt: skip
    sides = step_providers(base, config, data, packed, data, packed)
    providers = {side: sides[side] for side in SIDES[:2]}
    providers["ours, padded to longest"] = replace(sides[OURS], name="ours, padded", rows=longest)
    providers["hf, padded to longest"] = replace(sides["hf"], rows=longest)
    providers["released"] = replace(sides["hf"], name="released", rows=released, rounds=3)
    return StepComparison("real_data", base, dtype_of(device), providers, rounds=5)
