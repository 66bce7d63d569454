"""One process a folder: whoever writes in it holds its lock, and a dead owner's is free."""

import fcntl
import os
from pathlib import Path

from ibft.errors import ConfigError, DataError

LOCK = ".lock"
_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Takes the folder's lock for as long as this process lives; twice by the same process is once.

    The kernel keeps it (flock), so that it ends with its owner, however that ends. On a file system without locks
    nothing is held.

    Raises:
        ConfigError: another process holds it. DataError: the folder cannot be written.
    """
    path = (folder / LOCK).resolve()
    if path in _held:
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 20).decode(errors="replace").strip()
        os.close(file)
        who = f"process {owner}" if owner else "another process"
        raise ConfigError(f"{folder} is in use by {who}: wait for it, or name another folder with -o") from None
    except OSError:  # no locks here
        os.close(file)
        return
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    _held[path] = file


def release(folder: Path) -> None:
    """Gives it back before the process ends."""
    file = _held.pop((folder / LOCK).resolve(), None)
    if file is not None:
        os.close(file)
