"""Text on its way out, to a file or to stdout: all of it, or an error that says why not."""

import os
import secrets
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from ibft.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Puts a file with this text, in UTF-8, in the place of what was there; where that fails, the old file stays.

    Behind a symlink the file that it leads to is replaced; a device or a pipe is written to. Rights are the old file's.

    Raises:
        OSError: it cannot be written. ValueError: no path, with a NUL for instance.
    """
    target = Path(os.path.realpath(path))
    if path.exists() and not target.is_file():  # /dev/stdout leads to a pipe, which has no name
        path.write_text(text, "utf-8", "backslashreplace", "\n")
        return
    fresh = target.with_name(f".{secrets.token_hex(4)}.new")  # the name may be as long as a name can be
    try:
        with fresh.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            target.open("ab").close()  # one that may not be written may not be replaced
            shutil.copymode(target, fresh)
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def to_stdout(text: str) -> None:
    """At once, through any buffer.

    Raises:
        DataError: stdout is closed, or takes no more. BrokenPipeError: who read it has left; the command line ends.
    """
    if sys.stdout is None:
        raise DataError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python tries again at its end, and says so over many lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise DataError(f"standard output: {error.strerror or error}") from error
