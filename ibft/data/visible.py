"""Text of data on a terminal: what it cannot spell ends no command, and what would steer it is shown instead."""

import io
import re
from typing import TextIO

# control characters but newline and tab, and the marks that turn the direction of writing
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Each steering character as Python spells it, e.g. ESC as \\x1b."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def replace_unknown(stream: TextIO) -> None:
    """From now on a `?` is written for what the stream's encoding lacks; else that is a UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
