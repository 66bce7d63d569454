"""`ibft-fast init`: a configuration to start from, with every key, its value and what it means.

The values are those of a preset, or the defaults for a model of the user's, or those of the bundled model, so that a
run of the file is a run of these until something is changed. Meanings and choices are
`ibft.config_reference`'s, read from `ibft.config`.
"""

import json
import os
import textwrap
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ibft.config import BUNDLED
from ibft.config_reference import Setting, settings
from ibft.errors import ConfigError, DataError
from ibft.load_config import load_config, preset_names, read_yaml
from ibft.output import to_stdout

SCHEMA_FILE = "ibft-fast.schema.json"
BUNDLED_PRESET = "tiny"
WIDTH = 100  # of a comment
PLAIN = ("text", "true or false")  # goes without saying, beside a value
HEAD = """\
# yaml-language-server: $schema={schema}
# An editor with the YAML language server completes and checks this file by the line above, once
# `ibft-fast schema -o {schema}` has written that file beside it.
#
# {values}
# A key that is left out has its default, or what `preset` says.
"""
OF_A_PRESET = """\
Every setting, with the values of the preset {name}: what the preset sets is marked with its name, the rest
# are defaults."""
OF_THE_BUNDLED = """
# They suit the bundled model of 3.5 M parameters and no other: for yours, `ibft-fast init --model ID --data FILE`."""


def run_init(preset: str | None, out: str, *, force: bool, model: str | None = None, data: str | None = None) -> None:
    """Write the file, or with `-` print it.

    Raises:
        ConfigError: as `starter`; `out` is there already, and not `force`. DataError: it cannot be written.
    """
    text = starter(preset, model, data)
    if out == "-":
        to_stdout(text)
        return
    path = Path(os.path.expanduser(out))  # a shell leaves the ~ of --out=~/config.yaml
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a locked folder, a name too long
        raise DataError(f"{path}: {error.strerror or error}") from error
    if is_folder:
        raise ConfigError(f"--out: {path} is a folder, expected a file's name")
    if is_there and not force:
        raise ConfigError(f"--out: {path} is there already: choose another name, or overwrite it with --force")
    from ibft.evaluation.score import write

    write(path, text)
    print(f"{path}: written; check it with: ibft-fast train {path} --dry-run")


def starter(preset: str | None = None, model: str | None = None, data: str | None = None) -> str:
    """The file's text. Loaded, it is the configuration of what is given, or that of no arguments at all.

    model, data: hub ids or paths; with a model of the user's and no preset the rest are the defaults.

    Raises:
        ConfigError: no such preset; a model or data without a name.
    """
    named = {"model.name_or_path": model, "data.path": data}
    overrides = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    config, _ = load_config(None, overrides if preset is None else [f"preset={preset}", *overrides])
    if config.preset != preset:  # YAML's reading of an empty name, of null, of a # in it
        raise ConfigError(f"--preset: got {preset!r}, expected one of {', '.join(preset_names())}")
    resolved = config.model_dump(mode="json")
    name = preset or (BUNDLED_PRESET if config.model.name_or_path == BUNDLED else None)
    chosen, values = {}, "Every setting, with its default."
    if name is not None:
        chosen = read_yaml(Path(str(files("ibft").joinpath("presets", f"{name}.yaml"))))
        values = OF_A_PRESET.format(name=name) + (OF_THE_BUNDLED if name == BUNDLED_PRESET else "")
    lines = [HEAD.format(schema=SCHEMA_FILE, values=values)]
    opened: list[str] = []  # sections that enclose the line before
    for setting in settings():
        *sections, _ = setting.key.split(".")
        lines += opening(sections, opened)
        opened = sections
        of_preset = value_at(chosen, setting.key) is not None and named.get(setting.key) is None
        mark = f"  # {name}" if of_preset else ""
        lines += entry(setting, value_at(resolved, setting.key), mark)
    return "\n".join(lines) + "\n"


def opening(sections: list[str], opened: list[str]) -> Iterator[str]:
    """The lines that begin the sections in which the line before was not."""
    for depth, name in enumerate(sections):
        if opened[: depth + 1] != sections[: depth + 1]:
            if depth == 0:
                yield ""
            yield "  " * depth + f"{name}:"


def entry(setting: Setting, value: Any, mark: str) -> Iterator[str]:
    """What a key means and takes, as comments; then the key."""
    *sections, name = setting.key.split(".")
    indent = "  " * len(sections)
    takes = "" if setting.values in PLAIN else f"[{setting.values}]"
    comment = f"{indent}# "
    yield from textwrap.wrap(
        f"{setting.meaning} {takes}".strip(), WIDTH, initial_indent=comment, subsequent_indent=comment
    )
    yield f"{indent}{name}: {on_one_line(value)}{mark}"


def value_at(tree: dict[str, Any], key: str) -> Any:
    """None where it is not there."""
    found: Any = tree
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def on_one_line(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
