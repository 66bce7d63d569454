"""Each setting of `data` reaches the samples that a run is given: what is read, left out, held out and taught."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ibft.console import Console
from ibft.data.prepare import Datasets, load_data
from ibft.data.samples import SampleStore
from ibft.load_config import load_config
from ibft.tiny import BASE_DIR

ROW = {"instruction": "add", "output": "one two three", "other": "four"}
TASK = "given a list of numbers return those that are larger than the mean of all of them"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_DIR)


def save(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerBase, *overrides: str) -> Datasets:
    given = [f"data.path={path}", "data.max_length=128", "data.val_size=0", "data.cache=false", *overrides]
    return load_data(load_config(None, given)[0], tokenizer, Console())


def texts(samples: SampleStore, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(sample.input_ids) for sample in samples]


def taught(samples: SampleStore, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode([s.input_ids[i] for i in s.label_positions()]) for s in samples]


@pytest.mark.parametrize(
    ("overrides", "text", "labels"),
    [
        ([], "add\none two three<|endoftext|>", "one two three<|endoftext|>"),
        (["data.add_eos=false"], "add\none two three", "one two three"),
        (["data.template={folder}/t.jinja"], "Q add A one two three<|endoftext|>", "one two three<|endoftext|>"),
        (["data.fields={{prompt: output, response: other}}"], "one two three\nfour<|endoftext|>", "four<|endoftext|>"),
    ],
)
def test_what_is_written_and_taught_is_as_set(tmp_path, tokenizer, overrides, text, labels):
    (tmp_path / "t.jinja").write_text("Q {{ prompt }} A ")
    given = [override.format(folder=tmp_path) for override in overrides]
    samples = load(save(tmp_path / "rows.jsonl", [ROW]), tokenizer, *given).train.samples
    assert (texts(samples, tokenizer), taught(samples, tokenizer)) == ([text], [labels])


def test_all_tokens_are_taught_where_that_is_set(tmp_path, tokenizer):
    (sample,) = load(save(tmp_path / "rows.jsonl", [ROW]), tokenizer, "data.labels=all").train.samples
    assert sample.num_labels == len(sample.input_ids) - 1


def test_what_is_too_long_is_treated_as_set(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", [ROW, {"instruction": "a", "output": "b"}])
    (whole, _) = load(path, tokenizer).train.samples
    n = len(whole.input_ids) - 1
    lengths = {
        way: load(path, tokenizer, f"data.max_length={n}", f"data.truncation={way}").train.lengths.tolist()
        for way in ("right", "left", "drop")
    }
    assert lengths == {"right": [n, 4], "left": [n, 4], "drop": [4]}
    left, _ = load(path, tokenizer, f"data.max_length={n}", "data.truncation=left").train.samples
    assert left.input_ids == whole.input_ids[1:]
    split = load(path, tokenizer, "data.max_length=4", "data.truncation=split").train
    assert [len(s.input_ids) for s, row in zip(split.samples, split.samples.rows, strict=True) if row == 1] == [4]
    assert split.split >= 1


def test_max_samples_counts_rows_that_are_left(tmp_path, tokenizer):
    rows = [{"instruction": "q", "output": f"r{k}"} for k in (0, 0, 1, 2, 3)]
    (tmp_path / "drop.json").write_text('{"ids": [2]}')
    data = load(
        save(tmp_path / "rows.jsonl", rows), tokenizer,
        f"data.drop_ids={tmp_path}/drop.json", "data.deduplicate=true", "data.max_samples=2",
    )  # fmt: skip
    assert taught(data.train.samples, tokenizer) == ["r0<|endoftext|>", "r2<|endoftext|>"]


def test_rows_that_give_problems_away_are_not_taught(tmp_path, tokenizer, capsys):
    path = save(tmp_path / "rows.jsonl", [ROW, {"instruction": TASK, "output": "x"}])
    problems = save(tmp_path / "problems.jsonl", [{"task": TASK}])
    data = load(path, tokenizer, f"data.decontaminate=[{problems}]")
    assert taught(data.train.samples, tokenizer) == ["one two three<|endoftext|>"]
    assert "1 of 2 rows (data.decontaminate)" in capsys.readouterr().out


def test_held_out_rows_are_all_of_their_file(tmp_path, tokenizer):
    """What chooses training rows leaves them alone."""
    rows = [{"instruction": "q", "output": f"r{k}"} for k in (0, 0, 1)]
    (tmp_path / "drop.json").write_text('{"ids": [2]}')
    held = save(tmp_path / "held.jsonl", rows)
    data = load(
        save(tmp_path / "rows.jsonl", rows), tokenizer, f"data.eval_path={held}", "data.deduplicate=true",
        f"data.drop_ids={tmp_path}/drop.json", "data.max_samples=1", "data.val_size=0.5",
    )  # fmt: skip
    assert taught(data.train.samples, tokenizer) == ["r0<|endoftext|>"]
    assert data.held_out is not None
    assert len(data.held_out.samples) == 3


def test_no_more_than_512_rows_are_held_out(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "r"}] * 1100)
    data = load(path, tokenizer, "data.val_size=0.5")
    assert data.held_out is not None
    assert (len(data.train.samples), len(data.held_out.samples)) == (1100 - 512, 512)


def test_the_split_is_read_that_is_set(tmp_path, tokenizer):
    for name in ("train", "test"):
        save(tmp_path / f"{name}.jsonl", [{"instruction": "q", "output": name}])
    assert taught(load(tmp_path, tokenizer).train.samples, tokenizer) == ["train<|endoftext|>"]
    assert taught(load(tmp_path, tokenizer, "data.split=test").train.samples, tokenizer) == ["test<|endoftext|>"]
