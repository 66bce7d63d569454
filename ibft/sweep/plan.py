"""What a sweep is, from what the user typed: all of it is read and checked here, before the first run starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ibft.config import BUNDLED, Config, ModelConfig
from ibft.errors import ConfigError
from ibft.evaluation.suites import Rule
from ibft.experiment.measure import Suite
from ibft.hashes import hash_file
from ibft.sweep.grid import Cell, Grid, load_base, make_cells, read_grid, suggested_grid

Tree = dict[str, Any]
VALIDATION, TEST = "validation", "test"
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Asked:
    """What the user typed beside the configuration and the grid. tasks: files or hub ids; None: not named."""

    suite: str = "jsonl-tests"
    validation: str | None = None
    test: str | None = None
    descriptions: str | None = None
    n: int = 10
    temperature: float = 0.6
    ks: str | None = None
    max_new_tokens: int | None = None
    rule: Rule = "strict"
    most: str | None = None
    least: str | None = None


@dataclass(frozen=True)
class Sweep:
    """base: what all cells share. tasks: how they are sampled, None: there are none; splits: file or hub id of each
    split as it is loaded. groups: files of ids for geometry. ks: of Pass@k(k), 1 first."""

    out: Path
    base: Config
    grid: Grid
    baseline: Cell
    cells: Sequence[Cell]
    seeds: Sequence[int]
    tasks: Suite | None
    splits: Mapping[str, str]
    groups: Mapping[str, str] | None
    ks: Sequence[int]

    @property
    def runs(self) -> list[tuple[Cell, int]]:
        """The baseline first: a sweep that is stopped can be read."""
        return [(cell, seed) for cell in (self.baseline, *self.cells) for seed in self.seeds]

    def settings(self, threads: int | None) -> Tree:
        """What a sweep's folder belongs to. threads: of torch in a job; the numbers depend on it."""
        named = {
            "data.path": self.base.data.path, "data.eval_path": self.base.data.eval_path, **self.splits,
            "descriptions": self.tasks.descriptions if self.tasks else None, **(self.groups or {}),
        }  # fmt: skip
        return config_of(self.base) | {
            "grid": self.grid, "seeds": list(self.seeds), "threads": threads, "tasks": tasks_of(self.tasks),
            "files": {name: hash_file(path) for name, path in named.items()},
        }  # fmt: skip


def config_of(config: Config) -> Tree:
    """Of a run, as JSON, whatever its seed and the tasks that only `train` asks."""
    tree = config.model_dump(mode="json")
    del tree["runtime"]["seed"]
    return tree | {"eval": tree["eval"] | {"tasks": None}}


def tasks_of(suite: Suite | None) -> Tree | None:
    """The fields of a suite, as JSON, but where its problems lie."""
    if suite is None:
        return None
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(suite).items() if name != "problems"}


def plan_sweep(
    path: str | None, overrides: list[str], grid: Sequence[str], seeds: str, asked: Asked, out: Path
) -> tuple[Sweep, list[str]]:
    """The sweep, and notices.

    Raises:
        ConfigError, DataError, SetupError: whatever a run, its sampling or its judging would refuse.
    """
    base, notices = load_base(path, overrides)
    base, chosen_seeds = resolve(base), read_seeds(seeds)
    named, more = read_grid(grid)
    if not named:
        named = suggested_grid(depth_of(base.model))
    baseline, cells = make_cells(path, overrides, named, resolve)
    tasks, splits, ks = plan_tasks(base, asked)
    groups = plan_geometry([cell.config for cell in cells], asked)
    if tasks is None and base.data.val_size == 0 and base.data.eval_path is None:
        raise ConfigError(
            "nothing to choose a cell by: name --validation TASKS, or held-out rows (data.eval_path, data.val_size)"
        )
    if base.model.revision is not None and (tasks or groups):
        raise ConfigError("model.revision: samples are drawn from the main revision alone; name a local folder instead")
    return Sweep(out, base, named, baseline, cells, chosen_seeds, tasks, splits, groups, ks), [*notices, *more]


def resolve(config: Config) -> Config:
    """With the layer as a number. Raises ConfigError: the base has no such layer. SetupError: no such base."""
    from ibft.model import resolve_layers

    runtime = config.runtime.model_copy(update={"seed": 0})
    evaluation = config.eval.model_copy(update={"tasks": None})
    layer = resolve_layers(config.ib.layer if config.ib.alpha > 0 else "auto", depth_of(config.model))
    ib = config.ib.model_copy(update={"layer": layer})
    return config.model_copy(update={"ib": ib, "runtime": runtime, "eval": evaluation})


@cache
def depth_of(model: ModelConfig) -> int:
    from ibft.model import load_model_config

    if model.name_or_path == BUNDLED:
        os.environ["HF_HUB_OFFLINE"] = "1"  # it is on disk: no library need ask the network for anything
    depth: int = load_model_config(model, needs_weights=False).num_hidden_layers
    return depth


def read_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= MOST_SEED for seed in seeds):
        raise ConfigError(f"--seeds: got {text}, expected different numbers from 0, as in 0,1,2")
    return seeds


def read_ks(text: str | None, n: int) -> list[int]:
    """1 is always among them. Default: 1, and 10 or as many as there are samples."""
    from ibft.evaluation.score import parse_ks

    found = [min(10, n)] if text is None else parse_ks(text)
    if found[-1] > n:
        raise ConfigError(f"--k: got {text}, expected at most the samples of a problem (-n {n})")
    return sorted({1, *found})


def plan_tasks(base: Config, asked: Asked) -> tuple[Suite | None, dict[str, str], list[int]]:
    """How samples are drawn, the splits, the ks. Problems, prompts and the judge's tools are tried."""
    from ibft.evaluation.generate_samples import check_numbers, load_prompts, parse_temperatures
    from ibft.evaluation.judge import make_judge
    from ibft.evaluation.prompts import choose_style
    from ibft.evaluation.suites import load_problems, suite_of

    kind = suite_of(asked.suite)
    splits = {name: path for name, path in ((VALIDATION, asked.validation), (TEST, asked.test)) if path is not None}
    if not splits and base.data.path == BUNDLED and asked.suite == "jsonl-tests":
        splits = {VALIDATION: BUNDLED, TEST: BUNDLED}
    if not splits:
        return None, {}, [1]
    if VALIDATION not in splits:
        raise ConfigError("--test: a cell is chosen on other tasks: name them with --validation")
    from ibft.tiny import task_file

    splits = {name: str(task_file(name)) if path == BUNDLED else path for name, path in splits.items()}
    longest = base.eval.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
    check_numbers(n=asked.n, max_new_tokens=longest, batch_size=base.eval.batch_size, concurrency=1, seed=0, top_p=1)
    ks = read_ks(asked.ks, asked.n)
    temperatures = tuple(parse_temperatures(f"{asked.temperature:g}", asked.n))
    if asked.descriptions is not None and asked.suite != "verilogeval-v1":
        raise ConfigError(f"--descriptions: only verilogeval-v1 has them apart, got --suite {asked.suite}")
    suite = Suite(
        asked.suite, asked.n, temperatures, descriptions=asked.descriptions, max_new_tokens=longest,
        batch_size=base.eval.batch_size, rule=asked.rule,
    )  # fmt: skip
    style = choose_style(suite.prompt_style, suite.suite, template=base.data.template)
    problems = {}
    for name, path in splits.items():
        load_prompts(kind, path, suite.descriptions, style)
        problems[name] = load_problems(kind, path)
    if TEST in splits:
        check_apart(problems[VALIDATION], problems[TEST], splits[TEST])
    make_judge(kind, asked.rule)
    return suite, splits, ks


def check_apart(validation: Mapping[str, Tree], test: Mapping[str, Tree], path: str) -> None:
    """Raises ConfigError: a cell would be reported on what it was chosen by."""
    bare = lambda problem: {name: value for name, value in problem.items() if name != "task_id"}  # noqa: E731
    seen = [bare(problem) for problem in validation.values()]
    if both := [name for name, problem in test.items() if bare(problem) in seen]:
        count = "all" if len(both) == len(test) else f"{len(both):,}"
        raise ConfigError(
            f"--test: {count} of the {len(test):,} tasks of {path} are validation tasks too (e.g. {both[0]}): "
            "expected tasks that no cell is chosen by"
        )


def plan_geometry(configs: Sequence[Config], asked: Asked) -> dict[str, str] | None:
    """Files of ids, tried on each data set."""
    if asked.most is None and asked.least is None:
        return None
    if asked.most is None or asked.least is None:
        raise ConfigError("--most and --least: geometry needs both")
    from ibft.analysis.geometry_run import read_groups
    from ibft.analysis.memorization import load_data

    groups = {"most": asked.most, "least": asked.least}
    for path, split in {(config.data.path, config.data.split) for config in configs}:
        if split != "train":
            raise ConfigError(f"--most and --least: geometry reads the rows of data.split=train alone, got {split}")
        rows, _ = load_data(path, split)
        read_groups(groups, rows, path, 0)
    return groups
