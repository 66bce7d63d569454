"""Steps on a random base in a process of their own, so that peaks are its own and the allocator's cache starts empty.

`StepProcess` is a comparison of one provider; as a script this file is the process, and prints what was found as JSON:

    python -m benchmarks.steps.step_process --shape codellama-7b --provider ours --length 2048 --card-gib 8

Peaks are of the whole process, the building of the model included. A card of some size is a cap on what the allocator
may take (`card`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

if __name__ == "__main__" and "unsloth" in sys.argv:
    import unsloth  # noqa: F401  before transformers, which it patches

import torch

from benchmarks.harness.comparison import is_out_of_memory
from benchmarks.harness.providers import OURS
from benchmarks.harness.timing import timed_ms
from benchmarks.steps.card import Peaks, ScriptFailed, hold_to, said_by, too_small
from benchmarks.steps.random_base import SHAPES
from benchmarks.steps.step_case import Base, dtype_of, shape_config, step_of
from benchmarks.steps.step_comparison import (
    SIDES,
    WITHOUT,
    StepComparison,
    StepFound,
    StepProvider,
    flop_per_token,
    found_of,
    step_providers,
    stopped_by_gate,
)
from benchmarks.steps.step_gate import wrong_step
from benchmarks.steps.step_rows import Rows, batches_of, random_samples

MODULE = "benchmarks.steps.step_process"
UNSLOTH = "unsloth"
NAMES = (*SIDES, UNSLOTH)
GATE = 256  # tokens


@dataclass(frozen=True)
class StepProcess(StepComparison):
    """One provider, by its name in `NAMES`, on one length and card."""

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, StepFound]:
        found = {}
        for name in names:
            provider = self.providers[name]
            if stopped := stopped_by_gate(provider, device):
                found[name] = stopped
                continue
            arguments = ["--shape", self.base.name, "--provider", name, "--length", provider.config.data.max_length,
                         "--rounds", rounds or self.rounds, "--device", device.type]  # fmt: skip
            arguments += ["--card-gib", self.card_gib] if self.card_gib else []
            try:
                found[name] = StepFound(**said_by(MODULE, *arguments))
            except ScriptFailed as error:
                found[name] = found_of(error, ours=provider.name == OURS)
        return found


def step_process(
    shape: str, name: str, length: int, card_gib: int | None, device: torch.device, *, rounds: int = 12
) -> StepProcess:
    """Samples of `length` tokens, one a step, half of it labelled; ours is gated in a process of its own."""
    base = Base.of(shape)
    config = shape_config(length)
    data = random_samples(base.sizes.vocab_size, length, 4)
    rows = Rows("one sample", batches_of(data, config))
    providers = step_providers(base, config, data, rows, data, rows)
    plain = providers["hf" + WITHOUT]
    providers[UNSLOTH] = replace(
        plain, run=partial(base.unsloth_loop, plain.config), name=UNSLOTH, package=UNSLOTH, gpu_only=True
    )
    provider = replace(
        providers[name],
        wrong=partial(gate_process, shape, name) if name.startswith(OURS) else providers[name].wrong,
        obstacle_=partial(too_small, card_gib),
    )
    return StepProcess("step", base, dtype_of(device), {name: provider}, rounds=rounds, card_gib=card_gib)


@cache
def gate_process(shape: str, name: str, device: torch.device) -> str:
    """What is wrong with ours on that shape, on the whole device; empty where nothing is. Raises OutOfMemoryError where
    it cannot be told."""
    said = said_by(MODULE, "--shape", shape, "--provider", name, "--device", device.type, "--gate")
    if said is None:
        raise torch.OutOfMemoryError
    return said


# --- the process ----------------------------------------------------------------------------------


def gate(shape: str, name: str, device: torch.device) -> str | None:
    """What is wrong with ours; None where memory does not suffice to tell."""
    base, config = Base.of(shape), shape_config(GATE, *(["ib.alpha=0"] if name.endswith(WITHOUT) else []))
    data = random_samples(base.sizes.vocab_size, GATE, 1)
    try:
        return wrong_step(base, config, data, batches_of(data, config)[0][0], device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def measured(provider: StepProvider, base: Base, device: torch.device, *, warmup: int, rounds: int) -> StepFound:
    """Out of memory, at whatever time, is an outcome with peaks."""
    peaks, found = Peaks(device), StepFound("ok", flop_per_token=flop_per_token(base, provider))
    peaks.reset()
    try:
        step = step_of(provider.run(device), provider.rows.steps)
        for i in range(warmup):
            step(i)
        for i in range(rounds):
            found.times_ms.append(timed_ms([lambda i=i: found.tokens.append(step(i))], device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = StepFound("out of memory")
    found.peaks = peaks.read()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one provider's training step on one shape.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--provider", choices=NAMES, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--card-gib", type=int, help="hold it to a card of that size, less what a context takes of it")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gate", action="store_true", help="say what is wrong with it instead of measuring")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.gate:
        print(json.dumps(gate(options.shape, options.provider, device)))
        return
    comparison = step_process(options.shape, options.provider, options.length, options.card_gib, device)
    hold_to(options.card_gib, device)
    provider = comparison.providers[options.provider]
    found = measured(provider, comparison.base, device, warmup=options.warmup, rounds=options.rounds)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
