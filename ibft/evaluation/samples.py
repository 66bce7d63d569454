"""Files of samples and of verdicts: JSON lines, as HumanEval's.

A sample: `task_id`, `completion` (text), and what else its maker wrote (`sample`, `temperature`, `seed`, `raw`).
A verdict: the sample without its texts, and `line` of the sample, `sha256` of its text, `passed`, `result`, `suite`,
`rule`, `sandbox`.
"""

import gzip
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.errors import DataError

LONGEST = 1 << 20  # bytes of a completion


@dataclass(frozen=True)
class Sample:
    """line: of the file, from 1. fault: why it fails unjudged, though it counts; empty where it is judged."""

    line: int
    task_id: str
    completion: str
    rest: dict[str, Any]
    fault: str = ""

    @property
    def sha256(self) -> str:
        text = f"{self.task_id}\0{self.completion}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_samples(path: str, tasks: Collection[str]) -> tuple[list[Sample], list[str]]:
    """(samples in file order, faults as "line N: ..."). A sample of a known task that cannot be judged is among both;
    what belongs to no task, or was there before, counts nowhere.

    Raises:
        DataError: the file cannot be read, or holds no sample at all.
    """
    samples: list[Sample] = []
    faults: list[str] = []
    seen: dict[tuple[object, ...], int] = {}
    for line, text in lines_of(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            faults.append(f"line {line}: not JSON ({str(error)[:80]})")
            continue
        fault, kept = fault_of(row, tasks)
        if kept and row.get("sample") is not None:
            key = (row["task_id"], repr(row.get("temperature")), repr(row["sample"]))
            if key in seen:
                fault, kept = f"sample {row['sample']} of {row['task_id']} was on line {seen[key]} already", False
            seen.setdefault(key, line)
        if fault:
            faults.append(f"line {line}: {fault}")
        if kept:
            completion = "" if fault else row.pop("completion")
            rest = {name: value for name, value in row.items() if name not in NOT_KEPT}
            samples.append(Sample(line, row["task_id"], completion, rest, fault))
    if not samples and not faults:
        raise DataError(f"{path}: holds no sample")
    return samples, faults


NOT_KEPT = ("task_id", "completion", "raw", "line", "sha256", "passed", "result", "rule", "sandbox")


def fault_of(row: object, tasks: Collection[str]) -> tuple[str, bool]:
    """(what is wrong, whether it counts as a sample of its task all the same)."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, expected an object", False
    if not isinstance(row.get("task_id"), str):
        return "no text under task_id", False
    if row["task_id"] not in tasks:
        return f"unknown task {row['task_id'][:80]}", False
    completion = row.get("completion")
    if not isinstance(completion, str):
        return f"completion is {type(completion).__name__}, expected text", True
    if (size := len(completion.encode("utf-8", "surrogatepass"))) > LONGEST:
        return f"a completion of {size:,} bytes, at most {LONGEST:,}", True
    return "", True


def lines_of(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a file, plain or gzipped. Bytes that are no UTF-8 stay visible as \\ufffd."""
    file = Path(path).expanduser()
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8", "replace")
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_verdicts(path: str) -> list[dict[str, Any]]:
    """All rows. Raises DataError for a line that is no verdict: a judge that is stopped may leave half a last one."""
    rows: list[dict[str, Any]] = []
    for number, text in lines_of(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, line {number}: not JSON (a judge that was stopped? let it go on)") from None
        told = isinstance(row, dict) and isinstance(row.get("task_id"), str) and isinstance(row.get("passed"), bool)
        if not told:
            raise DataError(f"{path}, line {number}: expected an object with task_id and passed")
        rows.append(row)
    return rows
