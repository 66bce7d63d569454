"""`ibft-fast reproduce`: its recipes, and the whole pipeline with next to nothing of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ibft.cli import app
from ibft.errors import ConfigError
from ibft.reproduce.recipe import RECIPES, load_recipe

LEAST = [
    "max_rows=20", "bases.steps=1", "train.max_steps=2", "train.logging_steps=1", "score_steps=1",
    'models=[{name: FT, what: plain, changes: {ib.alpha: 0}}, {name: IB-FT, what: ours},'
    " {name: dropped, what: control, base: perturbed base, changes: {ib.alpha: 0}, drop: most_memorised}]",
    "suites.tiny.max_problems=2", "suites.tiny.max_new_tokens=4", "suites.tiny.more_temperatures=[1.0]",
]  # fmt: skip


def reproduce(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def reproduce_apart(*arguments) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without Triton's interpreter, in which these tests run: minutes for a step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ibft.cli", "reproduce", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduction") / "first"
    result = reproduce_apart("tiny", "--quick", "-o", out, *LEAST)
    assert result.returncode == 0, result.stderr
    return out


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_every_table_is_filled(made):
    report = report_of(made)
    bases, models = ["base", "twin base", "perturbed base"], ["FT", "IB-FT", "dropped"]
    assert [model["name"] for model in report["models"]] == bases + models
    assert {row["model"] for row in report["counts"]} == set(bases + models)
    assert {row["model"] for row in report["geometry"]} == set(bases + models)
    assert {row["model"] for row in report["memorization"]} == {*bases, "FT", "IB-FT"}
    groups = {row["data"]: len(row["values"]) for row in report["memorization"] if row["model"] == "FT"}
    assert groups == {"memorised": 6, "rest": 14, "unseen": 20}
    steps = [(row["model"], row["step"]) for row in report["deciles"] if row["model"] in ("base", "FT", "IB-FT")]
    assert steps == [("base", 0), ("FT", 1), ("FT", 2), ("IB-FT", 1), ("IB-FT", 2)]
    assert all(len(row["ce"]) == 10 for row in report["deciles"])
    temperatures = {model: [r["temperature"] for r in report["counts"] if r["model"] == model] for model in models}
    assert temperatures == {"FT": [0.6, 1.0], "IB-FT": [0.6, 1.0], "dropped": [0.6]}
    assert all(len(row["passed"]) == len(report["suites"]["tiny"]["tasks"]) == 2 for row in report["counts"])
    assert [(row["model"], row["steps"], row["kl"] is None) for row in report["training"]] == [
        ("FT", 2, True), ("IB-FT", 2, False), ("dropped", 2, True),
    ]  # fmt: skip
    assert report["claims"]
    assert all((made / "figures" / f"fig3.{kind}").stat().st_size > 0 for kind in ("png", "svg"))
    assert "<html" in (made / "report.html").read_text()


def test_a_reader_learns_of_what_it_is(made):
    report = report_of(made)
    assert report["settings"]["train"]["preset"] == "tiny"
    assert {"torch", "transformers", "peft"} <= report["versions"].keys()
    assert str(made) not in json.dumps(report)


def test_the_dropped_rows_are_the_most_memorised(made):
    run = made / "models" / "dropped" / "seed-0" / "run"
    assert "drop_ids: " + str(made / "parts" / "most_memorised.json") in (run / "config.yaml").read_text()
    memorised = json.loads((made / "bases" / "base" / "made" / "done.json").read_text())["result"]["memorised"]
    assert len(memorised) == 6
    manifests = [
        json.loads((made / "models" / name / "seed-0" / "run" / "manifest.json").read_text())["data_sha256"]
        for name in ("ft", "dropped")
    ]
    assert manifests[0] != manifests[1]


def test_again_the_same_bytes(made, tmp_path, soaking):
    """All of it; a part of it `test_stopped_it_goes_on` makes again."""
    if not soaking:
        pytest.skip("a minute and more: make soak")
    out = tmp_path / "second"
    assert reproduce_apart("tiny", "--quick", "-o", out, "--jobs", 1, *LEAST).returncode == 0
    assert (out / "report.json").read_bytes() == (made / "report.json").read_bytes()


def test_stopped_it_goes_on(made):
    """As kills leave it: one model in the middle of training, one in the middle of its samples."""
    before = (made / "report.json").read_bytes()
    trains, samples, done = (made / "models" / name / "seed-0" for name in ("ib-ft", "dropped", "ft"))
    for folder in (trains, samples):
        (folder / "done.json").unlink()
    (trains / "run" / "result.json").unlink()
    for lines in (samples / "samples" / "tiny").glob("*.jsonl"):
        lines.write_bytes(lines.read_bytes()[:-30])
    kept = (done / "done.json").stat().st_mtime_ns, (samples / "run" / "result.json").stat().st_mtime_ns
    (made / "report.json").unlink()
    result = reproduce_apart("tiny", "--quick", "-o", made, *LEAST)
    assert result.returncode == 0, result.stderr
    assert "models: 1 of 3 done already" in result.stdout
    assert (made / "report.json").read_bytes() == before
    assert ((done / "done.json").stat().st_mtime_ns, (samples / "run" / "result.json").stat().st_mtime_ns) == kept


def test_another_reproduction_is_refused(made):
    result = reproduce("tiny", "--quick", "-o", made, *LEAST, "ib.alpha=0.5")
    assert result.exit_code == 2
    assert "was begun with other settings (recipe.train.ib.alpha): name another folder with -o" in result.output


def test_the_recipe_beside_the_report_makes_it_again(made):
    report = report_of(made)
    assert load_recipe(str(made / "recipe.yaml"), []).model_dump(mode="json") == report["settings"]


def test_jobs_below_one_are_refused(tmp_path):
    result = reproduce("tiny", "--jobs", 0, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--jobs: got 0, expected 1 or more" in result.output


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = reproduce("tiny", "--quick", "-o", tmp_path)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", [*RECIPES, "tiny-quick"])
def test_every_recipe_is_whole(name):
    recipe = load_recipe(name, [])
    assert {"FT", "IB-FT"} <= {model.name for model in recipe.models}
    assert recipe.models[0].changes == {"ib.alpha": 0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ib.alhpa=1", "did you mean 'ib.alpha'"),
        ("seeds=[]", "seeds: "),
        ("seeds=[1,1]", "one of them twice"),
        ("bases.steps=0", "bases.steps: "),
        ("bases.stpes=3", "bases.stpes: "),
        ("ib.alpha=-1", "ib.alpha"),
        ("scored=[FT,GT]", "scored: no model is named 'GT'"),
        ("models=[{name: FT, what: x, base: nowhere}]", "starts from 'nowhere'"),
        ("suites.tiny.n=0", "suites.tiny.n"),
        ("nothing", "expected key=value"),
        ("memorization.k=0", "memorization.k"),
        ("memorization.share=60", "memorization.share"),
        ("data.max_samples=100", "FT: data.max_samples: got 100, expected None: a reproduction asks of all rows"),
        ("data.split=test", "FT: data.split: got 'test', expected 'train'"),
        (
            "models=[{name: FT, what: x, changes: {model.quantization: none}}, {name: IB-FT, what: x}]",
            "FT: model.quantization: got 'none', expected 'nf4': all models of a reproduction share it",
        ),
        ("memorization.comparison={data: x.jsonl}", "'data' is the name of the fine-tuning rows"),
        ("seeds=[-1]", "seeds.0"),
        ('models=[{name: "FT, a", what: x}, {name: "FT; a", what: x}]', "nothing but what a folder's name cannot hold"),
        ("seeds={", "seeds={: '{' is no value"),
        ("name.x=1", "name.x: "),
    ],
)
def test_recipes_refused(override, said):
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_makes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = reproduce("from", name, "--dry-run")
    assert result.exit_code == 0, result.output
    for step in ("train", "score, look inside"):
        assert step in result.output
    assert ("sample and judge" in result.output) == (name != "text")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_base_that_is_here_tells_time_and_memory(tmp_path):
    from ibft.tiny import BASE_DIR, task_file

    result = reproduce(
        "evol", "--dry-run", f"model.name_or_path={BASE_DIR}", f"data.path={task_file('train')}", "ib.layer=5",
        "data.max_length=512",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "18 runs of" in result.output
    assert "unknown" not in result.output
