"""A run folder as it lies there: finished, under way, stopped early, or with a file that a kill has damaged.

Only a folder without a run is refused. Whatever else cannot be read is left out and named in `Run.notes`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import Any

import yaml

from ibft.errors import ConfigError, DataError
from ibft.evaluation.score_tables import Table, describe, few_ms, summary_tables
from ibft.rundir import LATENT, METRICS

Tree = dict[str, Any]
Points = list[tuple[int, float | None]]  # step, value; None: not there, or not finite
Latent = list[tuple[int, list[float | None]]]  # step, [Z] KL of each dimension in nats per token
LARGEST = 3.5e38  # of a float32: a number beyond it is no measurement
OWN = ("manifest.json", "result.json", "non_finite.json")  # JSON that is no score
NOT_ENTERED = ("adapter", "checkpoints", ".")  # how names of folders begin that hold no score


@dataclass(frozen=True)
class Scores:
    """A report of `evaluate score` or `evaluate retain`. file: within the run folder.

    values: by name, as 0.5 for 50 %. said: sentences. tables: its own.
    """

    file: str
    values: dict[str, float]
    said: list[str]
    tables: list[Table]


@dataclass
class Run:
    """steps, evaluations: rows of metrics.jsonl, by step. result: None while there is none. notes: what is damaged.

    latent: of latent.jsonl, by layer; None is the layer of a run with one bottleneck.
    """

    path: Path
    name: str
    config: Tree = field(default_factory=dict)
    manifest: Tree = field(default_factory=dict)
    result: Tree | None = None
    steps: list[Tree] = field(default_factory=list)
    evaluations: list[Tree] = field(default_factory=list)
    latent: dict[int | None, Latent] = field(default_factory=dict)
    faults: list[Tree] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """By its dotted key; None where the configuration does not say."""
        section, _, name = key.partition(".")
        return part(self.config, section).get(name)

    def curve(self, key: str) -> Points:
        """Of a key of the logged steps; eval_ce of the evaluations."""
        rows = self.evaluations if key.startswith("eval_") else self.steps
        return [(row["step"], finite(row.get(key))) for row in rows]

    def values(self, key: str) -> list[float]:
        """Those of the curve that are numbers."""
        return [value for _, value in self.curve(key) if value is not None]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each with a name that tells it from the others.

    Raises:
        ConfigError: a folder holds no run, or is named twice. DataError: it cannot be read.
    """
    places = [Path(os.path.realpath(path)) for path in paths]  # which takes a link to itself too
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ConfigError(f"{paths[index]}: named twice")
    return [read_run(path, name) for path, name in zip(paths, names_of(places), strict=True)]


def names_of(places: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are alike, what their paths do not share at the beginning and the end."""
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        shared = len(Path(commonpath(places)).parts)
        parts = [place.parts[shared:] for place in places]
        while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
            parts = [each[:-1] for each in parts]
        names = ["/".join(each) for each in parts]
    return names if all(names) and len(set(names)) == len(names) else [str(place) for place in places]


def read_run(path: Path, name: str) -> Run:
    """Raises ConfigError: no run there. DataError: a file of it cannot be opened."""
    try:
        if not path.is_dir():
            what = (
                "is a file" if path.exists() else "a link that leads nowhere" if path.is_symlink() else "no such folder"
            )
            raise ConfigError(f"{path}: {what}, expected a run folder")
        if not any((path / file).exists() for file in ("config.yaml", METRICS)):
            raise ConfigError(f"{path}: holds no run, expected config.yaml or {METRICS} in it")
        run = Run(path, name)
        run.config = tree_of(run, "config.yaml", yaml.safe_load) or {}
        run.manifest = tree_of(run, "manifest.json", json.loads) or {}
        run.result = tree_of(run, "result.json", json.loads)
        faults = (tree_of(run, "non_finite.json", json.loads) or {}).get("faults")
        run.faults = [fault for fault in faults if isinstance(fault, dict)] if isinstance(faults, list) else []
        read_metrics(run)
        read_latent(run)
        run.scores = list(scores_of(run))
        run.checkpoints = [f"step-{number}" for number in sorted(checkpoint_steps(path / "checkpoints"))]
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from error
    return run


def tree_of(run: Run, file: str, parse: Callable[[str], Any]) -> Tree | None:
    """None where there is no such file, or no such content: then the run's notes say so."""
    path = run.path / file
    if not path.exists():
        return None
    try:
        tree = parse(path.read_text(encoding="utf-8", errors="replace"))
        json.dumps(tree, default=str, skipkeys=True)  # ValueError: a YAML anchor within itself
    except (ValueError, RecursionError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        run.notes.append(f"{file} is damaged, and left out")
        return None
    return tree


def read_metrics(run: Run) -> None:
    """Rows by step, the last of those that were logged twice; lines that are no row are counted."""
    steps: dict[int, Tree] = {}
    evaluations: dict[int, Tree] = {}
    rows, damaged = rows_of(run.path / METRICS)
    for row in rows:
        (evaluations if "eval_ce" in row else steps)[row["step"]] = row
    run.steps, run.evaluations = ([found[step] for step in sorted(found)] for found in (steps, evaluations))
    note_damaged(run, METRICS, damaged)


def read_latent(run: Run) -> None:
    """As the metrics; a layer's rows have all as many dimensions as most of them."""
    rows, damaged = rows_of(run.path / LATENT)
    good = 0
    by_layer: dict[int | None, list[Tree]] = {}
    for row in filter(is_latent, rows):
        by_layer.setdefault(row.get("layer"), []).append(row)
    for layer in sorted(by_layer, key=lambda layer: layer or 0):
        [(usual, count)] = Counter(len(row["kl"]) for row in by_layer[layer]).most_common(1)
        found = {row["step"]: row["kl"] for row in by_layer[layer] if len(row["kl"]) == usual}
        run.latent[layer] = [(step, [finite(kl) for kl in found[step]]) for step in sorted(found)]
        good += count
    note_damaged(run, LATENT, damaged + len(rows) - good)


def is_latent(row: Tree) -> bool:
    return isinstance(row.get("kl"), list) and bool(row["kl"]) and type(row.get("layer", 0)) is int


def rows_of(path: Path) -> tuple[list[Tree], int]:
    """The file's rows that have a step, and how many lines are none; of no file none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows, damaged = [], 0
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the half of a line that a kill left
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) <= LARGEST:
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def note_damaged(run: Run, file: str, lines: int) -> None:
    if lines:
        run.notes.append(f"{file}: {lines} damaged line{'' if lines == 1 else 's'} left out")


def checkpoint_steps(folder: Path) -> Iterator[int]:
    for entry in folder.iterdir() if folder.is_dir() else ():
        number = entry.name.removeprefix("step-")
        if entry.name != number and number.isdecimal():
            yield int(number)


# --- scores ---------------------------------------------------------------------------------------


def scores_of(run: Run) -> Iterator[Scores]:
    """Of the JSON files in the run folder and in folders of it."""
    for path in sorted([*run.path.glob("*.json"), *run.path.glob("*/*.json")]):
        file = path.relative_to(run.path).as_posix()
        if file in OWN or file.startswith(NOT_ENTERED):
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue  # whoever's it is
        if not isinstance(report, dict):
            continue
        try:
            if {"ks", "verdicts", "baseline"} <= report.keys():
                yield of_score(file, report)
            elif {"scores", "lm_eval"} <= report.keys():
                yield of_retain(file, report)
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration, ArithmeticError):
            run.notes.append(f"{file} is a damaged report of scores, and left out")


def of_score(file: str, report: Tree) -> Scores:
    """Of `evaluate score`. At each temperature pass@k and Pass@k(k), as its tables have them."""
    values = {}
    for entry in report["verdicts"]["temperatures"]:
        at = "" if entry["temperature"] is None else f", T {entry['temperature']:g}"
        for score in entry["scores"]:
            if score["m"] in (1, score["k"]):
                name = f"pass@{score['k']}" if score["m"] == 1 else f"Pass@{score['k']}({score['m']})"
                values[name + at] = float(score["value"])
    said = [describe(report["verdicts"])]
    said += [f"baseline {describe(report['baseline'])}"] if report["baseline"] else []
    return Scores(file, values, [*said, *map(str, report["notes"])], summary_tables(report, few_ms))


def of_retain(file: str, report: Tree) -> Scores:
    """Of `evaluate retain`."""
    rows, values = [], {}
    for task, metrics in report["scores"].items():
        for metric, found in metrics.items():
            stderr = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            rows.append([task, metric, f"{found['value']:.4f}", stderr])
            values[f"{task} {metric}"] = float(found["value"])
    said = [f"general tasks by lm-evaluation-harness {report['lm_eval']}, model {report.get('model')}"]
    return Scores(file, values, said, [Table("what is retained", ["task", "metric", "score", "standard error"], rows)])


# --- pieces ---------------------------------------------------------------------------------------


def part(tree: Tree | None, key: str) -> Tree:
    """A tree within a tree; empty where there is none."""
    found = (tree or {}).get(key)
    return found if isinstance(found, dict) else {}


def finite(value: Any) -> float | int | None:
    """The value where it is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= LARGEST else None  # not so of a NaN
