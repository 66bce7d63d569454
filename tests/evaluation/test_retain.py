"""`evaluate retain`: reports and refusals; the harness itself where it is installed."""

import json

import pytest
from typer.testing import CliRunner

from ibft.cli import app
from ibft.evaluation.retain import scores_of

TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
SCORES = {"words": {"acc": {"value": 1.0, "stderr": None}}}
REPORT = {"tasks": ["words"], "num_fewshot": None, "limit": None, "scores": SCORES}


def retain(*arguments):
    return CliRunner().invoke(app, ["evaluate", "retain", "--model", "bundled:tiny", *map(str, arguments)])


def test_the_harness_results_as_scores():
    results = {
        "gsm8k": {
            "alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.125,
            "exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": "N/A",
        },
        "words": {"acc,none": 1, "acc_stderr,none": 0.0},
    }  # fmt: skip
    assert scores_of(results) == {
        "gsm8k": {
            "exact_match (strict-match)": {"value": 0.25, "stderr": 0.125},
            "exact_match (flexible-extract)": {"value": 0.5, "stderr": None},
        },
        "words": {"acc": {"value": 1.0, "stderr": 0.0}},
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--limit", "0"], 2, "--limit: got 0, expected 1 or more"),
        (["--num-fewshot", "-1"], 2, "--num-fewshot: got -1, expected 0 or more"),
        (["--tasks", " , "], 2, "--tasks: got ' , ', expected names with commas between them"),
        (["--baseline", "none.json"], 3, "--baseline: none.json: No such file or directory"),
    ],
)
def test_arguments_refused(arguments, code, said):
    result = retain(*arguments)
    assert (result.exit_code, said in result.output) == (code, True), result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no report of evaluate retain"),
        (json.dumps(REPORT | {"limit": 5}), "has limit 5, this has None"),
        (json.dumps(REPORT | {"tasks": ["mmlu"]}), "has tasks ['mmlu'], this has ['words']"),
    ],
)
def test_baselines_refused(tmp_path, text, said):
    (tmp_path / "base.json").write_text(text)
    result = retain("--tasks", "words", "--baseline", tmp_path / "base.json")
    assert (result.exit_code, said in result.output) == (3, True), result.output


def test_without_the_harness_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = retain()
    assert (result.exit_code, "pip install -e '.[retain]' in a clone" in result.output) == (4, True)


def test_a_task_of_ones_own_by_the_real_harness(tmp_path, monkeypatch):
    """The base prefers a word that it knows to one that it does not; the questions ask for either in turn."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"question": "def f(words):\n    return", "choices": [" [w for w in words]", " zzz"], "label": i % 2}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "base.json").write_text(json.dumps(REPORT))
    common = ("--tasks", "words", "--include-path", tmp_path, "--baseline", tmp_path / "base.json")
    result = retain(*common, "-o", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "found.json").read_text())["scores"]["words"]["acc"]["value"] == 0.5
    assert "-0.5000" in result.output
    assert retain("--tasks", "none", "--include-path", tmp_path).exit_code == 2
