"""The suites that are judged here: what a problem of each holds, and how long a sample of it may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ibft.data.sources import load_rows
from ibft.errors import ConfigError, DataError

Rule = Literal["official", "strict"]
Problem = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """fields: text that every problem has. lists: fields that are lists of text. hub: data set and split read where no
    file is given. timeout: seconds, the suite's own. canonical: the field of the reference solution.
    """

    name: str
    fields: Sequence[str]
    canonical: str
    timeout: float
    hub: tuple[str, str] | None = None
    lists: Sequence[str] = ()


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "humaneval", ("prompt", "entry_point", "test"), "canonical_solution", 3.0,
            ("openai/openai_humaneval", "test"),
        ),
        Suite("mbpp", (), "code", 3.0, ("google-research-datasets/mbpp", "test"), lists=("test_list",)),
        Suite("verilogeval-v1", ("prompt", "test"), "canonical_solution", 30.0),
        Suite("gsm8k", ("question", "answer"), "answer", 1.0, ("openai/gsm8k", "test")),
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
    for number, row in enumerate(load_rows(path, split=split), start=1):
        name = str(row["task_id"]) if row.get("task_id") is not None else f"{suite.name}/{number}"
        missing = [field for field in suite.fields if not isinstance(row.get(field), str)]
        missing += [field for field in suite.lists if not is_texts(row.get(field))]
        if missing:
            raise DataError(f"{path}, problem {number} ({name}): expected text under {', '.join(missing)}")
        if name in problems:
            raise DataError(f"{path}, problem {number}: a second one is named {name}")
        problems[name] = row | {"task_id": name}
    return problems


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
