"""What the cache must not give back: samples of another tokenizer, other ids or other problems."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ibft.console import Console
from ibft.data.prepare import Datasets, key_for, load_data
from ibft.load_config import load_config
from ibft.tiny import BASE_DIR

TASK = "given a list of numbers return those that are larger than the mean of all of them"
ROWS = [{"instruction": TASK if k == 3 else f"question {k}", "output": f"answer {k % 4}"} for k in range(6)]
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_DIR)


def save(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerBase, *overrides: str) -> Datasets:
    given = [f"data.path={path}", "data.max_length=128", "data.val_size=0", *overrides]
    return load_data(load_config(None, given)[0], tokenizer, Console())


def numbers(data: Datasets) -> int:
    return len(data.train.samples)


def test_a_file_of_ids_that_is_kept_is_not_one_that_is_dropped(tmp_path, tokenizer):
    path, ids = save(tmp_path / "rows.jsonl", ROWS), tmp_path / "ids.json"
    ids.write_text('{"ids": [0, 1]}')
    assert numbers(load(path, tokenizer, f"data.keep_ids={ids}")) == 2
    assert numbers(load(path, tokenizer, f"data.drop_ids={ids}")) == 4
    assert numbers(load(path, tokenizer)) == 6


def test_problems_and_their_content_are_in_the_key(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", ROWS)
    problems = save(tmp_path / "problems.jsonl", [{"task": "nothing that any of these rows says in so many words"}])
    assert numbers(load(path, tokenizer)) == 6
    assert numbers(load(path, tokenizer, f"data.decontaminate=[{problems}]")) == 6
    save(problems, [{"task": TASK}])
    assert numbers(load(path, tokenizer, f"data.decontaminate=[{problems}]")) == 5
    assert numbers(load(path, tokenizer)) == 6


def test_a_suite_of_the_hub_is_in_the_key_by_its_name(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", ROWS)
    keys = set()
    for suites in ([], ["humaneval"], ["mbpp"]):
        config, _ = load_config(None, [f"data.path={path}", f"data.decontaminate={suites}"])
        keys.add(key_for(str(path), config.data, tokenizer, chosen=True))
    assert len(keys) == 3


def test_one_file_for_training_and_holding_out(tmp_path, tokenizer):
    """Only of the training rows equal ones are left out."""
    path = save(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0], ROWS[1]])
    for _ in range(2):
        data = load(path, tokenizer, f"data.eval_path={path}", "data.deduplicate=true")
        assert data.held_out is not None
        assert (numbers(data), len(data.held_out.samples)) == (2, 3)


def test_the_eos_token_is_in_the_key(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", ROWS)
    for token in (tokenizer.eos_token, tokenizer.pad_token):
        tokenizer.eos_token = token
        sample = load(path, tokenizer).train.samples[0]
        assert tokenizer.decode(sample.input_ids) == f"question 0\nanswer 0{token}"


def test_the_chat_template_is_in_the_key(tmp_path, tokenizer):
    path = save(tmp_path / "rows.jsonl", [TALK])
    for mark in "<[":
        tokenizer.chat_template = (
            "{% for m in messages %}" + mark + "{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}" + mark + "assistant:{% endif %}"
        )  # fmt: skip
        sample = load(path, tokenizer).train.samples[0]
        assert tokenizer.decode(sample.input_ids) == f"{mark}user:q\n{mark}assistant:a{tokenizer.eos_token}"
