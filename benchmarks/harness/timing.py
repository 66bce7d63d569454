"""Times of calls: CUDA events on a GPU, the wall clock elsewhere; and turns, so that what is compared meets the same
machine.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Call = Callable[[], object]
AHEAD_CYCLES = 2_000_000  # about a millisecond of a GPU's clock: launches of what follows are queued meanwhile


def timed_ms(calls: Sequence[Call], device: torch.device) -> float:
    """Mean time of a call. Results are dropped as they come.

    On a GPU each call lies between two events, behind a wait that keeps the device busy while Python launches: what is
    timed is the device, not the interpreter.
    """
    if device.type != "cuda":
        total = 0.0
        for call in calls:
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return 1e3 * total / len(calls)
    pairs = []
    for call in calls:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        before.record()
        call()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize(device)
    return sum(before.elapsed_time(after) for before, after in pairs) / len(pairs)


def take_turns(run: Mapping[str, Callable[[int], float | None]], rounds: int) -> dict[str, list[float]]:
    """ms of each round of each name; `run[name](round)` gives one, or None: that name is out, and has no times.

    The order within a round is drawn: whoever always follows a call that fills and frees gigabytes pays for its pages.
    """
    times: dict[str, list[float]] = {name: [] for name in run}
    order = random.Random(0)
    for i in range(rounds):
        for name in order.sample([*times], len(times)):
            ms = run[name](i)
            if ms is None:
                del times[name]
            else:
                times[name].append(ms)
    return times


def rounds_for(round_ms: float, seconds: float, *, least: int = 5, most: int = 60) -> int:
    """How many rounds of that length the time allows, within bounds."""
    return max(least, min(most, int(1e3 * seconds / max(round_ms, 1e-3))))


def times_as_long(these_ms: Sequence[float], ours_ms: Sequence[float]) -> float:
    """The median of the rounds' ratios: a busy moment slows both sides of a ratio."""
    return median(a / b for a, b in zip(these_ms, ours_ms, strict=True))
