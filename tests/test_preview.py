"""`ibft-fast preview`: what would be taught, without weights."""

import json

import pytest
from typer.testing import CliRunner

from ibft.cli import app


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "long", "output": "x " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*given, {"instruction": "none", "output": ""}]))
    return path


def preview(*arguments):
    return CliRunner().invoke(app, ["preview", *map(str, arguments)])


def test_the_bundled_tasks(monkeypatch):
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("loaded weights"))
    result = preview("-n", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("--- row ") == 2
    assert "⟦def " in result.output
    assert "no problem found" in result.output
    assert "packing: 516 samples in " in result.output


def test_what_is_taught_is_marked_and_the_first_problem_said(rows):
    result = preview(f"data.path={rows}", "data.max_length=64", "data.val_size=0")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "add 1 2 ⟦3<|endoftext|>⟧" in text or "⟦3" in text
    assert "first problem: " in text
    assert "of the label tokens are lost at data.max_length=64" in text
    assert "1 rows have an empty response, the first is row 3" in text


def test_for_machines(rows):
    result = preview(f"data.path={rows}", "data.val_size=0", "-n", 1, "--json")
    found = json.loads(result.stdout)
    assert (found["rows"], found["samples"], len(found["shown"])) == (3, 2, 1)
    (sample,) = found["shown"]
    assert [piece["taught"] for piece in sample["pieces"]] == [False, True]
    assert sample["pieces"][0]["text"] == "add\n1 2\n"
    assert sample["pieces"][1]["text"].startswith("3")
    assert sample["tokens"] > sample["label_tokens"] > 0
    assert sum(count for *_, count in found["lengths"]["histogram"]) == 2
    assert found["packing"]["packed"]["rows"] == 1
    assert found["formats"] == {"instruction + input + output": 1, "instruction + output": 2}


def test_only_the_first_rows_are_tokenised(rows):
    found = json.loads(preview(f"data.path={rows}", "data.val_size=0", "--rows", 1, "--json").stdout)
    assert found["rows"] == 1


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ('{"instruction": "a"}\n', 3, "row 1 has the keys instruction; expected instruction + output"),
        ('{"instruction": "a", \n', 3, "rows.jsonl:1: malformed JSON"),
        ("", 3, "the data set is empty"),
    ],
)
def test_faults_are_found_before_any_weight(rows, content, code, said):
    rows.write_text(content)
    result = preview(f"data.path={rows}")
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_fields_that_are_not_whole(rows):
    result = preview(f"data.path={rows}", "data.fields.prompt=q")
    assert result.exit_code == 2
    assert "data.fields: got prompt, expected prompt and response (and input), or messages, or text" in result.output


def test_a_key_that_does_not_exist(rows):
    result = preview(f"data.path={rows}", "data.tempalte=alpaca")
    assert result.exit_code == 2
    assert "did you mean 'data.template'" in result.output
