"""Rows of benchmarks/results/<device>/<bench>.csv: the one writer and the one reader. Imports no torch: plots and
tables read rows where none is installed.

The columns before `result` say what was measured, and together are a row's key; those from `result` on say what was
found: ok, incorrect, out of memory, failed. Of each key the file keeps the last two rows: what is known, and how well
it repeats.
"""

import csv
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("IBFT_RESULTS") or ROOT / "benchmarks" / "results")
KEPT = 2

FOUND = ("result", "p50_ms", "p20_ms", "p80_ms", "rounds", "ours_speedup", "peak_mib", "peak_reserved_mib")
RATES = ("gb_per_s", "tflop_per_s", "ceiling_gb_per_s", "ceiling_tflop_per_s", "ceiling_share")
WHERE = ("device", "threads", "versions", "commit", "time")
OP_COLUMNS = ("op", "provider", "mode", "N", "D", "Z", "V", "detail", "dtype", *FOUND, *RATES, *WHERE)
STEP_COLUMNS = (
    "op", "provider", "model", "layout", "alpha", "N", "T", "B", "L", "V", "labelled", "card_gib", "dtype",
    *FOUND, "padding", "tokens_per_s", "tflop_per_s", "ceiling_tflop_per_s", "ceiling_share", *WHERE,
)  # fmt: skip

Row = Mapping[str, object]


def append(folder: str, bench: str, columns: Sequence[str], rows: Iterable[Row]) -> Path:
    """Add rows to results/<folder>/<bench>.csv; what a row does not name stays blank. Earlier rows of other columns
    give way: they were written by other code.

    Raises:
        ValueError: a row has a column that the file has not.
    """
    new = [{name: str(row.get(name, "")) for name in columns} for row in rows if not _unknown(row, columns, bench)]
    path = path_of(folder, bench)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = read(path)
    lines = [*(old if old and [*old[0]] == [*columns] else []), *new]
    kept, seen = [], {}
    for row in reversed(lines):
        seen[key(row)] = seen.get(key(row), 0) + 1
        if seen[key(row)] <= KEPT:
            kept.append(row)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(reversed(kept))
    partial.replace(path)  # whole, or not at all
    return path


def path_of(folder: str, bench: str) -> Path:
    return RESULTS / folder / f"{bench}.csv"


def _unknown(row: Row, columns: Sequence[str], bench: str) -> bool:
    if unknown := [*row.keys() - set(columns)]:
        raise ValueError(f"{bench}: got columns {', '.join(sorted(unknown))}, expected {', '.join(columns)}")
    return False


def read(path: Path) -> list[dict[str, str]]:
    """In the order in which they were written; [] where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def key(row: Mapping[str, str]) -> tuple[str, ...]:
    """The values of the columns before `result`."""
    names = [*row]
    return tuple(row[name] for name in names[: names.index("result")])


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The last row of each key, in the order of the keys' first appearance."""
    return [*{key(row): row for row in rows}.values()]


def percentiles(times_ms: Sequence[float]) -> dict[str, str]:
    """p50_ms, p20_ms and p80_ms with rounds; {} of no times."""
    times = sorted(times_ms)
    if not times:
        return {}
    middle = (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2
    return {
        "p50_ms": f"{middle:.4g}",
        "p20_ms": f"{times[len(times) // 5]:.4g}",
        "p80_ms": f"{times[len(times) * 4 // 5]:.4g}",
        "rounds": str(len(times)),
    }


SOURCES = ("ibft", "kernels", "benchmarks")
PRESENTATION = "benchmarks/report"


def commit() -> str:
    """The commit that last changed the code that is measured, with "-dirty" where it has been changed since.

    Not HEAD: committing rows or prose would make every row look old. Without git, a hash of that code.
    """
    paths = [f"{folder}/*.py" for folder in SOURCES] + ["kernels/*.json", f":!{PRESENTATION}"]
    if found := _git("log", "-1", "--format=%h", "--abbrev=7", "--", *paths):
        return found + ("-dirty" if _git("status", "--porcelain", "--", *paths) else "")
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and ROOT / PRESENTATION not in path.parents:
                digest.update(path.read_bytes())
    return f"src-{digest.hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
