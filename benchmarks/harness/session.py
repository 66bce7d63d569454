"""One run of the benchmarks: what it has measured, what it leaves out and why, and its rows."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.comparison import Found
from benchmarks.harness.machine import folder_name, where
from benchmarks.harness.result_rows import append, commit, path_of, read


class NotMeasured(Exception):
    """Why a comparison was left out."""


class Session:
    """Measures each comparison once.

    Args:
        resume: leave out what has rows of this commit. Code with changes since its commit is always measured.
        budget: seconds after which no comparison is begun; None: no limit.
        rounds: timed rounds of each provider; None: as many as the time of a comparison allows.
    """

    def __init__(self, *, resume: bool = False, budget: float | None = None, rounds: int | None = None) -> None:
        self.resume, self.budget, self.rounds = resume, budget, rounds
        self.started = time.monotonic()
        self.commit = commit()
        self.results: dict[tuple[object, ...], dict[str, Found]] = {}
        self.written: set[Path] = set()
        self.left: set[tuple[object, ...]] = set()

    def found(self, comparison: Any, device: torch.device) -> dict[str, Found]:
        """Of each provider that can run here. Raises NotMeasured where `resume` or `budget` say so."""
        key = comparison.key(device)
        if key in self.results:
            return self.results[key]
        names = [name for name, provider in comparison.providers.items() if not provider.obstacle(device)]
        if self.resume and self.has_rows(comparison, names, device):
            raise NotMeasured(f"measured at {self.commit} already")
        if self.budget is not None and time.monotonic() - self.started > self.budget:
            self.left.add(key)
            raise NotMeasured(f"the {self.budget:g} s were up; run the same again to go on")
        self.results[key] = comparison.measure(names, device, rounds=self.rounds)
        self.write(comparison, device, self.results[key])
        return self.results[key]

    def has_rows(self, comparison: Any, names: Iterable[str], device: torch.device) -> bool:
        if self.commit.endswith("-dirty"):
            return False
        rows = read(path_of(folder_name(device), comparison.bench))
        wanted = [{column: str(value) for column, value in comparison.row(name).items()} for name in names]
        done = [row for row in rows if row["commit"] == self.commit]
        return all(any(want.items() <= row.items() for row in done) for want in wanted)

    def write(self, comparison: Any, device: torch.device, found: dict[str, Found]) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        rows = []
        for name, one in found.items():
            provider = comparison.providers[name]
            packages = (*([provider.package] if provider.package else []), *provider.beside)
            rows.append(
                comparison.row(name) | one.columns() | comparison.rates(one, device)
                | where(device, *packages) | {"commit": self.commit, "time": now}
            )  # fmt: skip
        self.written.add(append(folder_name(device), comparison.bench, comparison.columns, rows))
