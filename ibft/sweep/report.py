"""From the results of a sweep's jobs to sweep.json, sweep.csv, the table on the terminal, and the sentences.

sweep.json holds every number and no clock: the same sweep on the same machine gives the same bytes.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ibft.evaluation.score_tables import percent
from ibft.reproduce.over_seeds import compare, passes_of, score, score_name, verdict_of
from ibft.reproduce.sentences import counted, in_points, judged
from ibft.sweep.grid import BASELINE
from ibft.sweep.plan import TEST, VALIDATION, Sweep
from ibft.sweep.select import MEASURES, choose, front, make_table, stable

Tree = dict[str, Any]
Report = Mapping[str, Any]
KIND = "ibft-fast sweep"
NAMED = 12  # cells in a sentence


def make_report(sweep: Sweep, threads: int | None, results: Sequence[Tree]) -> Tree:
    """All but the test tasks. results: of `run_cell`, in the order of the sweep's runs."""
    from ibft.evaluation.generate_samples import versions
    from ibft.reproduce.report import device_of
    from ibft.rundir import commit_of_source

    runs = [run_row(cell.name, seed, result) for (cell, seed), result in zip(sweep.runs, results, strict=True)]
    counts = [
        count_row(cell.name, seed, VALIDATION, result["counts"])
        for (cell, seed), result in zip(sweep.runs, results, strict=True)
        if result.get("counts")
    ]
    report: Tree = {
        "kind": KIND, "version": 1, "settings": sweep.settings(threads), "commit": commit_of_source(),
        "versions": versions(), "device": device_of(threads), "grid": {k: list(v) for k, v in values_of(sweep).items()},
        "seeds": list(sweep.seeds), "ks": list(sweep.ks),
        "temperature": sweep.tasks.temperatures[0] if sweep.tasks else None,
        "cells": [
            {"name": cell.name, "values": dict(cell.values), "baseline": cell is sweep.baseline}
            for cell in (sweep.baseline, *sweep.cells)
        ],
        "tasks": {name: tasks for name, tasks in [(VALIDATION, task_names(results))] if tasks},
        "counts": counts, "runs": runs,
    }  # fmt: skip
    report["table"] = make_table(report)
    report["chosen"] = choose(report["table"])
    report["stable"] = stable(report["table"], report["chosen"])
    report["front"] = front(report["table"])
    return report


def values_of(sweep: Sweep) -> dict[str, list[Any]]:
    """Of each key of the grid, as the configuration has them, in the grid's order."""
    found: dict[str, list[Any]] = {key: [] for key in sweep.grid}
    for cell in sweep.cells:
        for key, value in cell.values.items():
            if value not in found[key]:
                found[key].append(value)
    return found


def run_row(cell: str, seed: int, result: Tree) -> Tree:
    ended = result.get("training") or {}
    row = {"cell": cell, "seed": seed, "diverged": result.get("diverged"), "steps": ended.get("steps")}
    row |= {name: ended.get(name) for name in MEASURES}
    return row | {"warnings": ended.get("warnings", []), "geometry": result.get("geometry") or []}


def count_row(cell: str, seed: int, split: str, counts: Tree) -> Tree:
    return {
        "model": cell, "seed": seed, "suite": split, "temperature": counts["temperature"], "n": counts["n"],
        "passed": counts["passed"],
    }  # fmt: skip


def task_names(results: Sequence[Tree]) -> list[str]:
    found: list[str] = next((result["counts"]["tasks"] for result in results if result.get("counts")), [])
    return found


def add_test(report: Tree, asked: Sequence[tuple[str, int]], results: Sequence[Tree]) -> None:
    """asked: cell and seed of each result of `ask_test`."""
    report["counts"] += [
        count_row(cell, seed, TEST, result["counts"]) for (cell, seed), result in zip(asked, results, strict=True)
    ]
    report["tasks"][TEST] = task_names(results)


# --- sentences ------------------------------------------------------------------------------------


def sentences_of(report: Report) -> list[str]:
    return [*said_of_choice(report), *said_of_test(report)]


def said_of_choice(report: Report) -> Iterator[str]:
    by_tasks = VALIDATION in report["tasks"]
    cells = [row for row in report["table"] if not row["baseline"]]
    if diverged := [row["cell"] for row in report["table"] if row["diverged"]]:
        yield f"The loss was no number in a run of {some(diverged)}."
    if not by_tasks:
        yield "There are no validation tasks: the cell is chosen by its cross-entropy on held-out rows."
    chosen = next((row for row in cells if row["cell"] == report["chosen"]), None)
    if chosen is None:
        yield "No cell can be chosen: none has a number to choose it by."
        return
    if by_tasks:
        what = f"Pass@1 on {counted(len(report['tasks'][VALIDATION]), 'validation task')}"
        value = f"{percent(chosen['scores'][0])} %"
        value += f", the best of {len(cells)} cells and so too high" if len(cells) > 1 else ""
    else:
        what, value = "held-out cross-entropy", f"{spread(chosen['eval_ce'], 4)} nats"
    yield f"Chosen by {what}, {counted(len(report['seeds']), 'seed')}: {chosen['cell']} ({value})."
    yield (
        f"Stable region: {len(report['stable'])} of {counted(len(cells), 'cell')}, whose interval overlaps that of "
        f"{chosen['cell']}: {some(report['stable'])}."
    )
    if by_tasks and report["ks"][-1] > 1:
        k = report["ks"][-1]
        yield f"Not beaten in both Pass@1 and Pass@{k}({k}): {some(report['front'])}."


def said_of_test(report: Report) -> Iterator[str]:
    """The chosen cell against the baseline, where they were not chosen by it."""
    chosen = report["chosen"]
    what = f"{chosen} minus {BASELINE} on the test tasks"
    if chosen is None:
        return
    if TEST not in report["tasks"]:
        yield f"{what}: unmeasured (no test tasks)."
        return
    ours, theirs = (passes_of(report, name, TEST, report["temperature"]) for name in (chosen, BASELINE))
    ends = [(k, k) for k in report["ks"]]
    found = compare(ours, theirs, ends) if ours and theirs else None
    if ours is None or theirs is None or found is None:
        yield f"{what}: unmeasured (no seed of both that did not diverge)."
        return
    for end, apart, mine, other in zip(ends, found, score(ours, ends), score(theirs, ends), strict=True):
        yield (
            f"{what}, {score_name(end)}: {in_points(apart)} ({100 * mine.value:.1f} against {100 * other.value:.1f} "
            f"%): {judged(verdict_of(apart.low, apart.high), None)}"
        )


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def spread(found: Tree | None, digits: int, *, ranged: bool = True) -> str:
    """Mean, and range over seeds where there are several."""
    if found is None:
        return ""
    value = f"{found['value']:.{digits}f}"
    return (
        f"{value} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]" if ranged and found["seeds"] > 1 else value
    )


# --- tables ---------------------------------------------------------------------------------------


def table_of(report: Report) -> Table:
    """The baseline, then the best cells first."""
    ks = report["ks"] if VALIDATION in report["tasks"] else []
    title = "mean over seeds; held-out CE with its range"
    if ks:
        tasks = counted(len(report["tasks"][VALIDATION]), "validation task")
        title = f"{tasks}, n {report['counts'][0]['n']}, in % with 95 % interval over tasks and seeds; others: mean"
    names = ["", *(score_name((k, k)) for k in ks), "KL, nats", "held-out CE", ""]
    made = Table(*names, title=title, title_justify="left", box=SIMPLE)
    made.columns[0].min_width = max(len(row["cell"]) for row in report["table"])
    for row in sorted(report["table"], key=place):
        scores = [percent(found) for found in row["scores"]] or [""] * len(ks)
        ce = spread(row["eval_ce"], 4, ranged=not ks)
        made.add_row(row["cell"], *scores, spread(row["kl"], 2, ranged=False), ce, marks(report, row))
    return made


def place(row: Report) -> tuple[bool, bool, float]:
    if row["scores"]:
        return not row["baseline"], False, -row["scores"][0]["value"]
    worst = row["eval_ce"] is None or bool(row["diverged"])
    return not row["baseline"], worst, 0.0 if worst else row["eval_ce"]["value"]


def marks(report: Report, row: Report) -> str:
    if row["diverged"]:
        return f"diverged: seed {', '.join(map(str, row['diverged']))}"
    said = ["chosen"] if row["cell"] == report["chosen"] else ["stable"] if row["cell"] in report["stable"] else []
    said += ["on the front"] if row["cell"] in report["front"] else []
    return ", ".join(said)


def to_csv(report: Report) -> str:
    """A row a run; scores are fractions, of that seed alone."""
    grid, ks = list(report["grid"]), report["ks"]
    splits = [split for split in (VALIDATION, TEST) if split in report["tasks"]]
    layers = sorted({each["layer"] for run in report["runs"] for each in run["geometry"]})
    values = {cell["name"]: cell["values"] for cell in report["cells"]}
    columns = [
        "cell", "seed", *grid, "chosen", "stable", "diverged", "steps", *MEASURES,
        *(f"{split} {score_name((k, k))}" for split in splits for k in ks),
        *(f"{metric} at layer {layer}" for layer in layers for metric in GEOMETRY), "warnings",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for run in report["runs"]:
        name = run["cell"]
        row = {key: plain(value) for key, value in values[name].items()}
        row |= {key: run[key] for key in ("cell", "seed", "steps", *MEASURES)}
        row |= {"chosen": int(name == report["chosen"]), "stable": int(name in report["stable"])}
        row |= {"diverged": int(bool(run["diverged"])), "warnings": "; ".join(run["warnings"])}
        for split in splits:
            passes = passes_of(report, name, split, report["temperature"])
            if passes is not None and run["seed"] in passes.seeds:
                ends = [(k, k) for k in ks]
                found = score(passes.of_seeds([run["seed"]]), ends)
                row |= {f"{split} {score_name(end)}": each.value for end, each in zip(ends, found, strict=True)}
        for each in run["geometry"]:
            row |= {f"{metric} at layer {each['layer']}": each[metric]["estimate"] for metric in GEOMETRY}
        writer.writerow(row)
    return text.getvalue()


GEOMETRY = ("l2", "l2_normalised", "angle", "angle_centred")


def plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
