"""The suites that are judged here: what a problem of each holds, and how long a sample of it may take."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ibft.config import BUNDLED
from ibft.data.sources import load_rows
from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.verilogeval_v2 import read_folder
from ibft.tiny import task_file

Rule = Literal["official", "strict"]
Problem = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """fields: text that every problem has. lists: fields that are lists of text. hub: data set and split read where no
    file is given. timeout: seconds, the suite's own. canonical: the field of the reference solution. packages: what its
    programs and tests may import beside the standard library.
    """

    name: str
    fields: Sequence[str]
    canonical: str
    timeout: float
    hub: tuple[str, str] | None = None
    lists: Sequence[str] = ()
    packages: Sequence[str] = ()


# EvalPlus ends a problem after 60 s at the latest; the largest tests of HumanEval+ take seconds here.
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "humaneval", ("prompt", "entry_point", "test"), "canonical_solution", 3.0,
            ("openai/openai_humaneval", "test"),
        ),
        Suite("mbpp", (), "code", 3.0, ("google-research-datasets/mbpp", "test"), lists=("test_list",)),
        Suite(
            "humaneval-plus", ("prompt", "entry_point", "test"), "canonical_solution", 30.0,
            ("evalplus/humanevalplus", "test"), packages=("numpy",),
        ),
        Suite(
            "mbpp-plus", ("test",), "code", 60.0, ("evalplus/mbppplus", "test"), lists=("test_list",),
            packages=("numpy",),
        ),
        Suite("verilogeval-v1", ("prompt", "test"), "canonical_solution", 30.0),
        Suite("verilogeval-v2", ("prompt", "test", "ref"), "canonical_solution", 30.0),
        Suite("verilogeval-v2-complete", ("prompt", "test", "ref", "ifc"), "canonical_solution", 30.0),
        Suite("gsm8k", ("question", "answer"), "answer", 1.0, ("openai/gsm8k:main", "test")),
        Suite("jsonl-tests", ("entry_point", "test"), "output", 5.0),
    )
}  # fmt: skip


def suite_of(name: str) -> Suite:
    """Raises ConfigError for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"--suite: got {name}, expected one of {', '.join(SUITES)}")
    return SUITES[name]


def load_problems(suite: Suite, path: str | None) -> dict[str, Problem]:
    """By task_id, in file order. A problem without one gets its number: `mbpp/11` of MBPP's own, else `name/place`.

    Raises:
        ConfigError: no path, and the suite is on no hub.
        DataError: as load_rows; a problem lacks a field, or two have one name.
    """
    split = "test"
    if path is None:
        if suite.hub is None:
            raise ConfigError(f"--problems: {suite.name} needs a file")
        path, split = suite.hub
    problems: dict[str, Problem] = {}
    in_parts = suite.name.startswith("verilogeval-v2") and Path(path).expanduser().is_dir()
    if path == BUNDLED:  # its tasks, as `train` takes them for Pass@1
        path = str(task_file("test"))
    rows = read_folder(Path(path).expanduser()) if in_parts else load_rows(path, split=split)
    for number, row in enumerate(rows, start=1):
        name = str(row["task_id"]) if row.get("task_id") is not None else f"{suite.name}/{number}"
        missing = [field for field in suite.fields if not isinstance(row.get(field), str)]
        missing += [field for field in suite.lists if not is_texts(row.get(field))]
        if missing:
            raise DataError(f"{path}, problem {number} ({name}): expected text under {', '.join(missing)}")
        if name in problems:
            raise DataError(f"{path}, problem {number}: a second one is named {name}")
        problems[name] = row | {"task_id": name}
    return problems


def package_folders(suite: Suite) -> dict[str, str]:
    """Of each of its packages, the folder that holds it. Raises SetupError where one is not installed."""
    folders = {}
    for name in suite.packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SetupError(f"{suite.name} needs {name}, which its tests import (pip install {name})")
        folders[name] = str(Path(spec.origin).parents[1])
    return folders


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
