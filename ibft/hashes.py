"""A file's content as one line of text."""

import hashlib
from pathlib import Path


def hash_file(path: str | Path | None) -> str | None:
    """sha256 of its bytes; None of what is no file here, or cannot be read: whoever reads it says so."""
    if path is None:
        return None
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
