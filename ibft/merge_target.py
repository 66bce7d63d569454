"""The folder of a merged model: all of it is there at the end, or nothing, however the merge ends.

    DIR is not there     .DIR.new beside it is filled, and takes its name at the end
    DIR is there, empty  DIR/.new is filled, and its files are moved up, merged.json last: DIR may be a mount point, or
                         the folder that a shell stands in

What a killed merge has left is known by the marker in it, and removed by the next; nobody else's folder is.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibft.checkpoint import os_errors
from ibft.console import size
from ibft.errors import ConfigError, SetupError
from ibft.experiment.jobs import stopping_with_us
from ibft.trained import MERGED

MARKER = ".ibft-fast-merge"  # in a folder that a merge has not finished


def fresh_folder_of(out: Path) -> tuple[Path, Path]:
    """Where the model is to be, and the folder that is filled first. Nothing is made or removed yet.

    Raises:
        ConfigError: `out` is a file, or holds something, or something else has the name of the folder to be filled.
    """
    try:
        target = out.expanduser().resolve()
        if target.exists() and not target.is_dir():
            raise ConfigError(f"--out: {out} is a file, expected a folder")
        fresh = target / ".new" if target.is_dir() else target.with_name(f".{target.name}.new")
        if target.is_dir() and any(each != fresh for each in target.iterdir()):
            raise ConfigError(f"--out: {out} is not empty: choose another folder")
        if os.path.lexists(fresh) and not _is_ours(fresh):
            raise ConfigError(f"--out: {fresh} is in the way, and no merge has left it: move it, or choose another -o")
    except (OSError, RuntimeError) as error:  # a locked folder, a name too long, no such user's home
        raise ConfigError(f"--out: {out}: {getattr(error, 'strerror', None) or error}") from error
    return target, fresh


def _is_ours(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARKER).is_file() or not any(folder.iterdir())


@contextmanager
def filling(target: Path, fresh: Path, *, room: int) -> Iterator[None]:
    """The block fills `fresh` (see `fresh_folder_of`); then it becomes `target`. After a fault, Ctrl-C or SIGTERM
    nothing of it is left.

    Raises:
        SetupError: fewer than `room` bytes are free, or the disk's own fault.
    """
    try:
        with stopping_with_us(), os_errors():
            try:
                shutil.rmtree(fresh, ignore_errors=True)  # of a merge that was killed
                fresh.mkdir(parents=True)
                (fresh / MARKER).touch()
                if (free := shutil.disk_usage(fresh).free) < room:
                    raise SetupError(f"{target} takes {size(room)}, and {size(free)} are free there")
                yield
                _finish(target, fresh)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise SetupError(f"{target}: {error.strerror or error}") from error


def _finish(target: Path, fresh: Path) -> None:
    if not target.is_dir():
        os.replace(fresh, target)
        (target / MARKER).unlink()
        return
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == MERGED):
        if path.name != MARKER:
            os.replace(path, target / path.name)
