"""`ibft-fast init`: a configuration to start from, with every key, its value and what it means.

The values are those of a preset, or of the bundled model, so that a run of the file is a run of that preset until
something is changed. Meanings and choices are `ibft.config_reference`'s, read from `ibft.config`.
"""

import sys
import textwrap
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ibft.config_reference import Setting, settings
from ibft.errors import ConfigError
from ibft.load_config import load_config, read_yaml

SCHEMA_FILE = "ibft-fast.schema.json"
BUNDLED_PRESET = "tiny"
WIDTH = 100  # of a comment
PLAIN = ("text", "true or false")  # goes without saying, beside a value
HEAD = """\
# yaml-language-server: $schema={schema}
# An editor with the YAML language server completes and checks this file by the line above, once
# `ibft-fast schema -o {schema}` has written that file beside it.
#
# Every setting, with the values of the preset {name}: what the preset sets is marked with its name, the rest
# are defaults. A key that is left out has its default, or what `preset` says.
"""


def run_init(preset: str | None, out: str, *, force: bool) -> None:
    """Write the file, or with `-` print it.

    Raises:
        ConfigError: no such preset; `out` is there already, and not `force`. DataError: it cannot be written.
    """
    text = starter(preset)
    if out == "-":
        sys.stdout.write(text)
        return
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"--out: {path} is a folder, expected a file's name")
    if path.exists() and not force:
        raise ConfigError(f"--out: {path} is there already: choose another name, or overwrite it with --force")
    from ibft.evaluation.score import write

    write(path, text)
    print(f"{path}: written; check it with: ibft-fast train {path} --dry-run")


def starter(preset: str | None = None) -> str:
    """The file's text. Loaded, it is the configuration of `preset`, or without one that of no arguments at all.

    Raises:
        ConfigError: no such preset.
    """
    config, _ = load_config(None, [] if preset is None else [f"preset={preset}"])
    resolved = config.model_dump(mode="json")
    name = preset or BUNDLED_PRESET
    chosen = read_yaml(Path(str(files("ibft").joinpath("presets", f"{name}.yaml"))))
    lines = [HEAD.format(schema=SCHEMA_FILE, name=name)]
    opened: list[str] = []  # sections that enclose the line before
    for setting in settings():
        *sections, _ = setting.key.split(".")
        lines += opening(sections, opened)
        opened = sections
        mark = "" if value_at(chosen, setting.key) is None else f"  # {name}"
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
