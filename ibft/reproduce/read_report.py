"""What a reproduction wrote, checked: every number that figures, claims and page need, and nothing that they compute.

A table may be empty or lack a model. A model that has no training seeds (a base) has seed null. Keys that are not named
here are kept as they are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ibft.errors import DataError

KIND = "ibft-fast reproduction"
FILE = "report.json"
Count = Annotated[int, Field(ge=0)]
Seed = Count | None


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Model(Part):
    """what: in words. base: the model that it was fine-tuned from. changes: to the recipe's settings."""

    name: str
    what: str
    base: str | None = None
    changes: dict[str, Any] = {}


class Suite(Part):
    tasks: Annotated[list[str], Field(min_length=1)]


class Counts(Part):
    """passed: of each task of the suite, in its order, how many of the n samples did."""

    model: str
    seed: Seed
    suite: str
    temperature: Annotated[float, Field(ge=0)] | None
    n: Annotated[int, Field(ge=1)]
    passed: list[Count]


class Memorization(Part):
    """Min-K% of each row of the data, lower = more memorised; null: the row has no score."""

    model: str
    seed: Seed
    data: str
    k: float
    values: list[float | None]


class Deciles(Part):
    """ce: nats a token at that step, of ten parts of the fine-tuning data, that most memorised by the base first."""

    model: str
    seed: Seed
    step: Count
    ce: Annotated[list[float | None], Field(min_length=10, max_length=10)]


class Distance(Part):
    sample: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None


class Geometry(Part):
    """The most against the least memorised rows, as `ibft.analysis.geometry` has it."""

    model: str
    seed: Seed
    layer: Count
    l2: Distance = Distance()
    l2_normalised: Distance = Distance()
    angle: Distance = Distance()
    angle_centred: Distance = Distance()


class Training(Part):
    """How a run ended."""

    model: str
    seed: Seed
    steps: Count | None = None
    eval_ce: float | None = None
    ce: float | None = None
    kl: float | None = None
    ce_z: float | None = None
    active_dims: float | None = None
    warnings: list[str] = []


class Reproduction(Part):
    kind: Literal["ibft-fast reproduction"]
    version: Literal[1]
    name: str
    settings: dict[str, Any] = {}
    commit: str | None = None
    versions: dict[str, str | None] = {}
    device: str = ""
    seeds: list[Count] = []
    models: list[Model]
    suites: dict[str, Suite] = {}
    counts: list[Counts] = []
    memorization: list[Memorization] = []
    deciles: list[Deciles] = []
    geometry: list[Geometry] = []
    training: list[Training] = []


def read_report(path: Path) -> dict[str, Any]:
    """Raises DataError: the file cannot be read, is no report, or contradicts itself."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    try:
        report = Reproduction.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None
    if wrong := next(contradictions(report), None):
        raise DataError(f"{path}: {wrong}")
    return report.model_dump()


def contradictions(report: Reproduction) -> Iterator[str]:
    """One line for each."""
    names = [model.name for model in report.models]
    yield from (f"models: two are named {name}" for name in sorted(names) if names.count(name) > 1)
    for table in ("counts", "memorization", "deciles", "geometry", "training"):
        keys = ("model", "seed", *KEYS[table])
        seen: set[tuple[Any, ...]] = set()
        with_seeds: dict[str, bool] = {}
        for i, row in enumerate(getattr(report, table)):
            if row.model not in names:
                yield f"{table}.{i}: no model is named {row.model}"
            key = tuple(getattr(row, name) for name in keys)
            if key in seen:
                yield f"{table}.{i}: a second row of {', '.join(f'{a} {b}' for a, b in zip(keys, key, strict=True))}"
            seen.add(key)
            if with_seeds.setdefault(row.model, row.seed is not None) != (row.seed is not None):
                yield f"{table}.{i}: {row.model} has rows with a seed and rows without"
    for i, row in enumerate(report.counts):
        if row.suite not in report.suites:
            yield f"counts.{i}: no suite is named {row.suite}"
        elif len(row.passed) != (tasks := len(report.suites[row.suite].tasks)):
            yield f"counts.{i}: got {len(row.passed)} tasks, expected the {tasks} of {row.suite}"
        if max(row.passed, default=0) > row.n:
            yield f"counts.{i}: got {max(row.passed)} of n = {row.n} samples passed"


KEYS = {  # with model and seed: what a row of the table is told by
    "counts": ("suite", "temperature"), "memorization": ("data", "k"), "deciles": ("step",), "geometry": ("layer",),
    "training": (),
}  # fmt: skip
