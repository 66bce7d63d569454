"""Mathematics and plain text, by a recipe alone."""

import json

import pytest

from tests.reproduce.test_reproduction import reproduce, reproduce_apart

LEAST = [
    "preset=tiny", "train.max_steps=2", "train.logging_steps=1", "seeds=[0]", "score_steps=1",
    "memorization.comparison={}", "models=[{name: FT, what: plain, changes: {ib.alpha: 0}}, {name: IB-FT, what: ours}]",
]  # fmt: skip


@pytest.fixture
def base():
    from ibft.tiny import BASE_DIR

    return f"model.name_or_path={BASE_DIR}"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_text(tmp_path, base, soaking):
    if not soaking:
        pytest.skip("half a minute: make soak")
    rows = [{"text": f"line {i} of a text\n" * 3} for i in range(12)]
    data = write(tmp_path / "text.jsonl", rows)
    result = reproduce_apart("from", "text", *LEAST, base, f"data.path={data}", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"] == []
    assert {row["model"] for row in report["memorization"]} == {"base", "FT", "IB-FT"}
    assert [row["step"] for row in report["deciles"] if row["model"] == "IB-FT"] == [1, 2]


def test_mathematics_from_a_copied_recipe(tmp_path, base, soaking):
    if not soaking:
        pytest.skip("half a minute: make soak")
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(12)]
    data = write(tmp_path / "train.jsonl", rows)
    problems = write(tmp_path / "test.jsonl", rows[:3])
    from importlib.resources import files

    recipe = tmp_path / "mine.yaml"
    recipe.write_text((files("ibft") / "recipes" / "gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine"))
    less = ["suites.GSM8K.n=2", "suites.GSM8K.more_temperatures=[]", "suites.GSM8K.max_new_tokens=4"]
    named = [base, f"data.path={data}", f"suites.GSM8K.problems={problems}"]
    result = reproduce_apart("from", recipe, *LEAST, *less, *named, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["name"] == "mine"
    assert {(row["model"], row["suite"], len(row["passed"])) for row in report["counts"]} == {
        (model, "GSM8K", 3) for model in ("base", "FT", "IB-FT")
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.yaml", None, "no.yaml: No such file"),
        ("a.yaml", "[", "a.yaml:1: malformed YAML"),
        ("a.yaml", "name: x", "what: Field required"),
        (
            "gsm9k",
            None,
            "expected a recipe file (.yaml) or one of tiny, tiny-quick, tiny-variants, origen, evol, gsm8k, text",
        ),
    ],
)
def test_recipe_files_refused(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / name).write_text(content)
    result = reproduce("from", name)
    assert result.exit_code == 2
    assert said in result.output


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path, base):
    data = write(tmp_path / "train.jsonl", [{"question": "q", "answer": "#### 1"}] * 12)
    arguments = [*LEAST, base, f"data.path={data}", f"suites.GSM8K.problems={tmp_path / 'none.jsonl'}"]
    result = reproduce("from", "gsm8k", *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "none.jsonl: no such file" in result.output
    assert not (tmp_path / "out").exists()  # so that the command, put right, is not refused


def test_a_missing_comparison_set_is_said_before_anything_is_trained(tmp_path):
    arguments = ["-o", tmp_path / "out", "memorization.comparison={x: none.jsonl}"]
    result = reproduce("tiny", "--quick", *arguments)
    assert result.exit_code == 3
    assert "none.jsonl: no such file" in result.output
    assert not (tmp_path / "out").exists()
