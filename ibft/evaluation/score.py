"""`ibft-fast evaluate score`: verdicts in; pass@k, Pass@k(m), their intervals and the difference from a baseline out.

    verdicts -> (n, c) of each problem at each temperature -> a report (JSON) -> tables on the terminal, CSV, Markdown

Each temperature is scored apart. The report holds every number at full precision; the tables only read it.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ibft.errors import ConfigError, DataError
from ibft.evaluation.passk import LEVEL, RESAMPLES, estimate_means, pass_at_k_all_m
from ibft.evaluation.samples import read_verdicts
from ibft.evaluation.score_tables import SAID, WRITERS, Report, at, show
from ibft.output import write_whole

Counts = dict[str, tuple[int, int]]  # of each problem: n samples, c of them pass
OPTIMISTIC = "the best temperature is chosen on the problems that it is scored on, so its score is optimistic"


def run_score(
    verdicts: str, *, baseline: str | None = None, ks: str = "1", out: str | None = None, plots: str | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """Prints the scores of a file of verdicts.

    Args:
        verdicts, baseline: JSON lines as `evaluate judge` writes them; task_id and passed suffice.
        ks: numbers with commas between them, as "1,5,10".
        out: .json holds everything, .csv the counts and scores of each problem, .md the tables.
        plots: folder for pass_at_k_m.svg and fig1b.svg.
        seed: of the resampling.

    Raises:
        ConfigError: `ks`, `seed` or the ending of `out` is no good, or a problem has fewer samples than a k.
        DataError: a file cannot be read or written, contradicts itself, or cannot be held against the other.
        SetupError: plots are wanted, and matplotlib is missing.
    """
    wanted = parse_ks(ks)
    if seed < 0:
        raise ConfigError(f"--seed: got {seed}, expected 0 or more")
    ending = Path(out).suffix if out else ""
    if out and ending not in WRITERS:
        raise ConfigError(f"--out: got {out}, expected a name that ends with {', '.join(WRITERS)}")
    from ibft.console import Console
    from ibft.evaluation.score_plots import draw_plots, need_matplotlib

    if plots:
        need_matplotlib()
    model = count_verdicts(verdicts)
    report = make_report(model, count_verdicts(baseline) if baseline else None, wanted, seed)
    console = Console()
    show(report, console)
    if out:
        write(Path(out), WRITERS[ending](report))
        console.line(f"report: {out}")
    if plots:
        for line in draw_plots(report, plots):
            console.line(line)


def parse_ks(text: str) -> list[int]:
    """Ascending, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,5}", part, re.ASCII) for part in parts):
        raise ConfigError(f"--k: got {text!r}, expected whole numbers from 1 with commas between them, as 1,5,10")
    return sorted({int(part) for part in parts})


# --- verdicts to counts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A file of verdicts. said: of each of SAID, what its rows say, None where they are silent.
    counts: by temperature, ascending; that of rows without one is None."""

    path: str
    sha256: str
    said: dict[str, str | None]
    counts: dict[float | None, Counts]


def count_verdicts(path: str) -> Counted:
    """Raises DataError: the file cannot be read, has no rows, holds a sample twice, rows of several suites or rules, or
    at some temperature no sample of a problem that it has at another."""
    rows = read_verdicts(path)
    if not rows:
        raise DataError(f"{path}: holds no verdict")
    said = {name: one_value(path, rows, name) for name in SAID}
    counts: dict[float | None, Counts] = {}
    seen: dict[tuple[object, ...], int] = {}
    for line, row in enumerate(rows, start=1):
        task_id, temperature = row["task_id"], temperature_of(path, line, row)
        if row.get("sample") is not None:
            key = (task_id, temperature, repr(row["sample"]))
            if key in seen:
                where = f"sample {row['sample']} of {task_id}{at(temperature)}"
                raise DataError(f"{path}, line {line}: {where} was on line {seen[key]} already")
            seen[key] = line
        of_temperature = counts.setdefault(temperature, {})
        n, c = of_temperature.get(task_id, (0, 0))
        of_temperature[task_id] = (n + 1, c + row["passed"])
    tasks = sorted({row["task_id"] for row in rows})  # so that no result depends on the order of the rows
    for temperature, of_temperature in counts.items():
        for task_id in tasks:
            if task_id not in of_temperature:
                raise DataError(f"{path}: no sample of {task_id}{at(temperature)}, but there are some at another")
    temperatures = sorted(counts, key=lambda t: -math.inf if t is None else t)
    ordered = {t: {task_id: counts[t][task_id] for task_id in tasks} for t in temperatures}
    return Counted(path, digest(path), said, ordered)


def one_value(path: str, rows: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Several of a suite or a rule are refused; of what is no part of the question, all are named."""
    values = list(dict.fromkeys(None if row.get(name) is None else str(row[name]) for row in rows))
    if len(values) > 1 and name in ("suite", "rule"):
        raise DataError(f"{path}: its rows have more than one {name} ({named(values)})")
    return values[0] if len(values) == 1 else named(values)


def named(values: Sequence[str | None]) -> str:
    return ", ".join(value or "none" for value in values)


def temperature_of(path: str, line: int, row: Mapping[str, Any]) -> float | None:
    value = row.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise DataError(f"{path}, line {line}: temperature is {value!r:.80}, expected a number")
    return value


def digest(path: str) -> str:
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- counts to scores -----------------------------------------------------------------------------


def make_report(model: Counted, baseline: Counted | None, ks: Sequence[int], seed: int) -> Report:
    """Raises ConfigError where a problem has fewer samples than the largest k, DataError where the two files cannot be
    compared."""
    notes = compare_heads(model, baseline) if baseline else []
    for counted in (model, baseline):
        if counted:
            check_ks(counted, ks)
    pairs = pair_temperatures(model, baseline) if baseline else []
    if baseline and len(pairs) < max(len(model.counts), len(baseline.counts)):
        both = ", ".join(name_of(ours) for ours, _ in pairs)
        notes.append(f"compared at {both}; the other temperatures are in one file only")
    for ours, theirs in pairs:
        if ours != theirs:
            notes.append(f"compared: {name_of(ours)} with the baseline's {name_of(theirs)}")
    if any(counted and len(counted.counts) > 1 for counted in (model, baseline)):
        notes.append(OPTIMISTIC)
    return {
        "definitions": {
            "n, c": "samples of a problem, and those of them that pass",
            "pass@k": "1 - C(n-c, k) / C(n, k), arXiv 2107.03374; the mean over problems",
            "Pass@k(m)": "sum over j >= m of C(c, j) C(n-c, k-j) / C(n, k); the mean over problems. Pass@k(1) is "
            "pass@k. Equals G-Pass@k, arXiv 2412.13147, at tau = m / k",
            "low, high": "percentile bootstrap over problems, null where there is one problem",
            "difference": "verdicts minus baseline; both with the same problems in each resample",
        },
        "ks": list(ks),
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "notes": notes,
        "verdicts": section(model, ks, seed),
        "baseline": section(baseline, ks, seed) if baseline else None,
        "difference": [
            {
                "temperature": ours, "baseline_temperature": theirs,
                "scores": difference(model.counts[ours], baseline.counts[theirs], ks, seed),
            }
            for ours, theirs in pairs
        ] if baseline else None,
    }  # fmt: skip


def section(counted: Counted, ks: Sequence[int], seed: int) -> Report:
    """What the report says of one file."""
    by_temperature = [
        {
            "temperature": temperature,
            "problems": len(counts),
            "samples": sum(n for n, _ in counts.values()),
            "passed": sum(c for _, c in counts.values()),
            "scores": scored(columns_of(counts, ks), ks, seed),
        }
        for temperature, counts in counted.counts.items()
    ]
    problems = [
        {"task_id": task_id, "temperature": temperature, "n": n, "c": c}
        | {f"pass@{k}": pass_at_k_all_m(n, c, k)[0] for k in ks}
        | {f"Pass@{k}({m})": value for k in ks for m, value in enumerate(pass_at_k_all_m(n, c, k), start=1)}
        for temperature, counts in counted.counts.items()
        for task_id, (n, c) in counts.items()
    ]
    return {
        "file": counted.path, "sha256": counted.sha256, **counted.said, "temperatures": by_temperature,
        "best_over_temperatures": best(by_temperature) if len(by_temperature) > 1 else None, "problems": problems,
    }  # fmt: skip


def columns_of(counts: Counts, ks: Sequence[int]) -> list[list[float]]:
    """[S][P]: Pass@k(m) of every k, every m and every problem."""
    rows_PS = [[value for k in ks for value in pass_at_k_all_m(n, c, k)] for n, c in counts.values()]
    return [list(column) for column in zip(*rows_PS, strict=True)]


def scored(columns: Sequence[Sequence[float]], ks: Sequence[int], seed: int) -> list[Report]:
    cells = [(k, m) for k in ks for m in range(1, k + 1)]
    estimates = estimate_means(columns, seed=seed)
    return [{"k": k, "m": m, **asdict(estimate)} for (k, m), estimate in zip(cells, estimates, strict=True)]


def difference(ours: Counts, theirs: Counts, ks: Sequence[int], seed: int) -> list[Report]:
    """Problem by problem, then the mean: a resample takes a problem from both or from neither."""
    pairs = zip(columns_of(ours, ks), columns_of(theirs, ks), strict=True)
    columns = [[a - b for a, b in zip(mine, other, strict=True)] for mine, other in pairs]
    return scored(columns, ks, seed)


def best(by_temperature: Sequence[Report]) -> list[Report]:
    """Of each k and m the highest mean, the lowest temperature where several have it."""
    found = []
    for index, first in enumerate(by_temperature[0]["scores"]):
        of = max(by_temperature, key=lambda entry: entry["scores"][index]["value"])
        found.append({
            "k": first["k"], "m": first["m"], "value": of["scores"][index]["value"], "temperature": of["temperature"],
        })  # fmt: skip
    return found


def check_ks(counted: Counted, ks: Sequence[int]) -> None:
    for temperature, counts in counted.counts.items():
        task_id, (n, _) = min(counts.items(), key=lambda item: item[1][0])
        if max(ks) > n:
            where = f"{task_id} has n = {n} samples{at(temperature)} in {counted.path}"
            raise ConfigError(f"--k: got {max(ks)}, but {where}")


def compare_heads(model: Counted, baseline: Counted) -> list[str]:
    """What a reader should know before comparing. Raises DataError for another suite, rule or set of problems."""
    notes = []
    for name in SAID:
        ours, theirs = model.said[name], baseline.said[name]
        if ours == theirs:
            continue
        if ours and theirs and name in ("suite", "rule"):
            raise DataError(f"--baseline: {baseline.path} has {name} {theirs}, {model.path} has {ours}")
        notes.append(f"{name}: {ours or 'not said'}, of the baseline {theirs or 'not said'}")
    our_tasks, their_tasks = (set(next(iter(counted.counts.values()))) for counted in (model, baseline))
    alone = [
        f"{len(tasks)} only in {counted.path} ({min(tasks)})"
        for counted, tasks in ((model, our_tasks - their_tasks), (baseline, their_tasks - our_tasks))
        if tasks
    ]
    if alone:
        raise DataError(f"--baseline: the files must hold the same problems; {', '.join(alone)}")
    return notes


def pair_temperatures(model: Counted, baseline: Counted) -> list[tuple[float | None, float | None]]:
    """(ours, the baseline's) that are compared: those that both have, or the only one of each."""
    if len(model.counts) == len(baseline.counts) == 1:
        return [(next(iter(model.counts)), next(iter(baseline.counts)))]
    pairs = [(temperature, temperature) for temperature in model.counts if temperature in baseline.counts]
    if not pairs:
        have = (", ".join(map(name_of, counted.counts)) for counted in (model, baseline))
        raise DataError(f"--baseline: no temperature is in both files ({' against '.join(have)})")
    return pairs


def name_of(temperature: float | None) -> str:
    return "no temperature" if temperature is None else f"temperature {temperature:g}"


def write(path: Path, text: str) -> None:
    """All of it, in folders that are made; or what was there stays.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
