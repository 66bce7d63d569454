"""The folder of an experiment belongs to one set of settings, which lie in it: the same go on, others are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ibft.errors import ConfigError, DataError
from ibft.experiment.jobs import write_whole
from ibft.lock import LOCK, hold

Tree = dict[str, Any]


def begin(out: Path, settings: Tree, *, file: str, what: str) -> None:
    """Makes the folder, or finds that it is of these settings; holds its lock from then on.

    Args:
        settings: JSON. file: of them, in the folder. what: the experiment, for people.

    Raises:
        ConfigError: `out` is the folder of something else, of other settings, or in use.
        DataError: it cannot be written.
    """
    path = out / file
    try:
        if path.exists():
            there = read_settings(path, what)
            if there != settings:
                changed = ", ".join(list(differences(there, settings))[:3])
                raise ConfigError(f"{out} was begun with other settings ({changed}): name another folder with -o")
            hold(out)
            return
        half_written = {f".{file}.new", LOCK}  # by one that was killed in here
        if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - half_written):
            raise ConfigError(f"{out} exists and holds no {what}: name another folder with -o")
        out.mkdir(parents=True, exist_ok=True)
        hold(out)
        write_whole(path, settings)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error


def read_settings(path: Path, what: str) -> Tree:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no settings of a {what}: name another folder with -o, or delete this one")
    return found


def differences(a: Tree, b: Tree, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys in which two trees differ."""
    for key in dict.fromkeys([*a, *b]):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"
