"""The tables of README.md and docs/benchmarks.md, from the committed rows alone: no number in them is typed. Imports no
torch.

    python -m benchmarks.report.tables            rewrite the parts between `<!-- table: NAME -->` and `<!-- /table -->`
    python -m benchmarks.report.tables --check    name the parts that are stale; exit 1 where there are any

NAME is one of `NAMED`, alone or followed by `cpu` or `gpu`, which leaves only that kind of device. Each of them has
to be somewhere in these pages.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.harness import result_rows
from benchmarks.report.targets import (
    OBJECTIVE_CPU,
    OBJECTIVE_GPU,
    OURS,
    TARGETS,
    Row,
    Target,
    Verdict,
    added_by_the_bottleneck,
    against_ours,
    all_rows,
    benches,
    evaluate,
    folders,
    kind_of,
    number,
    pick,
    positive,
    rows_of,
)

PAGES = (result_rows.ROOT / "README.md", result_rows.ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(
    r"(<!-- table: (?P<name>[a-z-]+)(?: (?P<kind>cpu|gpu))? -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL
)
NO_GPU = "unmeasured: no rows of a GPU"
NAMES = {
    "hf": "transformers + PEFT + bitsandbytes",
    "released": "the released way",
    "unsloth": "Unsloth",
    "ours, padded": "ours",
}
# They compute less than the op does, and are no peers of it: what it is held to.
BOUNDS = ("product", "dense weight", "torch.randn", "F.dropout")

# --- text -----------------------------------------------------------------------------------------


def times(value: float) -> str:
    """A ratio; three digits."""
    decimals = next((n for n, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:.{decimals}f}x"


def percent(share: float) -> str:
    return f"{100 * share:.{1 if abs(share) < 0.1 else 0}f} %"


def quantity(value: float | None) -> str:
    """Three digits, or a whole number with separators."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(row: Row, column: str, show: Callable[[float], str] = quantity) -> str:
    """What the row found, or why it found nothing."""
    value = number(row, column)
    return show(value) if value is not None else "" if row["result"] == "ok" else row["result"]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; numbers, which are in all columns that hold one in every line, to the right."""
    lines = [[*line] for line in lines]
    right = [all(re.match(r"[-\d.,]+( ?[x%])?$", line[i]) for line in lines if line[i]) for i in range(len(head))]
    rule = ["--:" if side else "---" for side in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*head], rule, *lines])


def threads(count: str) -> str:
    """After the device's name; nothing on a GPU."""
    return f", {count} thread{'s' * (count != '1')}" if count else ""


def source(folder: str, bench: str, rows: Sequence[Row]) -> str:
    """Where the rows are and what made them."""
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    where = devices + threads(" or ".join(sorted({row["threads"] for row in rows if row["threads"]})))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{where}, at {commits} ([rows](benchmarks/results/{folder}/{bench}.csv))"


def case_of(row: Row) -> str:
    """The op at its size, as a reader would say it."""
    sizes = [f"{name} {row[name]}" for name in ("model", "layout", "N", "T", "B", "L", "D", "Z", "V") if row.get(name)]
    mode = row.get("mode", "").replace("full", "")
    return ", ".join(part for part in (f"`{row['op']}`", mode, row.get("detail", ""), *sizes) if part)


def groups(rows: Iterable[Row], *but: str) -> list[list[Row]]:
    """Rows whose keys differ in nothing but those columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(result_rows.key(row | dict.fromkeys(but, "")), []).append(row)
    return [*found.values()]


def ours_of(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row["provider"] == OURS), None)


# --- ops ------------------------------------------------------------------------------------------


def op_cases(folder: str) -> list[list[Row]]:
    """Every case of every op, each with all its providers, by file and in the order of measuring."""
    rows = [row for bench in benches(folder) for row in rows_of(folder, bench) if "mode" in row]
    return groups(rows, "provider")


def main_cases(folder: str) -> list[list[Row]]:
    """Of each op and variant (`detail`, dtype) one case: forward and backward together where that was measured, and
    of those the one in which ours takes longest. How many rows have a label is a size, not a variant."""
    chosen: dict[tuple[str, str, str], tuple[bool, float]] = {}
    best: dict[tuple[str, str, str], list[Row]] = {}
    for case in op_cases(folder):
        ours = ours_of(case)
        if ours is None:
            continue
        variant = ours["op"], re.sub(r"labelled [\d.]+", "", ours["detail"]), ours["dtype"]
        rank = ours["mode"] == "full", number(ours, "p50_ms") or 0.0
        if variant not in chosen or rank > chosen[variant]:
            chosen[variant], best[variant] = rank, case
    return [*best.values()]


def peers(case: Iterable[Row]) -> list[tuple[float, str]]:
    """(how many times as long as ours, provider) of those that compute the same, the fastest first."""
    found = [
        (ratio, row["provider"])
        for row in case
        if not row["provider"].startswith(OURS) and row["provider"] not in BOUNDS
        if (ratio := number(row, "ours_speedup")) is not None
    ]
    return sorted(found)


def ops(folder: str) -> str | None:
    cases = main_cases(folder)
    if not cases:
        return None
    lines, rows = [], []
    for case in cases:
        ours = ours_of(case)
        assert ours is not None
        rows.append(ours)
        best = peers(case)
        versus = f"{best[0][1]} {times(best[0][0])}" if best else "none measured"
        bounds = [
            f"; {row['provider']} {times(ratio)}"
            for row in case
            if row["provider"] in BOUNDS and (ratio := number(row, "ours_speedup")) is not None
        ]
        slower = best and best[0][0] < 1
        lines.append([
            case_of(ours), cell(ours, "p50_ms"), f"**{versus}**" if slower else versus,
            cell(ours, "ceiling_share", percent) + "".join(bounds),
        ])  # fmt: skip
    judged = [(best[0], case_of(case[0])) for case in op_cases(folder) if ours_of(case) and (best := peers(case))]
    slower = [f"{name} ({provider} {times(ratio)})" for (ratio, provider), name in judged if ratio < 1]
    return "\n\n".join([
        f"{source(folder, '*', rows).replace('/*.csv', '/')}; of each op and variant the longest case:",
        table(["op", "ours, ms", "fastest peer: time against ours", "share of the ceiling; bounds"], lines),
        f"A peer is faster than ours in {len(slower)} of the {len(judged)} cases measured"
        + (f": {'; '.join(slower)}." if slower else "."),
    ])  # fmt: skip


def objective(folder: str) -> str | None:
    main = OBJECTIVE_CPU if kind_of(folder) == "cpu" else OBJECTIVE_GPU
    rows = pick(rows_of(folder, "objective"), **main)
    ours = ours_of(rows)
    if ours is None:
        return None
    mine = number(ours, "peak_mib")
    lines = []
    for row in rows:
        theirs = number(row, "peak_mib")
        less = times(theirs / mine) if theirs is not None and mine else ""
        lines.append([
            NAMES.get(row["provider"], row["provider"]), cell(row, "p50_ms"), cell(row, "ours_speedup", times),
            cell(row, "peak_mib"), less, cell(row, "ceiling_share", percent),
        ])  # fmt: skip
    return "\n\n".join([
        f"{case_of(ours)}, {ours['dtype']}; {source(folder, 'objective', rows)}:",
        table(
            ["", "ms", "time against ours", "peak MiB above the inputs", "memory against ours", "share of the ceiling"],
            lines,
        ),
    ])  # fmt: skip


# --- steps ----------------------------------------------------------------------------------------


def steps(bench: str) -> Callable[[str], str | None]:
    """The table of a file of step rows, and what the bottleneck adds where steps of ours without it were measured."""

    def render(folder: str) -> str | None:
        rows = rows_of(folder, bench)
        if not rows:
            return None
        shown = [name for name in ("model", "layout", "T", "card_gib") if len({row[name] for row in rows}) > 1]
        if "layout" in shown and all(len({row["T"] for row in group}) == 1 for group in by(rows, "model", "layout")):
            shown = [name for name in shown if name != "T"]  # the layout tells it
        titles = {"T": "longest row", "card_gib": "card, GiB"}
        padded = any(number(row, "padding") for row in rows)
        lines = []
        for row in rows:
            name = NAMES.get(row["provider"], row["provider"])
            padding = [cell(row, "padding", percent)] if padded else []
            with_it = "with" if positive(row["alpha"]) else "without"
            faster = against_ours(row, rows)
            lines.append([
                name, *(row[column] or "whole" for column in shown), *padding, with_it, cell(row, "tokens_per_s"),
                times(faster) if faster is not None else "", cell(row, "peak_mib"),
            ])  # fmt: skip
        head = [
            "",
            *(titles.get(name, name) for name in shown),
            *(["padding"] if padded else []),
            "bottleneck",
            "tokens/s",
            "time against ours",
            "peak MiB",
        ]
        memory = "peak memory above the models"
        if bench == "step" and kind_of(folder) == "gpu":
            memory = "each in a process of its own, so times are not paired; peak memory of the whole process"
        said = [f"{source(folder, bench, rows)}, real tokens, {memory}:", table(head, lines)]
        for group in groups(rows, "provider", "alpha"):
            if (added := added_by_the_bottleneck(group)) is not None:
                words = ", ".join(group[0][name] for name in ("model", "layout") if group[0][name])
                words += f", {group[0]['T']} tokens" * ("T" in shown) + f", {group[0]['card_gib']} GiB" * bool(
                    group[0]["card_gib"]
                )
                said.append(f"The bottleneck adds {percent(added)} to a step of ours ({words}).")
        return "\n\n".join(said)

    return render


def all_of(*parts: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Those that there are rows for, one below the other."""
    return lambda folder: "\n\n".join(text for part in parts if (text := part(folder))) or None


def by(rows: Iterable[Row], *columns: str) -> Iterator[list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in columns), []).append(row)
    yield from found.values()


def profile(folder: str) -> str | None:
    said = []
    for group in groups(rows_of(folder, "profile"), "category"):
        first = group[0]
        shares = sorted(((number(row, "share") or 0.0, row["category"]) for row in group), reverse=True)
        kind = "with" if positive(first["alpha"]) else "without"
        said.append(
            f"A step ({first['model']}, {kind} the bottleneck; {first['steps']} under the profiler): "
            + ", ".join(f"{category} {percent(share)}" for share, category in shares)
            + f". {source(folder, 'profile', group)}"
        )
    return "\n\n".join(said) or None


# --- how well it repeats, and what was promised ---------------------------------------------------

LEAST_MS = 1.0  # shorter calls are told apart from noise by many rounds only


@dataclass(frozen=True)
class Pair:
    """The last two ratios of a key; `again` is None where there is one, or where code or machine differ."""

    name: str
    ms: float
    ratio: float
    again: float | None
    bench: str
    row: Row

    @property
    def apart(self) -> float | None:
        """By how much the larger exceeds the smaller, as a share of it."""
        return None if self.again is None else max(self.ratio, self.again) / min(self.ratio, self.again) - 1

    def __str__(self) -> str:
        if self.again is None:
            return f"{self.name}: {times(self.ratio)}, measured once"
        return f"{self.name}: {times(self.ratio)}, then {times(self.again)}"


def pairs(folder: str) -> list[Pair]:
    """Of every key that has a ratio to ours; ours' own are 1."""
    found = []
    for bench in benches(folder):
        compared = (row for row in all_rows(folder, bench) if row.get("ours_speedup") and row["provider"] != OURS)
        for rows in groups(compared):
            last = rows[-1]
            same = [row for row in rows[:-1] if all(row[name] == last[name] for name in SAME)]
            ratios = [float(row["ours_speedup"]) for row in (*same[-1:], last)]
            name = f"{case_of(last)}, {last['provider']}" + (f", alpha {last['alpha']}" if last.get("alpha") else "")
            found.append(Pair(name, number(last, "p50_ms") or 0.0, ratios[0], ratios[1] if same else None, bench, last))
    return found


SAME = ("device", "threads", "versions", "commit")


def repeat(folder: str) -> str | None:
    found = pairs(folder)
    if not found:
        return None
    long, short = ([p for p in found if (p.ms >= LEAST_MS) is side] for side in (True, False))
    return (
        f"Two runs of the same code on {folder}, ratios to ours: {agreement(long)}. "
        f"Of calls under {LEAST_MS:g} ms: {agreement(short)}."
    )


def agreement(found: Sequence[Pair]) -> str:
    twice = sorted((pair for pair in found if pair.apart is not None), key=lambda pair: pair.apart or 0.0)
    if not twice:
        return f"none of {len(found)} was measured twice"
    middle = median(pair.apart or 0.0 for pair in twice)
    far = sum((pair.apart or 0.0) > 0.15 for pair in twice)
    return (
        f"{len(twice)} of {len(found)} were measured twice, half of them at most {percent(middle)} apart, "
        f"{far} more than 15 %, the worst {percent(twice[-1].apart or 0.0)} ({twice[-1]})"
    )


def targets(kind: str) -> str:
    """Of all device folders of a kind; where there is none every target is unmeasured."""
    here = folders(kind)  # type: ignore[arg-type]
    columns: list[list[tuple[Target, float | None, Verdict]]] = [evaluate(folder) for folder in here]
    lines = []
    for i, target in enumerate(target for target in TARGETS if target.on == kind):
        found = [shown_verdict(target, *column[i][1:]) for column in columns] or ["unmeasured"]
        lines.append([target.name, asked(target), *found])
    return table(["target on a " + kind.upper(), "asked", *(here or ["measured"])], lines)


def asked(target: Target) -> str:
    if target.unit == "runs":
        return "runs"
    words = "at least" if target.comparison == ">=" else "at most"
    scale, unit = (100, " %") if target.unit == "%" else (1, "x")
    return f"{words} {scale * target.threshold:.3g}{unit}"


def shown(target: Target, value: float) -> str:
    if target.unit == "runs":
        return "runs" if value else "does not"
    return percent(value) if target.unit == "%" else times(value)


def shown_verdict(target: Target, value: float | None, verdict: Verdict) -> str:
    if value is None:
        return f"**{verdict}**" if verdict == "missed" else verdict
    text = f"{shown(target, value)}, {verdict}"
    return f"**{text}**" if verdict == "missed" else text


# --- the pages ------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[str], str | None]] = {
    "step": all_of(steps("step"), steps("step_turns")),
    "real-data": steps("real_data"),
    "profile": profile,
    "objective": objective,
    "ops": ops,
    "repeat": repeat,
}  # of a device folder; None where it has no rows for it
NAMED = (*TABLES, "targets")


def render(name: str, kind: str | None) -> str:
    """A table for the devices of a kind, or of both.

    Raises:
        ValueError: there is no such table.
    """
    if name not in NAMED:
        raise ValueError(f"got table {name!r}, expected one of {', '.join(NAMED)}")
    parts = []
    for one in (kind,) if kind else ("cpu", "gpu"):
        if name == "targets":
            parts.append(targets(one))
            continue
        found = [text for folder in folders(one) if (text := TABLES[name](folder)) is not None]  # type: ignore[arg-type]
        parts += found or [NO_GPU if one == "gpu" else "unmeasured: no rows of a CPU"]
    return "\n\n".join(parts) + "\n"


def body_of(part: re.Match[str], page: Path) -> str:
    """What its marks are to hold. Links lead from the page's own folder."""
    up = "../" if page.parent.name == "docs" else ""
    return render(part["name"], part["kind"]).replace("](benchmarks/", f"]({up}benchmarks/")


def rewritten(text: str, page: Path = PAGES[0]) -> str:
    """A page's text with its parts made anew. Raises ValueError where a part's name is unknown."""
    return MARKED.sub(lambda part: part[1] + body_of(part, page) + part[5], text)


def check(*pages: Path) -> list[str]:
    """What is stale, part by part, and which tables none of the pages has; [] where all is well. Default: `PAGES`."""
    wrong, there = [], set()
    for page in pages or PAGES:
        text = page.read_text(encoding="utf-8")
        found = [*MARKED.finditer(text)]
        there |= {part["name"] for part in found}
        if text.count("<!-- table:") != len(found) or text.count("<!-- /table -->") != len(found):
            wrong.append(f"{page.name}: a `<!-- table: NAME -->` or `<!-- /table -->` without the other")
        for part in found:
            if part["body"] != body_of(part, page):
                wrong.append(f"stale: {part['name']}" + (f" {part['kind']}" if part["kind"] else ""))
    names = ", ".join(page.name for page in pages or PAGES)
    return [*(f"no part of {names}: {name}" for name in NAMED if name not in there), *wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the pages from the committed rows.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a part is stale")
    parser.add_argument("pages", type=Path, nargs="*", help="default: README.md and docs/benchmarks.md")
    options = parser.parse_args()
    for page in [] if options.check else options.pages or PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    wrong = check(*options.pages)
    print("\n".join(wrong) or "all tables are fresh")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
