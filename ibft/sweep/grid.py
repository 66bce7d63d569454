"""The cells of a sweep: every combination of the grid's values, each a configuration that training would take, and the
baseline, plain fine-tuning.

    --grid ib.alpha=0.01,0.1     the values are YAML, as between brackets: [0.01, 0.1]
    --grid ib.layer=4,[4,6]      so that a value can be a list itself

Without --grid: the values that arXiv 2510.16022 suggests, its layers (of 30) scaled by depth.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import yaml

from ibft.config import Config
from ibft.errors import ConfigError
from ibft.load_config import ALIASES, known_keys, load_config

Grid = dict[str, list[Any]]
ALPHAS, BETAS, LAYERS, DEPTH = (0.01, 0.05, 0.1, 0.5, 1), (0.001, 0.01, 0.05, 0.1), (10, 15, 20, 25), 30
BASELINE = "baseline"
ELSEWHERE = {
    "runtime.seed": "a sweep takes its seeds from --seeds",
    "eval.tasks": "a sweep takes its tasks from --validation and --test",
}
LONGEST = 60  # letters of a value in a name


@dataclass(frozen=True)
class Cell:
    """values: of the grid's keys, as the configuration has them; the baseline has none. config: whatever the seed."""

    name: str
    values: Mapping[str, Any]
    config: Config


def read_grid(options: Sequence[str]) -> tuple[Grid, list[str]]:
    """From KEY=V1,V2,...; and notices of aliases taken.

    Raises:
        ConfigError: no such key, one named twice, no value, or no YAML.
    """
    grid: Grid = {}
    notices = []
    for option in options:
        given, sign, text = option.partition("=")
        key = full_key(given.strip())
        if key != given.strip():
            notices.append(f"{given.strip()} is {key} here")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = None
        if not sign or not isinstance(values, list) or not values:
            raise ConfigError(f"--grid: got {option!r}, expected KEY=V1,V2,... (a list as one value: [V1,V2])")
        if key in grid:
            raise ConfigError(f"--grid: {key} is there twice; its values go into one, as in {key}=V1,V2")
        if key in ELSEWHERE:
            raise ConfigError(f"--grid {key}: {ELSEWHERE[key]}")
        if key.startswith("eval."):
            raise ConfigError(f"--grid {key}: every run of a sweep is asked alike")
        grid[key] = values
    return grid, notices


def full_key(key: str) -> str:
    """As the configuration has it. Raises ConfigError for an unknown one, as `load_config` does."""
    if key not in set(known_keys()) and key not in ALIASES:
        load_config(None, [f"{key}=0"])
    return ALIASES.get(key, key)


def suggested_grid(depth: int) -> Grid:
    layers = dict.fromkeys(min(max(1, round(layer * depth / DEPTH)), depth - 1) for layer in LAYERS)
    return {"ib.alpha": list(ALPHAS), "ib.beta": list(BETAS), "ib.layer": list(layers)}


def load_base(path: str | None, overrides: list[str]) -> tuple[Config, list[str]]:
    """What all cells share, and notices: also of what is set for one run and is no business of a sweep's."""
    config, notices = load_config(path, overrides)
    for key, why in ELSEWHERE.items():
        section, name = key.split(".")
        if name in getattr(config, section).model_fields_set and value_of(config, key) is not None:
            notices.append(f"{key} is left out: {why}")
    return config, notices


def make_cells(
    path: str | None, overrides: list[str], grid: Grid, resolve: Callable[[Config], Config]
) -> tuple[Cell, list[Cell]]:
    """The baseline, and the grid's cells in its order.

    Args:
        path, overrides: as of `load_config`. resolve: checks a configuration against its base, and fills it in.

    Raises:
        ConfigError: a cell that training would refuse, two of the same settings, one that is the baseline.
    """
    baseline = Cell(BASELINE, {}, resolve(load_config(path, [*overrides, "ib.alpha=0"])[0]))
    cells: list[Cell] = []
    for values in product(*grid.values()):
        changes = [f"{key}={json.dumps(value, default=str)}" for key, value in zip(grid, values, strict=True)]
        config = resolve(load_config(path, [*overrides, *changes])[0])
        if config.ib.alpha == 0:
            raise ConfigError("ib.alpha: 0 is plain fine-tuning, the baseline that a sweep always runs: expected more")
        found = {key: value_of(config, key) for key in grid}
        cell = Cell(name_of(found), found, config)
        for other in cells:
            if other.config == config:
                raise ConfigError(f"--grid: {' '.join(changes)} are the settings of {other.name} again")
            if other.name == cell.name:
                raise ConfigError(f"--grid: two cells would be named {cell.name}: expected values that differ in it")
        cells.append(cell)
    return baseline, cells


def value_of(config: Config, key: str) -> Any:
    value = reduce(getattr, key.split("."), config)
    return list(value) if isinstance(value, tuple) else value


def name_of(values: Mapping[str, Any]) -> str:
    """alpha-0.05_beta-0.01_layer-5, in letters that every file system takes."""
    return "_".join(
        f"{short}-{in_letters(value)}" for short, value in zip(short_keys(values), values.values(), strict=True)
    )


def short_keys(keys: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Without their sections, where that tells them apart."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return [key if leaves.count(leaf) > 1 else leaf for key, leaf in zip(keys, leaves, strict=True)]


def in_letters(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(in_letters, value))
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in ".+-" else "-" for letter in text)[-LONGEST:]
