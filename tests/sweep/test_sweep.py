"""`ibft-fast sweep` as a user meets it: next to nothing of everything, gone on with, refused."""

import csv
import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
from typer.testing import CliRunner

from ibft.cli import app
from ibft.errors import NonFiniteError
from ibft.sweep import work
from ibft.sweep.plan import Asked, plan_sweep
from ibft.sweep.run import here_of
from ibft.tiny import task_file

LEAST = ["train.max_steps=2", "train.logging_steps=1", "data.max_samples=40", "--grid", "ib.alpha=0.01,0.1",
         "--seeds", "0", "-n", "2", "--max-new-tokens", "4"]  # fmt: skip
RUNS = [f"runs/{cell}/seed-0" for cell in ("baseline", "alpha-0.01", "alpha-0.1")]


def sweep(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def sweep_apart(*arguments) -> str:
    """What it prints in a process of its own, without Triton's interpreter, in which these tests run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ibft.cli", "sweep", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a user has: four tasks of each split, two groups of rows."""
    folder = tmp_path_factory.mktemp("files")
    for split in ("validation", "test"):
        lines = task_file(split).read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:4]))
    for name, first in (("most", 0), ("least", 10)):
        (folder / f"{name}.json").write_text(json.dumps({"ids": list(range(first, first + 4))}))
    return folder


@pytest.fixture(scope="module")
def arguments(files):
    named = [[f"--{name}", files / f"{name}.{kind}"] for name, kind in
             (("validation", "jsonl"), ("test", "jsonl"), ("most", "json"), ("least", "json"))]  # fmt: skip
    return [*LEAST, f"data.eval_path={files / 'validation.jsonl'}", *(part for pair in named for part in pair)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, arguments):
    out = tmp_path_factory.mktemp("sweep") / "first"
    assert "sweep: 2 cells (2 of ib.alpha) and the baseline, 1 seed: 3 runs" in sweep_apart(*arguments, "-o", out)
    return out


def report_of(out):
    return json.loads((out / "sweep.json").read_text())


def test_everything_is_recorded(made):
    report = report_of(made)
    assert [(run["cell"], run["steps"], run["kl"] is None) for run in report["runs"]] == [
        ("baseline", 2, True), ("alpha-0.01", 2, False), ("alpha-0.1", 2, False),
    ]  # fmt: skip
    assert all(run["eval_ce"] > 0 and run["ce"] > 0 for run in report["runs"])
    assert all(run["geometry"][0]["l2"]["sample"] > 0 for run in report["runs"])
    assert [len(row["passed"]) for row in report["counts"] if row["suite"] == "validation"] == [4] * 3
    assert report["settings"]["grid"] == {"ib.alpha": [0.01, 0.1]}
    assert {"torch", "transformers", "peft"} <= report["versions"].keys()
    assert report["chosen"] in report["stable"]
    assert any("on the test tasks, Pass@1" in sentence for sentence in report["sentences"])
    rows = list(csv.DictReader((made / "sweep.csv").open()))
    assert [row["cell"] for row in rows] == ["baseline", "alpha-0.01", "alpha-0.1"]
    assert float(rows[1]["l2 at layer 5"]) >= 0
    for name, kind in product(("pareto", "pass-at-1", "pass-at-k", "kl"), ("png", "svg")):
        assert (made / "figures" / f"{name}.{kind}").stat().st_size > 0


def test_the_test_tasks_are_asked_of_the_chosen_cell_and_the_baseline_alone(made):
    report = report_of(made)
    asked = {path.parents[2].name for path in made.glob("runs/*/*/test/done.json")}
    assert asked == {"baseline", report["chosen"]}
    assert {row["model"] for row in report["counts"] if row["suite"] == "test"} == asked
    for run in RUNS:  # `train` by itself would ask them greedily, before and after
        assert json.loads((made / run / "run/result.json").read_text())["pass_at_1"] == {"before": None, "after": None}


def test_stopped_it_goes_on(made, arguments, tmp_path, soaking):
    """As a kill leaves it: one run without its result, its training half there; the test tasks not asked."""
    if not soaking:
        pytest.skip("a minute: make soak")
    out = tmp_path / "second"
    shutil.copytree(made, out)
    (out / RUNS[2] / "done.json").unlink()
    (out / RUNS[2] / "run" / "result.json").unlink()
    for path in (*out.glob("runs/*/*/test"), *out.glob(f"{RUNS[2]}/*.jsonl*"), out / "figures"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "sweep.json").unlink()
    kept = [(out / run / "done.json").stat().st_mtime_ns for run in RUNS[:2]]
    assert "runs: 2 of 3 done already" in sweep_apart(*arguments, "-o", out, "--jobs", 1)
    assert (out / "sweep.json").read_bytes() == (made / "sweep.json").read_bytes()
    assert [(out / run / "done.json").stat().st_mtime_ns for run in RUNS[:2]] == kept


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["train.max_steps=3"], "train.max_steps"),
        (["--seeds", "0,1"], "seeds"),
        (["--temperature", "0.7"], "tasks.temperatures"),
    ],
)
def test_other_settings_are_refused(made, arguments, change, key):
    result = sweep(*arguments, "-o", made, *change)
    assert result.exit_code == 2
    assert f"was begun with other settings ({key}): name another folder with -o" in result.output


def test_other_contents_of_a_file_are_refused(made, arguments, files, tmp_path):
    more = tmp_path / "validation.jsonl"
    more.write_text("".join(task_file("validation").read_text().splitlines(keepends=True)[:5]))
    result = sweep(*arguments, "-o", made, "--validation", more)
    assert result.exit_code == 2
    assert "(files.validation)" in result.output


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = sweep(*LEAST, "-o", tmp_path)
    assert result.exit_code == 2
    assert "holds no sweep" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dry_run_lists_the_suggested_grid_and_makes_nothing(tmp_path):
    result = sweep("train.max_steps=7", "--dry-run", "-o", tmp_path / "none")
    assert result.exit_code == 0, result.output
    assert result.output.count("alpha-") == 80
    assert (
        "80 cells (5 of ib.alpha x 4 of ib.beta x 4 of ib.layer) and the baseline, 3 seeds: 243 runs" in result.output
    )
    assert "training: at least" in result.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--seeds", "0,0"], 2, "--seeds: got 0,0"),
        (["--seeds", "a"], 2, "--seeds: got a"),
        (["--jobs", 0], 2, "--jobs: got 0"),
        (["--k", "1,20"], 2, "--k: got 1,20, expected at most the samples of a problem (-n 10)"),
        (["-n", 2, "--temperature", 0], 2, "--temperature 0 is greedy"),
        (["--suite", "nonsense"], 2, "--suite: got nonsense"),
        (["--validation", "no-such.jsonl"], 3, "no-such.jsonl: no such file"),
        (["--test", "VALIDATION"], 2, "name them with --validation"),
        (["--validation", "VALIDATION", "--test", "VALIDATION"], 2, "all of the 4 tasks of"),
        (["--most", "MOST"], 2, "geometry needs both"),
        (["--most", "MOST", "--least", "MOST"], 3, "has id 0, which --most has too"),
        (["train.max_stepz=3"], 2, "did you mean 'train.max_steps'"),
        (["data.path=ROWS", "data.val_size=0"], 2, "nothing to choose a cell by"),
        (["no-such.yaml"], 2, "no-such.yaml: No such file"),
    ],
)
def test_bad_input_is_refused_in_one_line(files, tmp_path, arguments, code, said):
    named = {"VALIDATION": files / "validation.jsonl", "MOST": files / "most.json", "ROWS": task_file("train")}
    for name, path in named.items():
        arguments = [str(each).replace(name, str(path)) for each in arguments]
    result = sweep(*arguments, "--dry-run", "-o", tmp_path / "none")
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert said in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_no_number_is_an_answer(monkeypatch, tmp_path):
    def breaks(folder, overrides):
        raise NonFiniteError("step 3: the loss is nan")

    monkeypatch.setattr(work, "train", breaks)
    here = {"data": {}, "judge_jobs": 1, "problems": None}
    asked = {"config": {"ib": {"alpha": 1}}, "seed": 0, "tasks": None, "groups": None}
    assert work.run_cell(tmp_path, **asked, here=here) == {"diverged": "step 3: the loss is nan"}


def test_runs_on_the_bundled_data_name_its_files(tmp_path):
    """Under the bundled name `train` would ask the test tasks of every run."""
    planned, _ = plan_sweep(None, [], ["ib.alpha=0.1"], "0", Asked(), tmp_path)
    here = here_of(planned, planned.cells[0], "validation", 1)
    assert here["problems"] == here["data"]["data.eval_path"] == str(task_file("validation"))
    assert here["data"]["data.path"] == str(task_file("train"))
    assert here_of(planned, planned.cells[0], "test", 1)["problems"] == str(task_file("test"))
