import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from pyarrow import parquet

from ibft.data.sources import load_rows
from ibft.errors import DataError, SetupError

ROWS = [{"instruction": "naïve\u2028line", "output": "1"}, {"instruction": "b", "output": "2"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path: Path, text: str) -> str:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "A.JSON"])
@pytest.mark.parametrize(
    "text", [json.dumps(ROWS, indent=1), LINES, "\ufeff" + LINES + "\n\n", LINES.replace("\n", "\r\n")]
)
def test_reads_array_and_lines_whatever_the_extension(tmp_path, name, text):
    assert load_rows(write(tmp_path / name, text)) == ROWS


def test_reads_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert load_rows(str(path)) == ROWS


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
        ("a.csv", "a,b", "a.csv: unknown kind of file; accepted: .json"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, message):
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / name, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_folder_names_what_it_holds(tmp_path):
    write(tmp_path / "b.json", LINES)
    write(tmp_path / "README.md", "")
    with pytest.raises(DataError, match=r"is a folder: name one data file in it \(found: b.json\)"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("path", ["no.json", "owner/no.jsonl.gz", "./owner/name", "/owner/name", "~/x", "a/b/c", ""])
def test_what_looks_like_a_path_is_never_sent_to_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError):
        load_rows(path)


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
