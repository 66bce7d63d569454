"""Files of row numbers, and the rows that they leave a training run."""

import hashlib
import json
import time
import tracemalloc

import pytest

from ibft.config import Config, DataConfig
from ibft.data.ids import choose_numbers, hash_rows, read_ids
from ibft.errors import DataError

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]


def save(path, ids, **more) -> str:
    path.write_text(json.dumps({"ids": ids, **more}))
    return str(path)


def test_kept_and_dropped(tmp_path):
    keep, drop = save(tmp_path / "keep", [4, 1, 2]), save(tmp_path / "drop", [2, 0])
    assert choose_numbers(ROWS, "d", keep=None, drop=None) == list(range(len(ROWS)))
    assert choose_numbers(ROWS, "d", keep=keep, drop=None) == [1, 2, 4]
    assert choose_numbers(ROWS, "d", keep=None, drop=drop) == [1, *range(3, len(ROWS))]
    assert choose_numbers(ROWS, "d", keep=keep, drop=drop) == [1, 4]


def test_made_for_other_rows(tmp_path):
    right = save(tmp_path / "right", [1], data_sha256=hash_rows(ROWS))
    assert choose_numbers(ROWS, "d", keep=right, drop=None) == [1]
    with pytest.raises(DataError, match=r"data.drop_ids: .* was made for other rows than those of d"):
        choose_numbers(ROWS[1:], "d", keep=None, drop=right)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no", "is not JSON"),
        ("[1]", "has no list of ids"),
        ('{"ids": []}', "an empty list"),
        ('{"ids": [1, true]}', "has the id True, expected whole numbers"),
        ('{"ids": [6]}', r"has id 6, but d has the rows 0 .. 5"),
        ('{"ids": [1, 1]}', "has id 1 twice"),
    ],
)
def test_malformed(tmp_path, content, said):
    (tmp_path / "ids").write_text(content)
    with pytest.raises(DataError, match=said):
        choose_numbers(ROWS, "d", keep=str(tmp_path / "ids"), drop=None)


def test_an_id_that_is_there_twice_is_found_at_once(tmp_path):
    file = save(tmp_path / "ids", [*range(50_000), 49_999])
    start = time.process_time()
    with pytest.raises(DataError, match="has id 49999 twice"):
        read_ids("data.keep_ids", file, 50_000, "d")
    assert time.process_time() - start < 5  # a look through all that came before takes some 20


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS, [{"b": {"d": 1, "c": None}, "a": "é\ud800"}, {"t": pytest}]])
def test_the_hash_is_that_of_the_json_array_of_all_rows(rows):
    whole = json.dumps(rows, sort_keys=True, default=str)
    assert hash_rows(rows) == hashlib.sha256(whole.encode()).hexdigest()


def test_the_rows_are_hashed_one_by_one():
    rows = [{"text": "x" * 10_000}] * 500
    tracemalloc.start()
    try:
        hash_rows(rows)
        assert tracemalloc.get_traced_memory()[1] < 500_000  # of 5,000,000
    finally:
        tracemalloc.stop()


def test_nothing_left(tmp_path):
    drop = save(tmp_path / "drop", [*range(6)])
    with pytest.raises(DataError, match="leave no row of d"):
        choose_numbers(ROWS, "d", keep=None, drop=drop)
    with pytest.raises(DataError, match=r"data.keep_ids: .*: No such file"):
        choose_numbers(ROWS, "d", keep=str(tmp_path / "none"), drop=None)


def test_a_run_takes_them_before_max_samples(tmp_path):
    from rich.console import Console as Rich
    from tiny_models import FakeTokenizer

    from ibft.console import Console
    from ibft.data.prepare import load_data

    class Letters(FakeTokenizer):
        def __call__(self, texts, **_):
            return {"input_ids": [[2 + ord(letter) % 90 for letter in text] for text in texts]}

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drop = save(tmp_path / "drop", [0, 3], data_sha256=hash_rows(ROWS))
    settings = DataConfig(path=str(path), drop_ids=drop, max_samples=3, val_size=0, cache=False)
    console = Console()
    console.rich = Rich(quiet=True)
    config = Config.model_construct(**dict(Config()) | {"data": settings})
    data = load_data(config, Letters(), console)
    assert data.sha256 == hash_rows([ROWS[1], ROWS[2], ROWS[4]])
    assert len(data.train.samples) == 3
