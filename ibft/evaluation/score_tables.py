"""A report of scores as tables: on the terminal, as CSV, as Markdown. They only read it (`score.py`)."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.evaluation.passk import LEVEL

Report = dict[str, Any]
SAID = ("suite", "rule", "sandbox", "icarus")  # what a verdict says of its judge


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary_tables(report: Report, ms: Callable[[int], Sequence[int]]) -> list[Table]:
    """Scores with their intervals, then Pass@k(m) for m in ms(the largest k). In percent."""
    verdicts, baseline, ks = report["verdicts"], report["baseline"], report["ks"]
    ends = [(k, m) for k in ks for m in dict.fromkeys((1, k))]
    tables = []
    differences = {entry["temperature"]: entry for entry in report["difference"] or ()}
    for entry in verdicts["temperatures"]:
        compared = differences.get(entry["temperature"])
        header, columns, by_difference = ["", Path(verdicts["file"]).name], [by_cell(entry)], None
        if compared:
            by_difference = by_cell(compared)
            theirs = next(e for e in baseline["temperatures"] if e["temperature"] == compared["baseline_temperature"])
            header += ["baseline", "difference"]
            columns += [by_cell(theirs), by_difference]
        rows = [
            [score_name(k, m), *(percent(column[k, m], sign=column is by_difference) for column in columns)]
            for k, m in ends
        ]
        title = f"score{at(entry['temperature'])}, and {LEVEL:.0%} interval over the problems, in %"
        tables.append(Table(title, header, rows))
        if ks[-1] == 1:  # the triangle would be a point
            continue
        rows = [
            [f"m = {m}", *(f"{100 * columns[0][k, m]['value']:.1f}" if m <= k else "" for k in ks)] for m in ms(ks[-1])
        ]
        tables.append(Table(f"Pass@k(m){at(entry['temperature'])}, in %", ["", *(f"k = {k}" for k in ks)], rows))
    for of in (verdicts, baseline):
        if of and of["best_over_temperatures"]:
            cells = {(cell["k"], cell["m"]): cell for cell in of["best_over_temperatures"]}
            rows = [
                [score_name(k, m), f"{100 * cells[k, m]['value']:.1f}", temperature_text(cells[k, m]["temperature"])]
                for k, m in ends
            ]
            title = "best over temperatures (optimistic), in %"
            tables.append(Table(title, ["", Path(of["file"]).name, "temperature"], rows))
    return tables


def at(temperature: float | None) -> str:
    return "" if temperature is None else f" at temperature {temperature:g}"


def by_cell(entry: Report) -> dict[tuple[int, int], Report]:
    return {(score["k"], score["m"]): score for score in entry["scores"]}


def score_name(k: int, m: int) -> str:
    return f"pass@{k}" if m == 1 else f"Pass@{k}({m})"


def percent(score: Report, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    if score["low"] is None:
        return f"{100 * score['value']:{form}}"
    return f"{100 * score['value']:{form}} [{100 * score['low']:{form}}, {100 * score['high']:{form}}]"


def temperature_text(temperature: float | None) -> str:
    return "" if temperature is None else f"{temperature:g}"


def few_ms(k: int) -> list[int]:
    """For a screen: each m, or from 13 on only 1, 2, 5, 10, ... and k."""
    if k <= 12:
        return list(range(1, k + 1))
    return [m for m in (step * 10**power for power in range(7) for step in (1, 2, 5)) if m < k] + [k]


def describe(section: Report) -> str:
    of = section["temperatures"]
    samples, passed = (sum(entry[name] for entry in of) for name in ("samples", "passed"))
    ns = sorted({row["n"] for row in section["problems"]})
    each = f"{ns[0]}" if len(ns) == 1 else f"{ns[0]} to {ns[-1]}"
    said = "".join(f", {name} {section[name]}" for name in SAID if section[name])
    each += " at each temperature" if len(of) > 1 else ""
    return f"{section['file']}: {of[0]['problems']} problems, n = {each}; {passed} of {samples} samples pass{said}"


def show(report: Report, console: Any) -> None:
    """console: an `ibft.console.Console`."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table as RichTable

    for of, what in ((report["verdicts"], ""), (report["baseline"], "baseline ")):
        if of:
            console.line(what + describe(of))
    for note in report["notes"]:
        console.notice(note)
    for table in summary_tables(report, few_ms):
        shown = RichTable(*map(escape, table.header), title=table.title, title_justify="left", box=SIMPLE)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.rich.print(shown)


# --- files ----------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def to_csv(report: Report) -> str:
    """A line a problem and temperature; of the baseline nothing."""
    rows = report["verdicts"]["problems"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(report: Report) -> str:
    sections = [of for of in (report["verdicts"], report["baseline"]) if of]
    lines = [describe(of) + f", sha256 {of['sha256'][:16]}\n" for of in sections]
    lines += [f"Note: {note}.\n" for note in report["notes"]]
    bootstrap, definition = report["bootstrap"], report["definitions"]["Pass@k(m)"]
    lines.append(f"Pass@k(m) = {definition}.\n")
    lines.append(f"Intervals: {bootstrap['resamples']:,} resamples of the problems, seed {bootstrap['seed']}.\n")
    ends = [(k, m) for k in report["ks"] for m in dict.fromkeys((1, k))]
    tables = summary_tables(report, lambda k: range(1, k + 1))
    for of in sections:
        rows = [
            [row["task_id"], temperature_text(row["temperature"]), str(row["n"]), str(row["c"]),
             *(f"{row[score_name(k, m)]:.4f}" for k, m in ends)]
            for row in of["problems"]
        ]  # fmt: skip
        header = ["task_id", "temperature", "n", "c", *(score_name(k, m) for k, m in ends)]
        tables.append(Table(f"Problems of {of['file']}", header, rows))
    for table in tables:
        lines += [f"### {table.title}\n", markdown_row(table.header), markdown_row(["---"] * len(table.header))]
        lines += [*map(markdown_row, table.rows), ""]
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


WRITERS: Mapping[str, Callable[[Report], str]] = {".json": to_json, ".csv": to_csv, ".md": to_markdown}
