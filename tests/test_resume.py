"""Stopped anywhere, a run goes on to the very bits of the run that was never stopped."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ibft import checkpoint
from ibft.cli import app
from ibft.load_config import load_config
from ibft.lock import LOCK
from ibft.loop import Trainer
from ibft.rundir import template_of
from ibft_kernels import _dispatch

SETTINGS = [
    "data.max_samples=40", "data.max_length=128", "train.max_steps=12", "train.logging_steps=1", "train.eval_steps=5",
    "train.learning_rate=1e-3", "checkpoint.save_steps=2", "eval.max_tasks=1", "eval.max_new_tokens=1",
    "runtime.deterministic=true", f"data.eval_path={Path(__file__).with_name('held_out.jsonl')}",
]  # fmt: skip
FREE = {"time", "tokens_per_second", "memory_mib"}  # of a logged row: the clock's and the machine's


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def go_on(out, *more):
    return train(*SETTINGS, *more, "-o", out, "--resume", "auto")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "straight"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
        result = train(*SETTINGS, "-o", out)
    assert result.exit_code == 0, result.output
    return out


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in FREE} for row in rows]


def assert_same(run, straight):
    for name in ("adapter/adapter_model.safetensors", "adapter/ib_bottleneck.safetensors",
                 "adapter-best/adapter_model.safetensors", "checkpoints/step-12/optimizer.safetensors"):  # fmt: skip
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert rows_of(run) == rows_of(straight)
    assert (run / "latent.jsonl").read_bytes() == (straight / "latent.jsonl").read_bytes()
    results = [json.loads((each / "result.json").read_text()) for each in (run, straight)]
    assert results[0]["eval_ce"] == results[1]["eval_ce"]
    assert results[0]["pass_at_1"] == results[1]["pass_at_1"]


def test_the_case_holds_two_epochs(straight):
    epochs = [row["epoch"] for row in rows_of(straight) if "loss" in row]
    assert [epochs.count(number) for number in (0, 1)] == [6, 6]
    assert [folder.name for folder in sorted((straight / "checkpoints").iterdir())] == ["step-10", "step-12"]


def test_each_logged_step_leaves_the_kl_of_each_latent_dimension(straight):
    """64 of them, to four digits; their least, middle and most are what the metrics say."""
    latent = [json.loads(line) for line in (straight / "latent.jsonl").read_text().splitlines()]
    steps = [row for row in rows_of(straight) if "loss" in row]
    assert [list(row) for row in latent] == [["step", "kl"]] * 12
    assert [row["step"] for row in latent] == [row["step"] for row in steps] == list(range(1, 13))
    for row, of_all in zip(latent, steps, strict=True):
        kl = sorted(row["kl"])
        assert len(kl) == 64
        assert all(value == float(f"{value:.4g}") for value in kl)
        middle = (kl[31] + kl[32]) / 2
        expected = [of_all[f"kl_dim_{which}"] for which in ("min", "median", "max")]
        assert [kl[0], middle, kl[-1]] == pytest.approx(expected, rel=1e-3)
        assert sum(kl) == pytest.approx(of_all["kl"], rel=1e-3)


def test_whoever_may_read_new_files_may_read_the_run_s(straight):
    mask = os.umask(0)
    os.umask(mask)
    rights = {path.name: path.stat().st_mode & 0o777 for path in straight.rglob("*.safetensors")}
    assert rights.keys() >= {"adapter_model.safetensors", "ib_bottleneck.safetensors", "optimizer.safetensors"}
    assert set(rights.values()) == {0o666 & ~mask}


def test_the_run_says_how_its_adapter_is_to_be_asked(straight):
    assert template_of(straight / "adapter") == template_of(straight / "checkpoints" / "step-12") == "released"
    assert json.loads((straight / "manifest.json").read_text())["template"] == "released"


def test_its_adapters_have_a_model_card_with_what_came_out(straight):
    last, best = ((straight / name / "README.md").read_text() for name in ("adapter", "adapter-best"))
    assert "# IB-FT adapter of the bundled tiny base" in last
    assert "## Results" in last
    assert "the lowest held-out cross-entropy of the run" in best


class Killed(BaseException):
    """As a kill: nothing catches it."""


def killed_after(step, monkeypatch):
    original = Trainer.between_steps

    def between_steps(self, *arguments):
        if self.step == step:
            raise Killed
        original(self, *arguments)

    monkeypatch.setattr(Trainer, "between_steps", between_steps)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 12])
def test_killed_after_a_step(straight, tmp_path, monkeypatch, step):
    """Before the first checkpoint, at one, at an evaluation, at the end of an epoch or in its middle, at the end."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        killed_after(step, patched)
        with pytest.raises(Killed):
            train(*SETTINGS, "-o", out)
    result = go_on(out)
    assert result.exit_code == 0, result.output
    if step == 1:
        assert "holds no checkpoint yet: the run starts from the beginning" in " ".join(result.output.split())
    else:
        assert f"step-{2 * ((step - 1) // 2)}, after step" in result.output
    assert_same(out, straight)


@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM", "SIGUSR1", "STOP"])
def test_stopped_it_saves_and_goes_on(straight, tmp_path, monkeypatch, by):
    out = tmp_path / "run"
    original = Trainer.train_step

    def train_step(self, batches):
        if self.step == 6:  # in the step after it
            if by == "STOP":
                (out / "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, by))
        return original(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        stopped = train(*SETTINGS, "-o", out)
    code = 128 + (signal.SIGTERM if by == "STOP" else getattr(signal, by))
    assert stopped.exit_code == code, stopped.output
    assert "after step 7; saved to" in " ".join(stopped.output.split())
    assert checkpoint.latest(out / "checkpoints")[0] == out / "checkpoints" / "step-7"
    result = go_on(out)
    assert result.exit_code == 0, result.output
    assert ("STOP is of an earlier run: removed" in " ".join(result.output.split())) == (by == "STOP")
    assert_same(out, straight)


@pytest.mark.parametrize("phase", ["evaluation", "Pass@1", "saving"])
def test_stopped_in_another_phase(straight, tmp_path, monkeypatch, phase):
    out = tmp_path / "run"
    name, original = {
        "evaluation": ("ibft.loop.Trainer.evaluate", Trainer.evaluate),
        "Pass@1": ("ibft.evaluation.generate.generate", None),
        "saving": ("ibft.checkpoint.keep", checkpoint.keep),
    }[phase]

    once = iter([signal.SIGTERM])  # a second one would stop at once

    def stopping(*arguments, **named):
        for number in once:
            os.kill(os.getpid(), number)
        if original is None:
            return ["pass"]
        return original(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(name, stopping)
        stopped = train(*SETTINGS, "-o", out)
    assert stopped.exit_code == 143, stopped.output
    result = go_on(out)
    assert result.exit_code == 0, result.output
    if phase != "Pass@1":  # that answer was not the model's
        assert_same(out, straight)


def run_to_the_end(out: str) -> None:
    """In a process of its own, as the command line does."""
    import sys

    import torch

    from ibft.run import run_training

    torch.set_num_threads(1)
    _dispatch.INTERPRETED = False
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    config, _ = load_config(None, SETTINGS)
    run_training(config, Path(out), resume="auto")


@pytest.mark.timeout(3600)  # of `make soak`
def test_kills_at_any_instant(straight, tmp_path, soaking):
    """A run that saves every second step, killed again and again until it ends: `make soak` sixty times, else six."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "ibft.run", "ibft.loop"])
    chance, out, kills = random.Random(0), tmp_path / "run", 0
    wanted = 60 if soaking else 6
    while True:
        process = context.Process(target=run_to_the_end, args=(str(out),))
        process.start()
        if kills < wanted:
            started = time.monotonic()
            waits = chance.uniform(0.5, 6)
            if kills % 2 and out.exists():  # in the midst of a save
                hidden = out / "checkpoints"
                while time.monotonic() - started < 30 and process.is_alive() and not list(hidden.glob(".step-*")):
                    time.sleep(0.002)
                waits = chance.uniform(0, 0.05)
            process.join(waits)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                found, warnings = checkpoint.latest(out / "checkpoints")
                assert warnings == []
                assert found is None or checkpoint.verify(found) is None
                continue
        process.join()
        assert process.exitcode == 0
        if kills >= wanted:
            break
        for path in sorted(out.rglob("*"), reverse=True):  # ended before it could be killed: another run
            path.unlink() if path.is_file() else path.rmdir()
        out.rmdir()
    assert_same(out, straight)


# --- what cannot be gone on with ------------------------------------------------------------------


@pytest.fixture
def stopped(straight, tmp_path):
    """A copy of a run, as if it had been stopped after step 10."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "step-12")
    (out / ".lock").unlink(missing_ok=True)
    return out


def files_of(run):
    """All that a run holds, but for the lock: who asks takes it before he is refused."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}


def test_a_run_is_not_overwritten(straight):
    result = train(*SETTINGS, "-o", straight)
    assert result.exit_code == 2
    assert "already holds a run: go on with it by --resume auto, or choose another folder with -o" in result.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ib.alpha=0.5", "ib.alpha: was 0.01, is 0.5"),
        ("data.max_samples=30", "data.sha256: was "),
        ("train.max_steps=14", "train.max_steps: was 12, is 14"),
        ("runtime.seed=7", "runtime.seed: was 42, is 7"),
    ],
)
def test_another_run_is_refused(stopped, change, said):
    before = files_of(stopped)
    result = go_on(stopped, change)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "--force-resume" in result.output
    assert files_of(stopped) == before


def test_forced_it_goes_on_with_other_settings(stopped):
    result = go_on(stopped, "ib.alpha=0.5", "--force-resume")
    assert result.exit_code == 0, result.output
    assert "note: --force-resume: ib.alpha: was 0.01, is 0.5" in result.output


def test_what_does_not_change_the_training_may_change(stopped, straight):
    result = go_on(stopped, "checkpoint.keep_last=1", "eval.batch_size=3")
    assert result.exit_code == 0, result.output
    assert (stopped / "adapter/adapter_model.safetensors").read_bytes() == (
        straight / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, straight):
    import shutil

    newest = stopped / "checkpoints" / "step-12"
    shutil.copytree(straight / "checkpoints" / "step-12", newest)
    (newest / "optimizer.safetensors").write_bytes(b"garbage")
    result = go_on(stopped)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "warning: " in text
    assert "step-12 is damaged and left out: optimizer.safetensors: 7 bytes" in text
    assert_same(stopped, straight)


def test_without_a_whole_checkpoint_there_is_no_silent_fresh_start(stopped):
    (stopped / "checkpoints" / "step-10" / "manifest.json").write_text("")
    result = go_on(stopped)
    assert result.exit_code == 4, result.output
    assert "no checkpoint is whole" in result.output
    assert "manifest.json: empty" in result.output


def test_a_finished_run_without_checkpoints_is_not_trained_again(stopped):
    import shutil

    shutil.rmtree(stopped / "checkpoints")
    before = (stopped / "adapter" / "adapter_model.safetensors").read_bytes()
    result = go_on(stopped)
    assert result.exit_code == 2, result.output
    assert "is finished, and holds no checkpoint: name another folder with -o" in result.output
    assert (stopped / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_what_torch_was_set_to_is_what_it_is_after_a_run(straight):
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_that_are_no_rows_are_passed_over(stopped, straight):
    with (stopped / "metrics.jsonl").open("ab") as file:
        file.write(b'3\n\xff\xfe\n{"step": "4"}\n{"step": 11, "lo')
    with (stopped / "latent.jsonl").open("ab") as file:
        file.write(b'[]\n{"kl": [1]}\n{"step": 11, "kl": [1, 2')
    assert go_on(stopped).exit_code == 0
    assert_same(stopped, straight)


def test_a_named_checkpoint(stopped, straight):
    result = train(*SETTINGS, "--resume", stopped / "checkpoints" / "step-10")
    assert result.exit_code == 0, result.output
    assert_same(stopped, straight)
    # now there is a newer one, which would be taken for the run's end
    result = train(*SETTINGS, "--resume", stopped / "checkpoints" / "step-10")
    assert result.exit_code == 2
    assert "holds newer checkpoints (step-12): name another folder with -o, or delete them" in result.output
    elsewhere = stopped.with_name("elsewhere")
    result = train(*SETTINGS, "--resume", stopped / "checkpoints" / "step-10", "-o", elsewhere)
    assert result.exit_code == 0, result.output
    adapter = "adapter/adapter_model.safetensors"
    assert (elsewhere / adapter).read_bytes() == (straight / adapter).read_bytes()
    nothing_left = train(*SETTINGS, "--resume", straight / "checkpoints" / "step-12", "-o", stopped.with_name("end"))
    assert nothing_left.exit_code == 0, nothing_left.output
    assert "no step was trained here" in nothing_left.output
    assert (stopped.with_name("end") / adapter).read_bytes() == (straight / adapter).read_bytes()
    result = train(*SETTINGS, "--resume", stopped / "checkpoints" / "step-99")
    assert result.exit_code == 2
    assert "step-99 is no whole checkpoint: manifest.json: missing" in result.output
    result = train(*SETTINGS, "--resume", "atuo")
    assert result.exit_code == 2
    assert "--resume: got atuo, expected never, auto, a run folder or RUN/checkpoints/step-N" in result.output


def hold_lock(folder: str, ready, done) -> None:
    from ibft.lock import hold

    hold(Path(folder))
    ready.set()
    done.wait(60)


def test_a_folder_in_use_is_refused_and_a_dead_owners_is_free(stopped, straight):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    owner = context.Process(target=hold_lock, args=(str(stopped), ready, done))
    owner.start()
    assert ready.wait(60)
    result = go_on(stopped)
    assert result.exit_code == 2, result.output
    assert f"is in use by process {owner.pid}" in result.output
    owner.kill()
    owner.join()
    assert go_on(stopped).exit_code == 0
    assert_same(stopped, straight)


def test_a_full_disk_keeps_the_last_checkpoint(stopped, straight, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("ibft.checkpoint._sync_and_hash", full)
        result = go_on(stopped)
    assert result.exit_code == 4, result.output
    assert "No space left on device" in result.output
    assert checkpoint.latest(stopped / "checkpoints") == (stopped / "checkpoints" / "step-10", [])
    assert go_on(stopped).exit_code == 0
    assert_same(stopped, straight)
