"""How long a sequence trains on a card of each size: two whole optimizer steps at batch 1, ours and the baseline.

A rung is one provider on one card, in a process of its own whose allocator is held to that card (`card`). Ours plans
its memory as a run would (gradient_checkpointing=auto with that card as `runtime.memory_budget`), and a plan is made
for a length: so every length that is tried has its own trainer. The baseline recomputes every block. As a script this
file is the process:

    python -m benchmarks.steps.ladder --shape deepseek-coder-7b --provider ours --card-gib 24
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.harness.comparison import Found, is_out_of_memory
from benchmarks.harness.providers import OURS, Provider
from benchmarks.harness.result_rows import WHERE
from benchmarks.harness.timing import timed_ms
from benchmarks.steps.card import Peaks, ScriptFailed, hold_to, said_by, too_small, usable_gib
from benchmarks.steps.random_base import SHAPES
from benchmarks.steps.step_case import Base, free, shape_config, step_of
from benchmarks.steps.step_comparison import found_of
from benchmarks.steps.step_rows import batches_of, random_samples
from ibft.config import Config

MODULE = "benchmarks.steps.ladder"
CARDS_GIB = (8, 12, 16, 24, 32, 48, 80)
STEP, MOST = 256, 65536  # tokens
STEPS = 2  # the second has the optimizer's state
LADDER_COLUMNS = (
    "op", "provider", "model", "alpha", "dtype", "card_gib", "result", "longest", "peak_mib", "peak_reserved_mib",
    "tokens_per_s", *WHERE,
)  # fmt: skip


def longest(fits: Callable[[int], bool], step: int = STEP, most: int = MOST) -> int:
    """A multiple of `step` up to `most` that fits, by doubling, then bisection; 0 where not even `step` does. It is the
    largest, or within a sixteenth of it: each try is two steps, which take long where the length is. What fits is taken
    to fit with less, too; no length is asked for twice."""
    top = most // step
    good, bad = 0, 1  # in units of step: good fits, bad is asked next
    while bad <= top and fits(bad * step):
        good, bad = bad, min(2 * bad, top) if bad < top else top + 1
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * step) else (good, middle)
    return good * step


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class RungFound(Found):
    """peaks and tokens_per_s are of the longest sequence's, the rate of its last step."""

    longest: int = 0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Rung:
    """One provider on one card."""

    shape: str
    provider: str
    card_gib: int
    dtype: torch.dtype

    bench = "ladder"
    columns = LADDER_COLUMNS
    one_thread = False

    @property
    def providers(self) -> dict[str, Provider]:
        package = None if self.provider == OURS else "transformers"
        return {self.provider: Provider(self.process, package=package, obstacle_=partial(too_small, self.card_gib))}

    def key(self, device: torch.device) -> tuple[object, ...]:
        return (self.bench, *self.row(self.provider).values(), device)

    def title(self) -> str:
        return f"longest sequence of {self.shape} on {self.card_gib} GiB"

    def row(self, name: str) -> dict[str, object]:
        alpha = f"{shape_config(STEP).ib.alpha:g}"
        return {
            "op": "ladder", "provider": name, "model": self.shape, "alpha": alpha, "dtype": str(self.dtype)[6:],
            "card_gib": self.card_gib,
        }  # fmt: skip

    def rates(self, found: RungFound, device: torch.device) -> dict[str, object]:
        if found.result != "ok":
            return {}
        return {"longest": found.longest, "tokens_per_s": f"{found.tokens_per_s:.1f}"}

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, RungFound]:
        """`rounds` plays no part."""
        try:
            return {name: self.process(device) for name in names}
        except ScriptFailed as error:
            return {name: found_of(error, ours=name == OURS) for name in names}

    def process(self, device: torch.device) -> RungFound:
        arguments = ["--shape", self.shape, "--provider", self.provider, "--card-gib", self.card_gib]
        return RungFound(**said_by(MODULE, *arguments, "--device", device.type))


# --- the process ----------------------------------------------------------------------------------


def climbed(base: Base, provider: str, card_gib: int, device: torch.device, *, most: int = MOST) -> RungFound:
    """The longest sequence that this process, held to a card already, trains."""
    found, peaks = RungFound("out of memory"), Peaks(device)

    def fits(length: int) -> bool:
        free()  # what the length before left
        peaks.reset()
        try:
            rate = trained(base, provider, settings(provider, length, usable_gib(card_gib, device)), device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        # what fits is longer than all that did before
        found.result, found.longest, found.tokens_per_s, found.peaks = "ok", length, rate, peaks.read()
        return True

    longest(fits, most=most)
    return found


def settings(provider: str, length: int, card_gib: float) -> Config:
    if provider != OURS:
        return shape_config(length)
    return shape_config(length, "train.gradient_checkpointing=auto", f"runtime.memory_budget={card_gib}")


def trained(base: Base, provider: str, config: Config, device: torch.device) -> float:
    """Tokens a second of the last of `STEPS` steps over one sample."""
    length = config.data.max_length
    data = random_samples(base.sizes.vocab_size, length, 1)
    loop = base.trainer(config, data, device) if provider == OURS else base.loop(config, device)
    step = step_of(loop, batches_of(data, config))
    times = [timed_ms([lambda i=i: step(i)], device) for i in range(STEPS)]
    return 1e3 * length / times[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="The longest sequence that one provider trains on a card.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--provider", choices=(OURS, "hf"), required=True)
    parser.add_argument("--card-gib", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--most", type=int, default=MOST, help="tokens that are not exceeded")
    options = parser.parse_args()
    device = torch.device(options.device)
    hold_to(options.card_gib, device)
    found = climbed(Base.of(options.shape), options.provider, options.card_gib, device, most=options.most)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
