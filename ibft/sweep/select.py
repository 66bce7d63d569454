"""What the cells of a sweep score, which of them is chosen, and which cannot be told from it.

    chosen    the highest mean Pass@1 on the validation tasks; of several the highest Pass@k(k), then the fewest nats of
              KL; without tasks the lowest held-out cross-entropy
    stable    every cell whose interval overlaps the chosen one's: of Pass@1 over problems and seeds
              (`ibft.reproduce.over_seeds`); without tasks the range over seeds
    front     the cells, or the baseline, that no other beats in both Pass@1 and Pass@k(k)

A cell with a run whose loss was no number is never chosen: the same settings may end so again.

The chosen score is the best of many and so too high: what the cell is worth the test tasks tell, which choose nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ibft.reproduce.over_seeds import Cell, mean_over_seeds, passes_of, score
from ibft.sweep.plan import VALIDATION

Tree = dict[str, Any]
Row = Mapping[str, Any]
DIGITS = 12  # sums of halves and thirds are not exact
MEASURES = ("kl", "ce", "ce_z", "active_dims", "eval_ce")


def make_table(report: Row) -> list[Tree]:
    """Of every cell, in the report's order: its scores on the validation tasks (by k, Pass@k(k)), and the mean and
    range over seeds of what its runs ended with; None where it has none."""
    rows = []
    for cell in report["cells"]:
        runs = [run for run in report["runs"] if run["cell"] == cell["name"]]
        diverged = [run["seed"] for run in runs if run["diverged"]]
        found: Tree = {"cell": cell["name"], "baseline": cell["baseline"], "values": cell["values"]}
        found |= {"diverged": diverged, "scores": scores_of(report, cell["name"]) if not diverged else []}
        for name in MEASURES:
            spread = mean_over_seeds({run["seed"]: run[name] for run in runs if not run["diverged"]})
            found[name] = None if spread is None else asdict(spread)
        rows.append(found)
    return rows


def scores_of(report: Row, cell: str) -> list[Tree]:
    passes = passes_of(report, cell, VALIDATION, report["temperature"])
    if passes is None:
        return []
    ends: list[Cell] = [(k, k) for k in report["ks"]]
    return [{"k": k, **asdict(found)} for k, found in zip(report["ks"], score(passes, ends), strict=True)]


def choose(table: Sequence[Row]) -> str | None:
    """None where every cell has a run that diverged, or nothing that it could be chosen by."""
    candidates = [row for row in table if not row["baseline"] and not row["diverged"]]
    if any(row["scores"] for row in candidates):
        return max((row for row in candidates if row["scores"]), key=rank)["cell"]  # type: ignore[no-any-return]
    candidates = [row for row in candidates if row["eval_ce"]]
    return min(candidates, key=lambda row: row["eval_ce"]["value"])["cell"] if candidates else None


def rank(row: Row) -> tuple[float, float, float]:
    kl = row["kl"]["value"] if row["kl"] else float("inf")
    return (*(round(row["scores"][i]["value"], DIGITS) for i in (0, -1)), -kl)  # type: ignore[return-value]


def stable(table: Sequence[Row], chosen: str | None) -> list[str]:
    """The chosen one among them."""
    of_best = next((interval(row) for row in table if row["cell"] == chosen), None)
    if of_best is None:
        return []
    candidates = {row["cell"]: interval(row) for row in table if not row["baseline"] and not row["diverged"]}
    return [name for name, found in candidates.items() if found and found[0] <= of_best[1] and of_best[0] <= found[1]]


def interval(row: Row) -> tuple[float, float] | None:
    """Of what cells are chosen by; a single number where nothing tells how far it may be off."""
    found = row["scores"][0] if row["scores"] else row["eval_ce"]
    if found is None:
        return None
    if found["low"] is None:
        return found["value"], found["value"]
    return found["low"], found["high"]


def front(table: Sequence[Row]) -> list[str]:
    """By Pass@1, ascending."""
    points = {row["cell"]: point(row) for row in table if row["scores"]}
    kept = [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(kept, key=points.__getitem__)


def point(row: Row) -> tuple[float, float]:
    """(Pass@1, Pass@k(k)) with the largest k."""
    return round(row["scores"][0]["value"], DIGITS), round(row["scores"][-1]["value"], DIGITS)
