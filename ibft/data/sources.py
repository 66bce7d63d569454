"""Read instruction data: a local file, a folder of files, what `datasets` saved to disk, or a hub id.

Every fault of the data is a DataError of one line that names the file; a hub id that cannot be read is a SetupError
that says what to run. Whatever looks like a path is never sent to the hub, and nothing is written beside the data.
"""

import json
import re
from os.path import isfile
from pathlib import Path
from typing import Any

from ibft.data.read_files import ACCEPTED, SUFFIXES, Row, first_line, kind_of, read_file, reason, rows_of
from ibft.errors import DataError, SetupError

__all__ = ["Row", "files_of", "load_rows", "looks_like_path", "open_hub"]

# A name that ends so was meant as a file, even where this version cannot read that kind.
FILE_SUFFIXES = (*SUFFIXES, ".gz", ".zip", ".txt")
# How the names of a split's files begin: the hub's names for it. The short ones must be a whole word.
SPLITS = {
    "train": re.compile("train"),
    "validation": re.compile("validation|(valid|val|dev)(?![a-z])"),
    "test": re.compile("test|(eval|evaluation)(?![a-z])"),
}
# JSON that lies beside the data of many sets, and is none; the hub leaves them out, too.
NO_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
# Of a folder that `datasets` saved to disk.
STATE, INFO, INDEX = "state.json", "dataset_info.json", "dataset_dict.json"


def load_rows(path: str, *, split: str = "train") -> list[Row]:
    """Load all rows of a data set, in its order.

    Args:
        path: a file that `ibft.data.read_files` reads; a folder of them, of which all are read in the order of their
            names, and none in folders within; a folder that `datasets` saved to disk; else a hub id. A hub id may
            name one of the set's configurations: openai/gsm8k:main.
        split: split of a hub data set or a saved DatasetDict. In a folder where the names of files begin with that of
            a split (train.jsonl, test-00000-of-00001.parquet), only those of this split are read. A single file and
            a saved Dataset have no splits: it is ignored there.

    Raises:
        DataError: a file is missing, unreadable, malformed or empty, a row is not an object, a folder has no data, or
            there is no such split.
        SetupError: the hub id is gated, missing or unreachable.
    """
    place = _local(path)
    if place is None:
        rows = open_hub(path, split).to_list()
    elif saved := _saved_set(place, split):
        rows = _read_saved(saved)
    else:
        rows = [row for file in _data_files(place, split) for row in read_file(file)]
    if not rows:
        raise DataError(f"{path}: the data set is empty")
    return rows


def files_of(path: str, *, split: str) -> list[Path] | None:
    """The local files whose bytes decide what `load_rows(path, split=split)` gives, in order; None for a hub id.

    Of a saved DatasetDict these are its index and the files of the split. None of the data is read for it.

    Raises:
        DataError: as `load_rows`, where there is no such file, no data in the folder, or no such split.
    """
    place = _local(path)
    if place is None:
        return None
    saved = _saved_set(place, split)
    if saved is None:
        return _data_files(place, split)
    return sorted([*_files_in(saved), *([] if saved == place else [place / INDEX])])


def looks_like_path(path: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything rooted, nested deeper or ending as a data file is a path."""
    is_file = path.lower().endswith(FILE_SUFFIXES)
    return path == "" or path[0] in "./~\\" or path.count("/") > 1 or "\\" in path or is_file


def _local(path: str) -> Path | None:
    """The file or folder; None for what the hub is to be asked for."""
    try:
        place = Path(path).expanduser()
        if path and place.exists():  # Path("") is the working folder
            return place
    except (OSError, RuntimeError) as error:  # a locked folder, a name too long; no such user's home
        raise DataError(f"{path}: {reason(error)}") from error
    if looks_like_path(path):
        raise DataError(f"{path}: no such file, and not a hub id either (a hub id reads owner/name)")
    return None


def _files_in(folder: Path) -> list[Path]:
    """By name. A link that leads nowhere is among them, so that whoever reads it says so."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {reason(error)}") from error


def _data_files(place: Path, split: str) -> list[Path]:
    if not place.is_dir():
        return [place]
    files = [file for file in _files_in(place) if _is_data(file.name)]
    if not files:
        raise DataError(f"{place}: no data file in this folder (those within are not entered); accepted: {ACCEPTED}")
    split_of = {file: _split_of(file.name) for file in files}
    present = sorted({name for name in split_of.values() if name is not None})
    if not present:
        return files
    if split not in present:
        raise DataError(f"{place}: no file of split {split}; there are: {', '.join(present)}")
    return [file for file in files if split_of[file] == split]


def _is_data(name: str) -> bool:
    return kind_of(name) is not None and not name.startswith(".") and name.lower() not in NO_DATA


def _split_of(name: str) -> str | None:
    return next((split for split, start in SPLITS.items() if start.match(name.lower())), None)


def _saved_set(place: Path, split: str) -> Path | None:
    """The folder of the saved Dataset: `place`, or the split's within; None where `datasets` did not save `place`."""
    # Not Path.is_file, which raises in a locked folder: `_files_in` says that it is one.
    if isfile(place / STATE) and isfile(place / INFO):
        return place
    index = place / INDEX
    if not isfile(index):
        return None
    try:
        splits = [str(name) for name in json.loads(index.read_bytes())["splits"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{index}: not a readable list of splits: {reason(error)}") from error
    if split not in splits:
        raise DataError(f"{place}: no split {split}; there are: {', '.join(splits)}")
    return place / split


def _read_saved(folder: Path) -> list[Row]:
    import pyarrow
    from datasets import Dataset

    try:
        saved = Dataset.load_from_disk(str(folder))  # mapped, not copied
        return [row for batch in saved.data.to_batches() for row in rows_of(batch)]
    except IndexError:  # the library saves a set without rows as no file, and cannot load that
        return []
    # What is missing or damaged, and whatever else its two small JSON files may hold.
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{folder}: not a readable folder of save_to_disk: {first_line(error)}") from error


def open_hub(path: str, split: str) -> Any:
    """A hub id's `datasets.Dataset`, which lies on disk and is mapped.

    Raises:
        DataError: no possible id, no such split, unreadable files. SetupError: it is gated, missing or unreachable.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError

    try:
        name, _, configuration = path.partition(":")
        return load_dataset(name, configuration or None, split=split)
    except HFValidationError as error:
        raise DataError(f"{path}: neither a file nor a possible hub id: {first_line(error)}") from error
    except (DatasetNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            raise SetupError(
                f"{path}: gated on the hub; ask for access at https://huggingface.co/datasets/{path}, "
                "then run `hf auth login`"
            ) from error
        raise SetupError(
            f"{path}: neither a file nor a data set on the hub; check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    # HTTPError, whichever HTTP library the hub client uses: its own errors and those of the transport.
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise SetupError(
            f"{path}: no such file, and the hub cannot be reached ({first_line(error)}); with a network, "
            f"run `hf download --repo-type dataset {path}`, or give a local file"
        ) from error
    # Unknown split or configuration (ValueError), a loading script (RuntimeError), unreadable files of the data set.
    except (DatasetsError, ValueError, RuntimeError, FileNotFoundError) as error:
        raise DataError(f"{path} (split {split}): {first_line(error)}") from error
