"""Read one data file: JSON, JSON lines, CSV, TSV, parquet or Arrow, each also gzipped.

The name says the kind, and the content whatever a name often gets wrong: array or lines, Arrow's file or its stream.
Text is read and parsed a line at a time, columns a batch at a time: beside the rows, no file is held as a whole,
except a JSON array and a gzipped table. Every fault is a DataError that names the file, and the line where there is
one.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", ".ndjson", *DELIMITERS, ".parquet", ".arrow")
ACCEPTED = f"{', '.join(SUFFIXES)}, each also with .gz"

ONE_A_LINE = "one object a line, or all of them in one [list]"  # what JSON may be
BOM = b"\xef\xbb\xbf"
ARROW_FILE = b"ARROW1"  # how Arrow's file format begins; its stream has no mark
MAX_FIELD = 2**31 - 1  # characters of a CSV field: csv's own limit, 131072, is too small for code; a C long holds this


def kind_of(name: str) -> str | None:
    """Suffix of a data file, in small letters and without .gz; None where `read_file` would refuse the name."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def read_file(file: Path) -> list[Row]:
    """All rows of a file, in its order.

    JSON is an array of objects or an object a line, whatever the suffix: many published .json files hold lines. Lines
    end at \\n alone. The first line of CSV and TSV gives the keys; all their values are strings.

    Raises:
        DataError: unknown kind of file, unreadable, malformed or empty, or a row is not an object.
    """
    kind = kind_of(file.name)
    if kind is None:
        raise DataError(f"{file}: unknown kind of file; accepted: {ACCEPTED}")
    try:
        with _open(file) as stream:
            if kind in DELIMITERS:
                rows = _read_csv(file, stream, DELIMITERS[kind])
            elif kind == ".parquet":
                rows = _read_batches(file, stream, "parquet", _parquet_batches)
            elif kind == ".arrow":
                rows = _read_batches(file, stream, "Arrow", _arrow_batches)
            else:
                rows = _read_json(file, stream)
    except EOFError as error:
        raise DataError(f"{file}: the gzip stream ends early; copy or download the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged or not gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason(error)}") from error
    if not rows:
        raise DataError(f"{file}: the data set is empty")
    return rows


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
    """As one line, and without the name of the file, where the system gives both."""
    return getattr(error, "strerror", None) or first_line(error)


def _open(file: Path) -> io.BufferedIOBase:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")


def _lines(file: Path, stream: io.BufferedIOBase) -> Iterator[str]:
    """Each line with its end. Only \\n ends one: str.splitlines also cuts at U+2028, which JSON may hold unescaped."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: not UTF-8 text (byte {error.start}: {error.reason})") from error


def _read_json(file: Path, stream: io.BufferedIOBase) -> list[Row]:
    is_array = _first_character(stream) == b"["
    stream.seek(0)
    return _parse_array(file, "".join(_lines(file, stream))) if is_array else _parse_lines(file, stream)


def _first_character(stream: io.BufferedIOBase) -> bytes:
    """Of those that are not blank; a chunk at a time, for an array may be a single line."""
    while chunk := stream.read(1 << 16):
        if text := chunk.removeprefix(BOM).lstrip():
            return text[:1]
    return b""


def _parse_array(file: Path, text: str) -> list[Row]:
    rows: list[Row] = _parse_json(file, text, at_line=1)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number} is {_name(row)}, expected an object")
    return rows


def _parse_lines(file: Path, stream: io.BufferedIOBase) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(file, stream), start=1):
        if not line.strip():
            continue
        row = _parse_json(file, line.removesuffix("\n"), at_line=number, remedy=f"; expected {ONE_A_LINE}")
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: the row is {_name(row)}, expected an object")
        rows.append(row)
    return rows


def _parse_json(file: Path, text: str, at_line: int, remedy: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = at_line + error.lineno - 1
        raise DataError(f"{file}:{line}: malformed JSON: {error.msg} (column {error.colno}){remedy}") from error
    except RecursionError as error:
        raise DataError(f"{file}:{at_line}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise DataError(f"{file}:{at_line}: malformed JSON: {first_line(error)}") from error


def _name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_csv(file: Path, stream: io.BufferedIOBase, delimiter: str) -> list[Row]:
    lines = _csv_rows(file, stream, delimiter)
    number, header = next(lines, (1, []))
    for place, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(f"{file}:{number}: column {place} has no name")
        if name in header[: place - 1]:
            raise DataError(f"{file}:{number}: two columns are named {name!r}")
    rows = []
    for number, fields in lines:
        if len(fields) != len(header):
            raise DataError(f"{file}:{number}: the row has {len(fields)} fields, the header {len(header)}")
        rows.append(dict(zip(header, fields, strict=True)))
    return rows


def _csv_rows(file: Path, stream: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line at which each row begins, and its fields. Blank lines are no rows."""
    csv.field_size_limit(MAX_FIELD)
    # strict: a quote that is never closed would else take the rest of the file into its field, without a word
    reader = csv.reader(_csv_lines(file, stream), delimiter=delimiter, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{start}: malformed CSV: {first_line(error)}") from error


def _csv_lines(file: Path, stream: io.BufferedIOBase) -> Iterator[str]:
    """Lines as csv wants them: each ends at \\n, \\r\\n or \\r, which stays."""
    for number, text in enumerate(_lines(file, stream), start=1):
        if "\0" in text:
            raise DataError(f"{file}:{number}: the line has a NUL byte; CSV is text")
        yield from io.StringIO(text, newline="")


def _read_batches(
    file: Path, stream: io.BufferedIOBase, kind: str, batches_of: "Callable[[Any], Iterator[RecordBatch]]"
) -> list[Row]:
    import pyarrow

    # These formats seek, and a gzip stream would begin anew each time it goes back.
    source = pyarrow.BufferReader(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
    rows: list[Row] = []
    try:
        for batch in batches_of(source):
            rows += rows_of(batch)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:  # the last: a damaged length
        raise DataError(f"{file}: not a readable {kind} file: {first_line(error)}") from error
    return rows


def rows_of(batch: "RecordBatch") -> list[Row]:
    """Raises ValueError (ArrowInvalid is one): damaged columns, two of one name, or a date beyond Python's."""
    names = batch.schema.names
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:  # a row would hold the last of them
        raise ValueError(f"two columns are named {repeated[0]!r}")
    batch.validate(full=True)  # to_pylist follows a damaged offset out of the buffer
    try:
        rows: list[Row] = batch.to_pylist()
    except OverflowError as error:
        raise ValueError(f"a date or time is beyond Python's: {error}") from error
    return rows


def _parquet_batches(source: Any) -> "Iterator[RecordBatch]":
    from pyarrow import parquet

    yield from parquet.ParquetFile(source).iter_batches()


def _arrow_batches(source: Any) -> "Iterator[RecordBatch]":
    from pyarrow import ipc

    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    source.seek(0)
    if is_file:
        reader = ipc.open_file(source)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from ipc.open_stream(source)
