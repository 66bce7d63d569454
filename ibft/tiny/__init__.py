"""The bundled tiny base model and its programming tasks: what `ibft-fast train` uses when it is given nothing.

Importing this package loads no heavy dependency: it only knows where the files lie.
"""

from pathlib import Path

BASE_DIR: Path = Path(__file__).parent / "base"
"""Folder of the tiny base model and its tokenizer, in the Hugging Face layout."""

TASKS_DIR: Path = Path(__file__).parent / "tasks"
"""Folder of the task files, one JSON-lines file a split."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")

__all__ = ["BASE_DIR", "SPLITS", "TASKS_DIR", "task_file"]


def task_file(split: str) -> Path:
    """Path of one split's JSON-lines file.

    Args:
        split: one of `SPLITS`.

    Raises:
        ValueError: `split` is not a known split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    return TASKS_DIR / f"{split}.jsonl"
