"""Files that name rows of a data set by their numbers: JSON, {"ids": [numbers, from 0]}, as `analyze partition` writes
them. Of other keys only `data_sha256` is looked at, the hash of all rows (`hash_rows`)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibft.data.sources import Row
from ibft.errors import DataError


@dataclass(frozen=True)
class Ids:
    """numbers: of rows, from 0. file: None: drawn. data_sha256: what the file says of its data, if anything."""

    file: str | None
    sha256: str | None
    numbers: list[int]
    data_sha256: object = None


def read_ids(option: str, file: str, rows: int, data: str) -> Ids:
    """Raises DataError: it cannot be read, is no JSON object with a list `ids` of numbers, or one of them is no row's
    or there twice."""
    try:
        content = Path(file).expanduser().read_bytes()
        found = json.loads(content)
    except OSError as error:
        raise DataError(f"{option}: {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option}: {file} is not JSON: {error}") from error
    ids = found.get("ids") if isinstance(found, dict) else None
    if not isinstance(ids, list):
        raise DataError(f'{option}: {file} has no list of ids: expected {{"ids": [numbers of rows, from 0]}}')
    if not ids:
        raise DataError(f"{option}: {file} has an empty list of ids")
    seen: set[int] = set()
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool):
            raise DataError(f"{option}: {file} has the id {number!r:.80}, expected whole numbers")
        if not 0 <= number < rows:
            raise DataError(f"{option}: {file} has id {number}, but {data} has the rows 0 .. {rows - 1}")
        if number in seen:
            raise DataError(f"{option}: {file} has id {number} twice")
        seen.add(number)
    return Ids(file, hashlib.sha256(content).hexdigest(), ids, found.get("data_sha256"))


def hash_rows(rows: Sequence[Row]) -> str:
    """sha256 of all of them, in their order: of the JSON array of them, which is never held as a whole."""
    encoder = json.JSONEncoder(sort_keys=True, default=str)
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update((", " if number else "").encode() + encoder.encode(row).encode())
    digest.update(b"]")
    return digest.hexdigest()


def choose_numbers(rows: Sequence[Row], data: str, *, keep: str | None, drop: str | None) -> list[int]:
    """Numbers, from 0, of the rows that a training run is left with, ascending. keep, drop: files of ids.

    Raises:
        DataError: see `read_ids`; the file was made for other rows than these; or no row is left.
    """
    chosen = set(range(len(rows)))
    for option, file in (("data.keep_ids", keep), ("data.drop_ids", drop)):
        if file is None:
            continue
        ids = read_ids(option, file, len(rows), data)
        if ids.data_sha256 is not None and ids.data_sha256 != hash_rows(rows):
            raise DataError(f"{option}: {file} was made for other rows than those of {data} (its data_sha256)")
        chosen = chosen & set(ids.numbers) if option == "data.keep_ids" else chosen - set(ids.numbers)
    if not chosen:
        raise DataError(f"data.keep_ids and data.drop_ids leave no row of {data}")
    return sorted(chosen)
