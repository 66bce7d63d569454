"""Read instruction data: a local JSON array, JSON lines, either gzipped, parquet, or a hub id.

Every fault of a file is a DataError that names the file, and the line where there is one; a hub id that cannot be read
is a SetupError that says what to run. Whatever looks like a path is never sent to the hub.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ibft.errors import DataError, SetupError

Row = dict[str, Any]

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ACCEPTED_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
# A name that ends so was meant as a file, even where this version cannot read that kind.
FILE_SUFFIXES = (*ACCEPTED_SUFFIXES, ".gz", ".zip", ".csv", ".tsv", ".txt", ".arrow")


def load_rows(path: str, *, split: str = "train") -> list[Row]:
    """Load all rows of a data set, in file order.

    Args:
        path: a .json (array of objects), .jsonl (an object a line), the same with .gz, or .parquet file; else a hub id.
            Array or lines is decided by the content, since many published .json files hold JSON lines. A hub id may
            name one of the set's configurations: openai/gsm8k:main.
        split: split of a hub data set; a local file has no splits, so it is ignored there.

    Raises:
        DataError: the file is missing, unreadable, malformed or empty, or a row is not an object.
        SetupError: the hub id is gated, missing or unreachable.
    """
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            found = sorted(entry.name for entry in file.iterdir() if _has_suffix(entry.name, ACCEPTED_SUFFIXES))
            raise DataError(f"{path} is a folder: name one data file in it (found: {', '.join(found) or 'none'})")
        local = file.exists()
    except OSError as error:  # a locked folder, a name too long
        raise DataError(f"{path}: {error.strerror or error}") from error
    if local:
        rows = _read_file(file)
    elif _looks_like_path(path):
        raise DataError(f"{path}: no such file, and not a hub id either (a hub id reads owner/name)")
    else:
        rows = _read_hub(path, split)
    if not rows:
        raise DataError(f"{path}: the data set is empty")
    return rows


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _looks_like_path(path: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything rooted, nested deeper or ending as a data file is a path."""
    return path == "" or path[0] in "./~\\" or path.count("/") > 1 or "\\" in path or _has_suffix(path, FILE_SUFFIXES)


def _read_file(file: Path) -> list[Row]:
    if _has_suffix(file.name, (".parquet",)):
        return _read_parquet(file)
    if not _has_suffix(file.name, JSON_SUFFIXES):
        raise DataError(f"{file}: unknown kind of file; accepted: {', '.join(ACCEPTED_SUFFIXES)}")
    text = _read_text(file)
    return _parse_array(file, text) if text.lstrip().startswith("[") else _parse_lines(file, text)


def _read_text(file: Path) -> str:
    try:
        content = file.read_bytes()
        if _has_suffix(file.name, (".gz",)):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except EOFError as error:
        raise DataError(f"{file}: the gzip stream ends early; copy or download the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged or not gzip: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _parse_json(file: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{file}:{line}: malformed JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{file}:{first_line}: malformed JSON: nested too deeply") from error


def _parse_array(file: Path, text: str) -> list[Row]:
    rows = _parse_json(file, text, first_line=1)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number} is {_kind(row)}, expected an object")
    return rows


def _parse_lines(file: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(file, line, first_line=number)
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: the row is {_kind(row)}, expected an object")
        rows.append(row)
    return rows


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file: {_first_line(error)}") from error


def _read_hub(path: str, split: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError

    try:
        name, _, configuration = path.partition(":")
        return load_dataset(name, configuration or None, split=split).to_list()
    except HFValidationError as error:
        raise DataError(f"{path}: neither a file nor a possible hub id: {_first_line(error)}") from error
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
            f"{path}: no such file, and the hub cannot be reached ({_first_line(error)}); with a network, "
            f"run `hf download --repo-type dataset {path}`, or give a local file"
        ) from error
    # Unknown split or configuration (ValueError), a loading script (RuntimeError), unreadable files of the data set.
    except (DatasetsError, ValueError, RuntimeError, FileNotFoundError) as error:
        raise DataError(f"{path} (split {split}): {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
