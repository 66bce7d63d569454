"""The figures and problems of a preview, by hand."""

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ibft.cli import app
from ibft.config import Config
from ibft.data.encode import EncodedData
from ibft.data.samples import Sample
from ibft.preview import packing_of, problems
from ibft.tiny import BASE_DIR

ROWS = [{"instruction": "a", "output": f"x{k}"} for k in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture
def config():
    data = Config().data.model_copy(update={"max_length": 10})
    train = Config().train.model_copy(update={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1})
    return Config().model_copy(update={"data": data, "train": train})


def unpacked(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"packing": False})})


def test_packs_padding_and_steps(config):
    data = EncodedData.of([Sample([1] * length, 1) for length in (6, 4, 7, 3, 2)])  # 6 + 4, 7 + 3, 2
    assert packing_of(data, config) == {
        "packing": True,
        "steps_per_epoch": 2,
        "packed": {"rows": 3, "length": 10, "padding": pytest.approx(8 / 30)},
        "padded to max_length": {"rows": 5, "padding": pytest.approx(28 / 50)},
    }
    found = packing_of(data, unpacked(config))
    assert (found["packing"], found["steps_per_epoch"]) == (False, 3)


def said(data: EncodedData, config: Config, tokenizer) -> list[str]:
    return list(problems(data, config, tokenizer))


def test_nothing_is_said_of_whole_samples(config, tokenizer):
    assert said(EncodedData.of([Sample([5, 6, tokenizer.eos_token_id], 1)]), config, tokenizer) == []


def test_few_labels_come_first(config, tokenizer):
    data = EncodedData.of([Sample([5] * 299 + [tokenizer.eos_token_id], 298)], rows=2, dropped=1)
    first, second = said(data, config, tokenizer)
    assert first.startswith("only 0.67% of the tokens are labels")
    assert second.startswith("1 of 2 rows ")


def test_lost_labels_are_a_share_of_all(config, tokenizer):
    data = EncodedData.of(
        [Sample([5, tokenizer.eos_token_id], 1)], rows=1, lost_label_tokens=1, given_label_tokens=8
    )  # fmt: skip
    assert said(data, config, tokenizer) == ["12.5% of the label tokens are lost at data.max_length=10"]


def test_samples_that_do_not_end(config, tokenizer):
    data = EncodedData.of([Sample([5, 6], 1), Sample([5, tokenizer.eos_token_id], 1)])
    (problem,) = said(data, config, tokenizer)
    assert problem.startswith("1 samples do not end with the tokenizer's EOS (<|endoftext|>)")
    without = config.model_copy(update={"data": config.data.model_copy(update={"add_eos": False})})
    assert said(data, without, tokenizer) == []


def test_tokens_that_cannot_be_spelled(config, tokenizer):
    class Knows:
        eos_token_id, eos_token, unk_token_id, unk_token = 9, "<eos>", 7, "<unk>"

    (problem,) = said(EncodedData.of([Sample([7, 5, 7, 9], 1)]), config, Knows())
    assert problem.startswith("2 tokens are the tokenizer's <unk>")


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def preview(path, *arguments):
    result = CliRunner().invoke(app, ["preview", f"data.path={path}", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_sample_is_shown_with_the_number_of_its_row(rows):
    with rows.open("a") as file:
        file.write('{"instruction": "a", "output": ""}\n{"instruction": "a", "output": "z"}\n')
    shown = preview(rows, "data.val_size=0", "-n", "9")["shown"]
    assert [sample["row"] for sample in shown] == [1, 2, 3, 4, 5, 7]


def test_all_rows_are_tokenised_where_none_are_too_many(rows):
    assert preview(rows, "data.val_size=0", "--rows", "0")["rows"] == 5
    assert preview(rows, "data.val_size=0", "--rows", "2")["rows"] == 2
    assert preview(rows, "data.val_size=0", "--rows", "4", "data.max_samples=3")["rows"] == 3


def test_the_first_rows_alone_are_not_cached(rows, tmp_path):
    preview(rows, "--rows", "2")
    assert not (tmp_path / "cache").exists()
