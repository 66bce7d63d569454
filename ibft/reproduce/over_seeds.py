"""Scores of a reproduction over training seeds and problems: means, intervals, paired differences.

    x[s, p]      Pass@k(m) of problem p after training with seed s, from c of n samples (`ibft.evaluation.passk`)
    value        the mean of x over seeds and problems
    low, high    percentile bootstrap (95 %): a resample draws S of the S seeds and, apart from them, P of the P
                 problems, both with replacement, and takes the mean over both
    difference   the same of x_a - x_b: one problem, one seed for both models, so that what is hard for both drops out

A model without seeds (a base) goes with every seed of the other. Of two models with seeds those count that both have.

What three seeds carry (coverage in simulation; 95 % is promised). The problems' part of the interval is sound from some
fifty problems on, 95 %, and nearly so for twelve, 92 %. The seeds' part is not, as only three values and repetitions of
them can be drawn: 91 % where seeds and problems add alike to the spread of the mean, 84 % where seeds add twice as
much, and where they add everything the interval is their range, which misses the truth 1 time in 4. Where most of the
spread is between the samples of a problem the interval is too wide, which errs on the safe side. So three seeds can
show that a difference is no single seed's doing, and an interval far from 0 stands; one that barely leaves 0 out does
not. They cannot say how much lower a single run may fall. `mean_over_seeds` claims no more than mean and range: three
values lie on one side of 0 by chance 1 time in 4.

Legend: C scores (k, m), S seeds, P problems, R resamples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ibft.analysis.geometry import Array, draw_weights
from ibft.evaluation.passk import LEVEL, RESAMPLES, pass_at_k_all_m

Report = Mapping[str, Any]
Seed = int | None
Cell = tuple[int, int]  # k, m
ROUNDING = 1e-12  # what is no further from 0 is 0: sums of halves and thirds are not exact


@dataclass(frozen=True)
class Passes:
    """What was counted of a model on a suite at a temperature. seeds: (None,) where the model has none.
    counts: of each seed, n samples a problem and how many of them passed, problem by problem."""

    seeds: tuple[Seed, ...]
    counts: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def n(self) -> int:
        """The largest k that every seed has the samples for."""
        return min(n for n, _ in self.counts)

    def of_seeds(self, seeds: Sequence[Seed]) -> "Passes":
        by_seed = dict(zip(self.seeds, self.counts, strict=True))
        return Passes(tuple(seeds), tuple(by_seed[seed] for seed in seeds))


@dataclass(frozen=True)
class Scored:
    """A score, or the difference of two. low, high: None where there is one problem. by_seed: the mean over problems
    with each seed; seeds: how many there are, 0 where nothing has any."""

    value: float
    low: float | None
    high: float | None
    problems: int
    seeds: int
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Mean of a number over seeds, and its range; seeds: that it was measured with."""

    value: float
    low: float
    high: float
    seeds: int


# --- what was measured ----------------------------------------------------------------------------


def passes_of(report: Report, model: str, suite: str, temperature: float | None) -> Passes | None:
    """None: not measured."""
    where = {"model": model, "suite": suite, "temperature": temperature}
    rows = [row for row in report["counts"] if all(row[name] == value for name, value in where.items())]
    rows.sort(key=lambda row: -1 if row["seed"] is None else row["seed"])
    if not rows:
        return None
    return Passes(tuple(row["seed"] for row in rows), tuple((row["n"], tuple(row["passed"])) for row in rows))


def temperatures_of(report: Report, suite: str | None = None) -> list[float | None]:
    """Of a suite, or of all. Ascending; that of rows without one first."""
    found = {row["temperature"] for row in report["counts"] if suite in (None, row["suite"])}
    return sorted(found, key=lambda temperature: -1 if temperature is None else temperature)


def main_temperature(report: Report, suite: str) -> float | None:
    """The recipe's; of a report that does not say it that at which most models were measured, the lowest of several."""
    said = report.get("settings", {}).get("suites", {}).get(suite, {}).get("temperature")
    if isinstance(said, int | float):
        return float(said)
    models = {
        temperature: len({row["model"] for row in rows_of(report, suite) if row["temperature"] == temperature})
        for temperature in temperatures_of(report, suite)
    }
    return max(models, key=models.__getitem__, default=None)


def rows_of(report: Report, suite: str) -> list[Mapping[str, Any]]:
    return [row for row in report["counts"] if row["suite"] == suite]


def ks_of(n: int) -> list[int]:
    """The paper's 1, 5 and 10, as far as n samples go; of fewer than five all of them."""
    return sorted({1, n} if n < 5 else {1, 5} if n < 10 else {1, 5, 10})


def end_cells(n: int) -> list[Cell]:
    """Pass@1 and Pass@k(k)."""
    return [(k, k) for k in ks_of(n)]


def all_cells(n: int) -> list[Cell]:
    return [(k, m) for k in ks_of(n) for m in range(1, k + 1)]


def score_name(cell: Cell) -> str:
    k, m = cell
    return "Pass@1" if k == 1 else f"Pass@{k}({m})"


# --- scores ---------------------------------------------------------------------------------------


def score(passes: Passes, cells: Sequence[Cell], *, seed: int = 0) -> list[Scored]:
    """In the order of `cells`. seed: of the resampling. Raises ValueError: a k above n."""
    return _estimate(_scores(passes, cells), passes.seeds, seed)


def compare(ours: Passes, theirs: Passes, cells: Sequence[Cell], *, seed: int = 0) -> list[Scored] | None:
    """Ours minus theirs; None where they share no seed. Raises ValueError: a k above either's n."""
    pairs = pair_seeds(ours.seeds, theirs.seeds)
    if not pairs:
        return None
    a_CSP = _scores(ours.of_seeds([a for a, _ in pairs]), cells)
    b_CSP = _scores(theirs.of_seeds([b for _, b in pairs]), cells)
    return _estimate(a_CSP - b_CSP, [b if a is None else a for a, b in pairs], seed)


def pair_seeds(ours: Iterable[Seed], theirs: Iterable[Seed]) -> list[tuple[Seed, Seed]]:
    """What has no seeds goes with every seed of the other."""
    mine, other = list(ours), list(theirs)
    if None in mine:
        return [(None, seed) for seed in other]
    if None in other:
        return [(seed, None) for seed in mine]
    return [(seed, seed) for seed in mine if seed in other]


def _scores(passes: Passes, cells: Sequence[Cell]) -> Array:
    """[C, S, P]."""
    values = [[[pass_at_k_all_m(n, c, k)[m - 1] for c in passed] for n, passed in passes.counts] for k, m in cells]
    return np.array(values, dtype=np.float64)


def _estimate(values_CSP: Array, seeds: Sequence[Seed], seed: int) -> list[Scored]:
    cells, drawn, problems = values_CSP.shape
    by_seed_CS = values_CSP.mean(axis=2)
    low_C: list[float | None] = [None] * cells
    high_C = low_C
    if problems > 1:
        weights_RP, weights_RS = _weights(problems, drawn, seed)
        means_RCS = (weights_RP @ values_CSP.reshape(-1, problems).T).reshape(-1, cells, drawn)
        means_RC = np.einsum("rcs,rs->rc", means_RCS, weights_RS)
        low_C, high_C = np.quantile(means_RC, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
    count = sum(one is not None for one in seeds)
    return [
        Scored(float(by_seed_S.mean()), low, high, problems, count, tuple(by_seed_S.tolist()))
        for by_seed_S, low, high in zip(by_seed_CS, low_C, high_C, strict=True)
    ]


@lru_cache(maxsize=4)
def _weights(problems: int, seeds: int, seed: int) -> tuple[Array, Array]:
    """[R, P] and [R, S]. The problems first: they are drawn alike, however many seeds there are."""
    of_problems, of_seeds = draw_weights([problems, seeds], resamples=RESAMPLES, seed=seed)
    return of_problems, of_seeds


def score_rows(report: Report) -> list[dict[str, Any]]:
    """Of every model, suite and temperature that was measured, every Pass@k(m)."""
    rows = []
    for suite in report["suites"]:
        for temperature in temperatures_of(report):
            for model in report["models"]:
                passes = passes_of(report, model["name"], suite, temperature)
                if passes is None:
                    continue
                cells = all_cells(passes.n)
                for (k, m), scored in zip(cells, score(passes, cells), strict=True):
                    rows.append({
                        "suite": suite, "temperature": temperature, "model": model["name"], "k": k, "m": m,
                        "value": scored.value, "low": scored.low, "high": scored.high,
                        "problems": scored.problems, "seeds": scored.seeds, "n": passes.n,
                    })  # fmt: skip
    return rows


# --- numbers without problems ---------------------------------------------------------------------


def mean_over_seeds(values: Mapping[Seed, float | None]) -> Spread | None:
    """None where no seed has a value."""
    found = [value for value in values.values() if value is not None]
    if not found:
        return None
    return Spread(float(np.mean(found)), min(found), max(found), len(found))


def differences(ours: Mapping[Seed, float | None], theirs: Mapping[Seed, float | None]) -> dict[Seed, float | None]:
    """Ours minus theirs by seed; None where one of the two has no value."""
    found: dict[Seed, float | None] = {}
    for a, b in pair_seeds(ours, theirs):
        mine, other = ours[a], theirs[b]
        found[b if a is None else a] = None if mine is None or other is None else mine - other
    return found


def verdict_of(low: float | None, high: float | None) -> str:
    """What an interval of a difference says: higher, lower or not told apart."""
    if low is None or high is None:
        return "not told apart"
    if low > ROUNDING:
        return "higher"
    return "lower" if high < -ROUNDING else "not told apart"
