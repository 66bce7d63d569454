"""One run of the benchmarks: what it has measured, what it leaves out and why, and its rows."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.comparison import Found
from benchmarks.harness.machine import folder_name, threads_for, where
from benchmarks.harness.providers import OURS
from benchmarks.harness.result_rows import append, commit, path_of, read


class NotMeasured(Exception):
    """Why a comparison was left out."""


class Session:
    """Measures each comparison once.

    Args:
        resume: leave out what has rows of this commit. Code with changes since its commit is always measured.
        budget: seconds after which no comparison is begun; None: no limit.
        rounds: timed rounds of each provider; None: as many as the time of a comparison allows.
        keep: write rows also where `rounds` is given.
    """

    def __init__(
        self, *, resume: bool = False, budget: float | None = None, rounds: int | None = None, keep: bool = True
    ) -> None:
        self.resume, self.budget, self.rounds, self.keep = resume, budget, rounds, keep
        self.started = time.monotonic()
        self.commit = commit()
        self.results: dict[tuple[object, ...], dict[str, Found]] = {}
        self.broken: dict[tuple[object, ...], Exception] = {}
        self.written: set[Path] = set()
        self.left: set[tuple[object, ...]] = set()

    def found(self, comparison: Any, device: torch.device) -> dict[str, Found]:
        """Of each provider that can run here. Raises NotMeasured where `resume` or `budget` say so."""
        with threads_for(comparison, device):
            return self._found(comparison, device)

    def _found(self, comparison: Any, device: torch.device) -> dict[str, Found]:
        key = comparison.key(device)
        if key in self.results:
            return self.results[key]
        names = [name for name, provider in comparison.providers.items() if not provider.obstacle(device)]
        if self.resume and self.has_rows(comparison, names, device):
            raise NotMeasured(f"measured at {self.commit} already")
        if self.budget is not None and time.monotonic() - self.started > self.budget:
            self.left.add(key)
            raise NotMeasured(f"the {self.budget:g} s were up; run the same again to go on")
        if key in self.broken:
            raise self.broken[key]
        try:
            self.results[key] = comparison.measure(names, device, rounds=self.rounds)
        except Exception as error:  # of ours: peers that fail are rows already
            self.broken[key] = error
            self.write(comparison, device, {name: Found("failed") for name in names if name.startswith(OURS)})
            raise
        self.write(comparison, device, self.results[key])
        return self.results[key]

    def has_rows(self, comparison: Any, names: Iterable[str], device: torch.device) -> bool:
        if self.commit.endswith("-dirty"):
            return False
        rows = read(path_of(folder_name(device), comparison.bench))
        wanted = []
        for name in names:
            expected = comparison.row(name) | self.where(comparison, name, device)
            wanted.append({column: str(value) for column, value in expected.items()})
        faults = ("incorrect", "failed")  # nobody is told of those a second time
        done = [row for row in rows if row["commit"] == self.commit and row["result"] not in faults]
        return all(any(want.items() <= row.items() for row in done) for want in wanted)

    def where(self, comparison: Any, name: str, device: torch.device) -> dict[str, object]:
        provider = comparison.providers[name]
        return where(device, *([provider.package] if provider.package else []), *provider.beside)

    def write(self, comparison: Any, device: torch.device, found: dict[str, Found]) -> None:
        """Trials, of a number of rounds that was given, leave no rows."""
        if self.rounds is not None and not self.keep:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        rows = []
        for name, one in found.items():
            rows.append(
                comparison.row(name) | one.columns() | comparison.rates(one, device)
                | self.where(comparison, name, device) | {"commit": self.commit, "time": now}
            )  # fmt: skip
        self.written.add(append(folder_name(device), comparison.bench, comparison.columns, rows))
