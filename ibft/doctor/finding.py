"""What a check of `ibft-fast doctor` comes to."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """state: "missing" where training needs it, "warning" where something can be mended, "note" where nothing must be.
    found: what there is. advice: what to do about it, "" for nothing. Both are one line."""

    state: State
    found: str
    advice: str = ""


def first_line(error: object) -> str:
    """What an error, or a program, says first; with the name of an error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if isinstance(error, BaseException):
        return f"{type(error).__name__}: {said}" if said else type(error).__name__
    return said
