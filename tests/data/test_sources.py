import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from ibft.data.sources import files_of, load_rows, looks_like_path
from ibft.errors import DataError, SetupError

ROWS = [{"instruction": "naïve\u2028line", "output": "1"}, {"instruction": "b", "output": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path: Path, text: str | bytes) -> str:
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def arrow_of(rows: list[dict], opened=ipc.new_stream) -> bytes:
    """Two batches, where there are two rows."""
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=(len(rows) + 1) // 2)
    return sink.getvalue().to_pybytes()


def damaged_arrow() -> bytes:
    """Unchecked, its text would be read from far beyond the file."""
    good = arrow_of([{"instruction": "a", "output": "x" * 40}])
    place = good.rindex((40).to_bytes(4, "little"))  # where the text ends
    return good[:place] + (1 << 30).to_bytes(4, "little") + good[place + 4 :]


def parquet_of(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def csv_of(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def fault(path: Path | str, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(path), split=split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.gz", "A.JSON"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, indent=1),
        "\ufeff\n" + json.dumps(ROWS),
        LINES,
        "\ufeff" + LINES + "\n\n",
        LINES.replace("\n", "\r\n"),
    ],
)
def test_reads_array_and_lines_whatever_the_extension(tmp_path, name, text):
    assert load_rows(write(tmp_path / name, text)) == ROWS


NESTED = [{"messages": [{"role": "user", "content": "a"}], "id": 1}, {"messages": [], "id": None}, {"id": 3}]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", parquet_of(NESTED)),
        ("a.arrow", arrow_of(NESTED)),
        ("a.arrow", arrow_of(NESTED, ipc.new_file)),
    ],
    ids=["parquet", "arrow stream", "arrow file"],
)
def test_reads_columns_as_rows(tmp_path, name, content, gz):
    assert load_rows(write(tmp_path / (name + gz), content)) == [*NESTED[:2], {"messages": None, "id": 3}]


CSV = 'instruction,output\r\n"a ""b"", c\nd",\r\n\r\n 2 ,3\r\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV),
        ("a.csv", CSV.replace("\r\n", "\n")),
        ("a.csv", CSV.replace("\r\n", "\r")),
        ("a.csv.gz", CSV),
        ("a.tsv", CSV.replace(", c", "# c").replace(",", "\t").replace("#", ",")),
    ],
    ids=["plain", "BOM", "LF", "CR", "gz", "tsv"],
)
def test_the_first_line_of_csv_gives_the_keys_of_texts(tmp_path, name, text):
    rows = [{"instruction": 'a "b", c\nd', "output": ""}, {"instruction": " 2 ", "output": "3"}]
    assert load_rows(write(tmp_path / name, text)) == rows


def test_a_field_of_csv_may_be_long(tmp_path):
    code = "x = 1\n" * 50_000  # csv's own limit is 131,072 characters
    assert load_rows(write(tmp_path / "a.csv", f'code\n"{code}"\n')) == [{"code": code}]


# Without NUL, which CSV cannot hold, and without half surrogates, which no file of text can.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.sampled_from(
    ["", '"', "a\r\nb", "\r", "\u2028\u2029\x85\x0b", "\ufeff", "😀", "\\u0041", ",\t;"]
)
TABLES = st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, TEXTS)), min_size=1, max_size=4)
)


@given(rows=TABLES, ascii_only=st.booleans())
def test_every_kind_of_file_gives_back_the_rows(tmp_path, rows, ascii_only):
    contents = {
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows),
        "json": json.dumps(rows, ensure_ascii=ascii_only, indent=1),
        "csv": csv_of(rows),
        "tsv": csv_of(rows, "\t"),
        "parquet": parquet_of(rows),
        "arrow": arrow_of(rows),
        "file.arrow": arrow_of(rows, ipc.new_file),
    }
    for suffix, content in contents.items():
        for gz in ("", ".gz"):
            assert load_rows(write(tmp_path / f"a.{suffix}{gz}", content)) == rows, (suffix, gz)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(rows=st.lists(st.dictionaries(TEXTS, JSON), min_size=1), ascii_only=st.booleans())
def test_json_gives_back_any_rows(tmp_path, rows, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    assert load_rows(write(tmp_path / "a.jsonl", "\n".join(lines))) == rows
    assert load_rows(write(tmp_path / "a.json.gz", f"[{','.join(lines)}]")) == rows


def test_lines_of_json_are_held_once(tmp_path):
    """Their text, or all of the lines, would be another 8 MB beside the rows."""
    line = json.dumps({"text": "x" * 2000}) + "\n"
    path = write(tmp_path / "a.jsonl.gz", line * 4000)
    load_rows(write(tmp_path / "b.jsonl", LINES))  # what is imported or made once
    tracemalloc.start()
    try:
        rows = load_rows(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 4000
    assert held > 8_000_000
    assert peak - held < 1_000_000


def test_reads_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.json", LINES)
    assert load_rows("~/a.json") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "a.jsonl:3: malformed JSON"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}]', "a.json:3: malformed JSON"),
        ("a.json.gz", '[\n{"a": 1},\n{"a" 2}]', "a.json.gz:3: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n3', "a.jsonl:2: the row is a number, expected an object"),
        ("a.json", '[{"a": 1}, "x"]', "a.json: row 2 is a string, expected an object"),
        ("a.json", "[" * 100_000, "a.json:1: malformed JSON"),
        ("a.jsonl", "", "a.jsonl: the data set is empty"),
        ("a.json", "[]", "a.json: the data set is empty"),
        ("a.parquet", "not parquet", "a.parquet: not a readable parquet file"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", "a.jsonl:2: malformed JSON: Exceeds the limit"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "a.jsonl:2: not UTF-8 text (byte 7: invalid continuation byte)"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', "a.json:2: not UTF-8 text (byte 7: invalid continuation byte)"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl:1: not UTF-8 text (byte 0"),
        ("a.jsonl", '{"a": 1}\n\ufeff{"a": 1}', "a.jsonl:2: malformed JSON: Unexpected UTF-8 BOM"),
        ("a.csv", "", "a.csv: the data set is empty"),
        ("a.csv", "a,b\n", "a.csv: the data set is empty"),
        ("a.csv", 'a,b\n"1\n",2\n3\n', "a.csv:4: the row has 1 fields, the header 2"),
        ("a.csv", "a,b\n1,2\n1,2,3", "a.csv:3: the row has 3 fields, the header 2"),
        ("a.tsv", "a\tb\n1,2", "a.tsv:2: the row has 1 fields, the header 2"),
        ("a.csv", "\na,,b\n1,2,3", "a.csv:2: column 2 has no name"),
        ("a.csv", "a, \n1,2", "a.csv:1: column 2 has no name"),
        ("a.csv", "a,b,a\n1,2,3", "a.csv:1: two columns are named 'a'"),
        ("a.csv", "a,b\n1,2\n1,\0", "a.csv:3: the line has a NUL byte"),
        ("a.csv.gz", 'a,b\n1,2\n1,"2\n3,4\n5,6', "a.csv.gz:3: malformed CSV: unexpected end of data"),
        ("a.csv", 'a,b\n1,2\n"1"x,2\n', "a.csv:3: malformed CSV: ',' expected after '\"'"),
        ("a.csv", b"a,b\n1,2\n1,\xff\n", "a.csv:3: not UTF-8 text (byte 2: invalid start byte)"),
        ("a.parquet", parquet_of(ROWS)[:-20], "a.parquet: not a readable parquet file"),
        ("a.parquet.gz", "no", "a.parquet.gz: not a readable parquet file"),
        ("a.parquet", "", "a.parquet: not a readable parquet file"),
        ("a.parquet", parquet_of([]), "a.parquet: the data set is empty"),
        ("a.arrow", "not arrow", "a.arrow: not a readable Arrow file"),
        ("a.arrow", "", "a.arrow: not a readable Arrow file"),
        ("a.arrow", arrow_of(ROWS)[:-40], "a.arrow: not a readable Arrow file"),
        ("a.arrow.gz", arrow_of(ROWS, ipc.new_file)[:-40], "a.arrow.gz: not a readable Arrow file"),
        ("a.txt", "a,b", "a.txt: unknown kind of file; accepted: .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow"),
        ("a.gz", "a,b", "a.gz: unknown kind of file; accepted: .json"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, message):
    assert message in fault(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("content", [{"data": ROWS}, ROWS[0]], ids=["wrapped", "one object"])
def test_an_object_over_several_lines_is_told_what_to_be(tmp_path, name, content):
    said = fault(write(tmp_path / name, json.dumps(content, indent=2)))
    assert f"{name}:1: malformed JSON: Expecting property name" in said
    assert said.endswith("; expected one object a line, or all of them in one [list]")


def test_damaged_offsets_of_arrow_are_refused(tmp_path):
    assert "a.arrow: not a readable Arrow file" in fault(write(tmp_path / "a.arrow", damaged_arrow()))


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([["1"], ["2"]], names=["a", "a"]), path)
    assert fault(path) == f"{path}: not a readable parquet file: two columns are named 'a'"


def test_a_date_beyond_those_of_python_is_one_clear_line(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.array([10**8], pyarrow.date32())}), path)
    assert "a.parquet: not a readable parquet file: a date or time is beyond Python's" in fault(path)


def test_a_field_beyond_the_limit_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.data.read_files.MAX_FIELD", 10)
    path = write(tmp_path / "a.csv", f"a\n1\n{'x' * 11}\n")
    try:
        assert fault(path) == f"{path}:3: malformed CSV: field larger than field limit (10)"
    finally:
        csv.field_size_limit(131072)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES.encode())[:-12], "ends early"),
        (gzip.compress(LINES.encode())[:3], "ends early"),
        (LINES.encode(), "damaged or not gzip"),
        (gzip.compress(LINES.encode())[:-8] + b"\0" * 8, "damaged or not gzip"),
        (gzip.compress(b"\xff\xfe"), "not UTF-8 text (byte 0"),
    ],
    ids=["cut", "cut in its head", "text", "wrong sum", "no UTF-8"],  # not the bytes: they hold the time
)
def test_a_bad_gzip_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    assert f"{path}: " in fault(path) or f"{path}:1: " in fault(path)
    assert message in fault(path)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz", "a.parquet.gz", "a.arrow.gz"])
def test_every_kind_of_file_says_that_its_gzip_ends_early(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(csv_of(ROWS))[:-12])
    assert fault(tmp_path / name) == f"{tmp_path / name}: the gzip stream ends early; copy or download the file again"


def put(folder: Path, *names: str) -> None:
    """Files of one row each, which holds the file's name."""
    for name in names:
        row = {"file": name}
        content = {"csv": csv_of, "tsv": lambda rows: csv_of(rows, "\t"), "parquet": parquet_of, "arrow": arrow_of}
        kind = content.get(name.removesuffix(".gz").rpartition(".")[2], lambda rows: json.dumps(rows[0]))
        write(folder / name, kind([row]))


def names_read(folder: Path, split: str = "train") -> list[str]:
    """Of the files whose rows are loaded; `files_of` must name the same ones."""
    names = [row["file"] for row in load_rows(str(folder), split=split)]
    assert files_of(str(folder), split=split) == [folder / name for name in names]
    return names


def test_all_data_files_of_a_folder_are_read_by_name(tmp_path):
    names = ["10.jsonl", "2.json.gz", "b.parquet", "c.csv", "d.arrow", "e.tsv.gz"]
    put(tmp_path, *reversed(names))
    put(tmp_path, "README.md", "LICENSE", "notes.txt", ".hidden.jsonl", "dataset_infos.json", "config.json")
    (tmp_path / "0.jsonl").mkdir()
    put(tmp_path / "0.jsonl", "inner.jsonl")
    assert names_read(tmp_path) == names


def test_a_folder_with_files_of_splits_gives_the_split(tmp_path):
    put(tmp_path, "train.jsonl", "TRAIN-extra.csv", "test-00001-of-00002.parquet", "test-00000-of-00002.parquet")
    put(tmp_path, "valid.json", "val_2.json", "other.jsonl", "values.jsonl", "device.jsonl")
    assert names_read(tmp_path) == ["TRAIN-extra.csv", "train.jsonl"]
    assert names_read(tmp_path, "test") == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    assert names_read(tmp_path, "validation") == ["val_2.json", "valid.json"]
    expected = f"{tmp_path}: no file of split dev; there are: test, train, validation"
    assert fault(tmp_path, "dev") == expected
    with pytest.raises(DataError) as caught:
        files_of(str(tmp_path), split="dev")
    assert str(caught.value) == expected


def test_a_folder_without_names_of_splits_is_read_for_any(tmp_path):
    put(tmp_path, "a.jsonl", "retrain.jsonl", "values.jsonl")
    assert names_read(tmp_path, "validation") == ["a.jsonl", "retrain.jsonl", "values.jsonl"]


def test_a_folder_without_data_says_what_is_accepted(tmp_path):
    put(tmp_path, "README.md")
    (tmp_path / "data").mkdir()
    put(tmp_path / "data", "train.jsonl")
    assert fault(tmp_path) == (
        f"{tmp_path}: no data file in this folder (those within are not entered); "
        "accepted: .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, each also with .gz"
    )


def test_a_bad_file_of_a_folder_is_named(tmp_path):
    put(tmp_path, "a.jsonl", "c.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert fault(tmp_path) == f"{tmp_path / 'b.jsonl'}: cannot be read: No such file or directory"
    (tmp_path / "b.jsonl").unlink()
    write(tmp_path / "b.jsonl", "\n")
    assert fault(tmp_path) == f"{tmp_path / 'b.jsonl'}: the data set is empty"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is locked for root")
def test_a_locked_file_or_folder_is_one_clear_line(tmp_path):
    put(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    assert fault(tmp_path) == f"{tmp_path / 'a.jsonl'}: cannot be read: Permission denied"
    tmp_path.chmod(0)
    try:
        assert fault(tmp_path) == f"{tmp_path}: cannot be read: Permission denied"
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def saved(tmp_path):
    """A DatasetDict of two splits, as `datasets` saves it; that of `train` in two files."""
    splits = {"train": datasets.Dataset.from_list(ROWS), "easy": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "easy": 1})
    return tmp_path / "saved"


def test_reads_a_saved_dataset_whatever_the_split(saved):
    before = sorted(saved.rglob("*"))
    assert load_rows(str(saved / "train"), split="test") == ROWS
    assert sorted(saved.rglob("*")) == before
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "dataset_info.json", "state.json"]
    assert files_of(str(saved / "train"), split="test") == [saved / "train" / name for name in names]


def test_of_a_saved_dict_of_datasets_the_split_chooses(saved):
    (saved / "train" / "state.json").write_text("no JSON")  # another split's damage is no concern of this one
    assert load_rows(str(saved), split="easy") == ROWS[:1]
    names = ["dataset_dict.json", "easy/data-00000-of-00001.arrow", "easy/dataset_info.json", "easy/state.json"]
    assert files_of(str(saved), split="easy") == [saved / name for name in names]
    assert fault(saved, "test") == f"{saved}: no split test; there are: train, easy"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", b'{"splits": ', "dataset_dict.json: not a readable list of splits"),
        ("dataset_dict.json", b"[]", "dataset_dict.json: not a readable list of splits"),
        ("train/state.json", b"{}", "train: not a readable folder of save_to_disk"),
        ("train/dataset_info.json", b"[]", "train: not a readable folder of save_to_disk"),
        ("train/data-00001-of-00002.arrow", b"", "train: not a readable folder of save_to_disk"),
        ("train/data-00001-of-00002.arrow", arrow_of(ROWS)[:-40], "train: not a readable folder of save_to_disk"),
        ("train/data-00001-of-00002.arrow", damaged_arrow(), "train: not a readable folder of save_to_disk"),
        ("train/data-00001-of-00002.arrow", None, "train: not a readable folder of save_to_disk"),
        ("train/state.json", None, "train: not a readable folder of save_to_disk"),
    ],
    ids=range(9),
)
def test_a_damaged_saved_dataset_is_one_clear_line(saved, name, content, message):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    assert message in fault(saved)


def test_a_saved_dataset_without_rows_is_empty(tmp_path):
    datasets.Dataset.from_dict({"a": []}).save_to_disk(tmp_path / "saved")
    assert fault(tmp_path / "saved") == f"{tmp_path / 'saved'}: the data set is empty"


def test_the_files_of_a_file_and_of_a_hub_id(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", "not read")
    assert files_of(path, split="test") == [Path(path)]
    monkeypatch.chdir(tmp_path)
    assert files_of("owner/name", split="train") is None
    with pytest.raises(DataError, match="no such file"):
        files_of("no.jsonl", split="train")


PATHS = ["no.json", "owner/no.jsonl.gz", "no.ndjson", "a.tsv", "./owner/name", "/owner/name", "~/x", "a/b/c", ""]


@pytest.mark.parametrize("path", [*PATHS, "~no-such-user/x"])
def test_what_looks_like_a_path_is_never_sent_to_the_hub(path, monkeypatch, tmp_path):
    put(tmp_path, "a.jsonl")  # which is not read for ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert looks_like_path(path)
    fault(path)


def test_a_missing_file_says_that_it_is_neither(tmp_path):
    with pytest.raises(DataError, match="no such file, and not a hub id either"):
        load_rows(str(tmp_path / "no.json"))


def test_a_hub_id_is_loaded_with_its_split(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("owner/name-v1.5", split="test") == ROWS
    assert load_rows("owner/name:main", split="test") == ROWS
    assert asked == [("owner/name-v1.5", None, "test"), ("owner/name", "main", "test")]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), SetupError, "gated .*`hf auth login`"),
        (DatasetNotFoundError("Dataset 'o/n' doesn't exist"), SetupError, "neither a file nor .*`hf auth login`"),
        (ConnectionError("Couldn't reach 'o/n'\nmore"), SetupError, r"Couldn't reach 'o/n'\).*`hf download"),
        (ValueError('Unknown split "x".'), DataError, r"o/n \(split train\): Unknown split"),
        (RuntimeError("Dataset scripts are no longer supported"), DataError, "no longer supported"),
    ],
)
def test_hub_faults_say_what_to_do(monkeypatch, tmp_path, raised, expected, message):
    monkeypatch.chdir(tmp_path)

    def load_dataset(path, name, *, split):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=message) as caught:
        load_rows("o/n")
    assert "\n" not in str(caught.value)


def test_offline_the_hub_id_is_a_setup_error(tmp_path):
    """With the real library, in a process of its own: offline mode is read when the library is imported."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ibft.data.sources import load_rows
from ibft.errors import SetupError
try:
    load_rows("owner/name")
except SetupError as error:
    print(error)
"""
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "owner/name: no such file, and the hub cannot be reached" in done.stdout, done.stderr


@pytest.mark.parametrize(("name", "rows"), [("code_alpaca_2k.json.gz", 2017), ("new_codealpaca.jsonl.gz", 4535)])
def test_real_files(shared_data, name, rows):
    loaded = load_rows(str(shared_data / name))
    assert len(loaded) == rows
    assert set(loaded[0]) == {"instruction", "input", "output"}
