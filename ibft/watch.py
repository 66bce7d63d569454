"""Failures that the method is known for, and loss spikes, watched in the rows that a run logs: warnings that say what
to change.

over-compression    the cross-entropy rises while KL falls, or few latent dimensions stay in use
no compression      the bottleneck is next to nothing in the loss
loss spike          one step's loss is far above those before it
unstable encoder    KL shoots up: the encoder's steps are too long, and LoRA follows its gradient

Over-compression is also what the end shows: fewer tasks solved than by the base (`solves_fewer`).

Each is said once a run. The thresholds are ours, chosen on the bundled base (tests/test_watch.py trains into each).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ibft.config import Config

BLOWN_UP = 10.0  # times the first KL
RISEN = 2.0, 0.5  # times the first cross-entropy, and so many nats above it
UNUSED = 0.05  # share of latent dimensions in use
WEIGHTLESS = 0.01  # alpha KL to CE
RECENT = 3  # rows that must agree
SPIKE, SPIKE_OVER = 3.0, 5  # times the median of so many logged losses before


@dataclass
class Watch:
    """Of one run; `see` each logged row in turn."""

    config: Config
    total_steps: int
    rows: list[Mapping[str, float]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def see(self, row: Mapping[str, float]) -> list[str]:
        """row: `step`, `loss`, `ce`, and with a bottleneck `kl` and `active_dims`, as `Trainer.log` writes them;
        evaluations are passed over."""
        if "loss" not in row:
            return []
        self.rows.append(row)
        found = {"spike": self.spike()}
        if "kl" in row:
            found |= {"unstable": self.unstable(), "compressed": self.over_compressed(), "loose": self.uncompressed()}
            if found["unstable"]:
                del found["spike"]
        fresh = {name: text for name, text in found.items() if text and name not in self.said}
        self.said |= fresh.keys()
        return list(fresh.values())

    def spike(self) -> str | None:
        """The last loss against those before it."""
        before = [row["loss"] for row in self.rows[-1 - SPIKE_OVER : -1]]
        last = self.rows[-1]["loss"]
        if len(before) < SPIKE_OVER or last <= SPIKE * max(usual := median(before), 0.1):
            return None
        return f"loss spike: {last:.3g} after {usual:.3g}; look at the rows of this step, or lower train.learning_rate"

    def unstable(self) -> str | None:
        first, last = self.rows[0]["kl"], self.rows[-1]["kl"]
        if last <= BLOWN_UP * max(first, 1.0):
            return None
        ib, train = self.config.ib, self.config.train
        rate = train.learning_rate if ib.learning_rate is None else ib.learning_rate
        advice = f"lower ib.learning_rate (now {rate:g})"
        advice += " or set train.clip_mode=per_group" if train.clip_mode == "joint" else ""
        return f"unstable encoder: KL rose from {first:.3g} to {last:.3g} nats; {advice}"

    def over_compressed(self) -> str | None:
        recent = self.rows[-RECENT:]
        if len(self.rows) <= RECENT or "unstable" in self.said or self.unstable():
            return None
        first, times, nats = self.rows[0], *RISEN
        low = min(row["ce"] for row in recent)
        advice = "lower ib.alpha or raise ib.beta"
        if low > max(times * first["ce"], first["ce"] + nats) and recent[-1]["kl"] < first["kl"]:
            return f"over-compression: CE rose from {first['ce']:.3g} to {low:.3g} nats while KL fell; {advice}"
        used = max(row["active_dims"] for row in recent)
        return f"over-compression: {used:.0%} of the latent dimensions in use; {advice}" if used < UNUSED else None

    def uncompressed(self) -> str | None:
        """Judged in the second half, once alpha has its full value."""
        ib, recent = self.config.ib, self.rows[-RECENT:]
        settled = max(0.5, ib.alpha_warmup_ratio) * self.total_steps
        if len(recent) < RECENT or recent[0]["step"] < settled:
            return None
        weight = max(ib.alpha * row["kl"] / row["ce"] for row in recent if row["ce"] > 0)
        if weight >= WEIGHTLESS or max(row["kl"] for row in recent) < 1.0:  # a small KL is not one that weighs nothing
            return None
        return f"hardly any compression: alpha KL is {weight:.2%} of CE; raise ib.alpha or lower ib.beta"


def solves_fewer(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str | None:
    """Of Pass@1 before and after training, {value, tasks}: by more than the tasks' number leaves to chance."""
    if not (before and after and "value" in before and "value" in after):
        return None
    first, last, n = before["value"], after["value"], after["tasks"]
    if first - last <= 2 * math.sqrt((first * (1 - first) + last * (1 - last)) / n):
        return None
    return f"over-compression: Pass@1 fell from {first:.1%} to {last:.1%}; lower ib.alpha or raise ib.beta"
