"""Encoded data on disk, so that a second start does not tokenise again.

    $IBFT_CACHE, or ~/.cache/ibft-fast (XDG_CACHE_HOME counts)
      data/KEY/meta.json       counts of the encoding, size and sha256 of each array; written last
      data/KEY/{ids,...}.npy   the arrays of `ibft.data.samples.SampleStore`, mapped into memory when read

The key is a hash of all that the encoding depends on: the bytes of the files, the tokenizer, template and settings. A
folder is made under another name and renamed when it is whole, so that two processes, or one that is killed, leave
whole folders alone. What does not agree with its meta.json is made again. Of several processes that want the same, as
those of one run do, one makes it and the others wait (`turn`).
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ibft.data.encode import EncodedData
from ibft.data.samples import SampleStore

FORMAT = 2  # of the folder, and of what `encode_rows` makes of the same input
META = "meta.json"


def cache_folder() -> Path:
    named = os.environ.get("IBFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "ibft-fast"


def key_of(facts: dict[str, Any]) -> str:
    """facts: JSON; whatever the encoding depends on."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **facts}, sort_keys=True).encode()).hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that a tokenizer does to a text, of its special tokens and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = getattr(tokenizer, "special_tokens_map", None)  # chat templates write them
    what = [
        type(tokenizer).__name__,
        inside,
        tokenizer.eos_token_id,
        special,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


@contextmanager
def turn(key: str, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time for a key; `waiting` is called where another one has it. Without locks none waits, and at
    worst two make the same."""
    path = cache_folder() / "data" / f".{key[:16]}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # `write` will say why
        yield
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with suppress(OSError):  # at worst it stays, and locks as well
            path.unlink(missing_ok=True)
        os.close(file)


def read(key: str) -> tuple[EncodedData, dict[str, Any]] | None:
    """The encoded data and what was kept with it; None where there is none, or it is damaged."""
    folder = cache_folder() / "data" / key
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for name, digest in meta["sha256"].items():
            with (folder / f"{name}.npy").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SampleStore.NAMES}
        return EncodedData(SampleStore(**arrays), **meta["counts"]), meta["more"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, data: EncodedData, more: dict[str, Any]) -> str | None:
    """Keeps the encoded data, and `more` (JSON) with it. None, or why it could not be kept: no reason to stop."""
    folder = cache_folder() / "data" / key
    fresh = folder.with_name(f".{key[:16]}-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        sums = {}
        for name in SampleStore.NAMES:
            path = fresh / f"{name}.npy"
            np.save(path, getattr(data.samples, name), allow_pickle=False)
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {each.name: getattr(data, each.name) for each in dataclasses.fields(data) if each.name != "samples"}
        meta = {"counts": counts, "sha256": sums, "more": more}
        (fresh / META).write_text(json.dumps(meta), encoding="utf-8")
        if folder.exists() and read(key) is None:  # damaged
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            os.rename(fresh, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and read(key) is not None:
            return None  # another process has made it in the meantime
        return f"{folder.parent}: {error.strerror or error}"
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return None
