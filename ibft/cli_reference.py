"""Every command and option: `python -m ibft.cli_reference > docs/cli.md`. typer reads them off the commands themselves.

With several versions of typer the page may be laid out differently; the committed one is that of constraints.txt.
"""

import re
from collections.abc import Iterator
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

from ibft.cli import app

NAME = "ibft-fast"
INTRODUCTION = (
    "Made from the commands by `python -m ibft.cli_reference > docs/cli.md`. Settings are in [config.md](config.md).\n"
)


def reference() -> str:
    """docs/cli.md."""
    command = get_command(app)
    for each in _commands(command):
        each.short_help = " ".join((each.help or "").partition("\n\n")[0].split())  # in lists; else typer cuts it
    context: Any = command.make_context(NAME, [], resilient_parsing=True)
    page = get_docs_for_click(obj=command, ctx=context, name=NAME)
    title, _, rest = page.partition("\n\n")
    # outside code Markdown would take <time> for HTML
    rest = re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", rest)
    return f"{title}\n\n{INTRODUCTION}\n{rest.strip()}\n"


def _commands(command: Any) -> Iterator[Any]:
    for each in getattr(command, "commands", {}).values():
        yield each
        yield from _commands(each)


if __name__ == "__main__":
    print(reference(), end="")
