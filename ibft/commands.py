"""What every command shares: how an error reaches the user. Imports nothing heavy."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ibft.data.visible import visible
from ibft.errors import EXIT_INTERRUPTED, IBFTError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """What a user can mend is one line on stderr and an exit code; with `debug` a traceback."""
    # transformers 5.23 deprecates names that transformers 5.17 and PEFT still need: nothing a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    try:
        yield
    except IBFTError as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")  # of a launcher: its other processes most often fail alike
        who = "" if rank == "0" else f" (process {rank})"
        print(f"error{who}: {visible(str(error))}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
