"""Checkpoint folders: written so that no fault leaves less than was there before, and read only if they are whole.

    checkpoints/step-N/          a plain PEFT adapter folder, and beside the adapter's files
      optimizer.safetensors      weights and optimizer state (`ibft.trainer_state`)
      state.json                 schedule, place in the data, counters
      manifest.json              size and sha256 of every other file; written last
    checkpoints/.step-N.new/     a save under way, or one that was killed
    checkpoints/.step-N.old/     what is being replaced or removed

A folder counts if its files are those of its manifest. A hidden one counts too, where it is whole and step-N is not: a
save was killed between its manifest and its name. Never pickle.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ibft.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
)  # fmt: skip
_VISIBLE = re.compile(r"step-(0|[1-9][0-9]*)")
_HIDDEN = re.compile(r"\.step-(0|[1-9][0-9]*)\.(?:new|old)")
_RANK = {"": 2, ".new": 1, ".old": 0}  # by suffix: which folder of a step is asked first


class _Damaged(Exception):
    """Why a folder is no whole checkpoint."""


def save(
    root: Path, step: int, fill: Callable[[Path], None], tensors: dict[str, "Tensor"], facts: dict[str, Any]
) -> Path:
    """Write root/step-N, replacing one of that name; it is whole, read back and on disk when this returns.

    Args:
        root: the run's folder of checkpoints; made if it is not there.
        fill: writes adapter, bottleneck and tokenizer into the folder it is given.
        tensors: on the host, contiguous (`trainer_state.collect`).
        facts: JSON without NaN and infinities.

    Raises:
        OSError: a full disk, or any other fault of it, also one that a Rust library reports in its own way. What was
            there before is still there, and nothing of this save.
    """
    if not root.is_dir():
        root.mkdir(parents=True)
        _sync_folder(root.parent)
    _clear_leftovers(root)
    target, fresh, old = root / f"step-{step}", root / f".step-{step}.new", root / f".step-{step}.old"
    try:
        with os_errors():
            _write(fresh, step, fill, tensors, facts)
        if reason := verify(fresh):
            raise OSError(errno.EIO, f"{fresh} does not hold what was written to it: {reason}")
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
    except BaseException:  # Ctrl-C too
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync_folder(root)
    shutil.rmtree(old, ignore_errors=True)
    return target


def keep(root: Path, *, last: int) -> None:
    """Remove all checkpoints but the `last` newest whole ones; nothing, where none is whole.

    Raises:
        OSError: one cannot be removed. ValueError: last is below 1.
    """
    if last < 1:
        raise ValueError(f"last: got {last}, expected 1 or more")
    folders = [folder for _, folder in sorted(_numbered(root, _VISIBLE), reverse=True)]
    if len(folders) <= last:  # nothing to remove: no need to read all of them at every save
        return
    whole = list(islice((folder for folder in folders if verify(folder) is None), last))
    if not whole:
        return
    for folder in folders:
        if folder not in whole:
            hidden = folder.with_name(f".{folder.name}.old")  # so that no half-removed one is ever seen
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(folder, hidden)
            shutil.rmtree(hidden)


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None without one; and a line on each damaged one that is newer.

    Raises:
        SetupError: root cannot be read.
    """
    try:
        named = _numbered(root, _VISIBLE) + _numbered(root, _HIDDEN)
    except OSError as error:
        raise SetupError(f"{root}: {error.strerror or error}") from error
    warnings: list[str] = []
    for _, folder in sorted(named, key=lambda each: (each[0], _RANK[each[1].suffix]), reverse=True):
        reason = verify(folder)
        if reason is None:
            return folder, warnings
        if not folder.suffix:  # a hidden one is only what a killed save has left
            warnings.append(f"{folder} is damaged and left out: {reason}")
    return None, warnings


def verify(folder: Path) -> str | None:
    """None if the folder is a whole checkpoint, or else why not, in one line. Files beyond the manifest's are free."""
    try:
        files = _files_of(folder)
        for name in (ADAPTER, OPTIMIZER, STATE):
            if name not in files:
                raise _Damaged(f"{MANIFEST} does not list {name}")
        for name, expected in files.items():
            _check_file(folder, name, expected)
        if not _holds_tensors(folder / ADAPTER):
            raise _Damaged(f"{ADAPTER}: no tensor in it: zero trainable parameters")
    except _Damaged as damage:
        return str(damage)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    return None


def load(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """What `save` was given: tensors on the host, and facts.

    Raises:
        ConfigError: the folder is no whole checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if reason := verify(folder):
        raise ConfigError(f"{folder} is no whole checkpoint: {reason}")
    try:
        facts = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / OPTIMIZER)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:  # whole, but another program's
        raise ConfigError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{folder / STATE}: expected an object")
    return tensors, facts


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raises OSError where safetensors or tokenizers report one as an exception of their own, with its number."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := re.search(r"\(os error ([0-9]+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def share(folder: Path) -> None:
    """Gives its files the rights of any new file: safetensors writes files that their owner alone may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _numbered(root: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """(step, folder) of root's folders that have such a name; links are nobody's checkpoint here."""
    try:
        with os.scandir(root) as entries:
            folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [(int(found[1]), root / name) for name in folders if (found := pattern.fullmatch(name))]


def _clear_leftovers(root: Path) -> None:
    """Of saves and removals that were killed: what is whole and has no whole namesake gets its name, the rest goes."""
    for step, folder in sorted(_numbered(root, _HIDDEN)):
        target = root / f"step-{step}"
        if verify(folder) is None and verify(target) is not None:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(folder, target)
        else:
            shutil.rmtree(folder)


def _write(
    folder: Path, step: int, fill: Callable[[Path], None], tensors: dict[str, "Tensor"], facts: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    fill(folder)
    save_file(tensors, folder / OPTIMIZER)
    share(folder)
    (folder / STATE).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        else:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sync_and_hash(path)}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync_and_hash(folder / MANIFEST)
    _sync_folder(folder)


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if hasattr(os, "posix_fadvise"):  # out of the page cache, so that verifying reads the disk
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(number)


def _files_of(folder: Path) -> dict[str, Any]:
    """Name -> {"size", "sha256"} as the manifest has it, not checked yet."""
    path = _inside(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        what = "no JSON" if path.stat().st_size else "empty"
        raise _Damaged(f"{MANIFEST}: {what}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise _Damaged(f"{MANIFEST}: no list of files in it")
    if manifest.get("format") != FORMAT:
        raise _Damaged(f"{MANIFEST}: format {str(manifest.get('format'))[:20]!r}, this version reads {FORMAT}")
    named = _VISIBLE.fullmatch(folder.name) or _HIDDEN.fullmatch(folder.name)  # a copy may have any other name
    if named and manifest.get("step") != int(named[1]):
        raise _Damaged(f"{MANIFEST}: of step {str(manifest.get('step'))[:20]!r}, expected {named[1]}")
    files: dict[str, Any] = manifest["files"]
    return files


def _check_file(folder: Path, name: str, expected: Any) -> None:
    """Raises _Damaged unless the file has the size and the sha256 of its manifest's entry."""
    path = _inside(folder, name)
    if not isinstance(expected, dict) or not isinstance(expected.get("size"), int):
        raise _Damaged(f"{MANIFEST}: no size of {name}")
    size = path.stat().st_size
    if size != expected["size"]:
        raise _Damaged(f"{name}: {size:,} bytes, expected {expected['size']:,}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
            raise _Damaged(f"{name}: not the bytes that were written (its sha256 differs)")


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises _Damaged: it is none, or no name of one, or leads out of the folder."""
    plain = PurePosixPath(name)
    if not name.isprintable() or plain.is_absolute() or ".." in plain.parts:
        raise _Damaged(f"{MANIFEST}: {name[:80]!r} is no name of a file in the folder")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise _Damaged(f"{name}: a link that leads out of the folder")
    if not path.is_file():  # a pipe would be waited for
        raise _Damaged(f"{name}: {'no file' if path.exists() else 'missing'}")
    return path


def _holds_tensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return any(0 not in file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
    except SafetensorError:
        return False
