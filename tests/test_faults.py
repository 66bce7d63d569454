"""Steps that are not finite, and memory that runs out."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from ibft import checkpoint
from ibft.cli import app
from ibft.console import Console
from ibft.loop import Trainer
from ibft.run import Progress

SETTINGS = [
    "data.max_samples=40", "data.max_length=128", "train.max_steps=4", "train.logging_steps=1",
    "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1", "checkpoint.save_steps=1",
    "eval.max_tasks=1", "eval.max_new_tokens=1", "runtime.deterministic=true",
    f"data.eval_path={Path(__file__).with_name('held_out.jsonl')}",
]  # fmt: skip


def train(out, *more):
    return CliRunner().invoke(app, ["train", *SETTINGS, *map(str, more), "-o", str(out)])


def poison(patched, what):
    """The second step's loss, one of its gradients, or z."""
    backward, train_step = Trainer.backward, Trainer.train_step

    def spoilt_backward(self, batches, **named):
        parts = backward(self, batches, **named)
        if self.step == 1 and self.skipped == 0:
            if what == "loss":
                parts.loss.fill_(float("nan"))
            if what == "gradient":
                self.groups["lora"][3].grad[0, 0] = float("nan")
        return parts

    def spoilt_step(self, batches):
        bias = self.objective.bottleneck.encoder.bias.data
        kept = bias.clone()
        if what == "z" and self.step == 1:
            bias.fill_(float("nan"))
        try:
            return train_step(self, batches)
        finally:
            if what == "z" and self.step == 1:
                bias.copy_(kept)

    patched.setattr(Trainer, "backward", spoilt_backward)
    patched.setattr(Trainer, "train_step", spoilt_step)


@pytest.mark.parametrize("what", ["loss", "gradient", "z"])
def test_what_is_not_finite_ends_the_run_before_the_optimizer(tmp_path, monkeypatch, what):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, what)
        result = train(out)
    assert result.exit_code == 5, result.output
    assert "step 2: not finite: " in result.output
    assert "Traceback" not in result.output
    (fault,) = json.loads((out / "non_finite.json").read_text())["faults"]
    assert (fault["step"], fault["skipped"], len(fault["rows"])) == (2, False, len(set(fault["rows"])))
    assert "nan" in fault["parts"].values()
    assert all(0 <= row < 40 for row in fault["rows"])
    from ibft import checkpoint

    found, warnings = checkpoint.latest(out / "checkpoints")
    assert (found.name, warnings) == ("step-1", [])  # untouched


def test_such_steps_can_be_left_out(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        poison(patched, "gradient")
        result = train(tmp_path / "run", "train.skip_non_finite=1")
    assert result.exit_code == 0, result.output
    assert "the step is left out (train.skip_non_finite)" in result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4]
    assert json.loads((tmp_path / "run" / "non_finite.json").read_text())["faults"][0]["skipped"] is True


def test_the_rows_of_a_fault_are_those_of_its_step(tmp_path, monkeypatch):
    """Another run over these rows alone has the same loss in its first step."""
    seen = []
    original = Trainer.train_step

    def train_step(self, batches):
        rows = self.rows_of(batches)
        texts = {tuple(self.data.samples[row].input_ids) for row in rows}
        ids = {tuple(x for x in batch.input_ids.flatten().tolist()) for batch in batches}
        seen.append((texts, ids))
        return original(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert train(tmp_path / "run", "train.max_steps=2").exit_code == 0
    for texts, ids in seen:
        flat = [token for row in ids for token in row]
        assert sum(map(len, texts)) <= len(flat)
        for text in texts:
            assert any(flat[i : i + len(text)] == list(text) for i in range(len(flat)))


@pytest.mark.parametrize("allowed", [True, False])
def test_out_of_memory(tmp_path, monkeypatch, allowed):
    """Of two micro-batch sizes: more than one row does not fit."""
    original = Trainer.forward

    def forward(self, batch, *arguments, **named):
        if batch.input_ids.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, *arguments, **named)

    whole = tmp_path / "whole"
    assert train(whole).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "forward", forward)
        out = tmp_path / "run"
        result = train(out, f"train.auto_micro_batch={allowed}")
    if not allowed:
        assert result.exit_code == 6, result.output
        said = " ".join(result.stderr.split())
        assert re.match(r"error: out of memory after [1-9]?\d\.\d GiB, in step 1, 4 x 128 tokens: try ", said), said
        assert "try train.gradient_checkpointing=auto, or train.auto_micro_batch=true, or `ibft-fast estimate`" in said
        return
    assert result.exit_code == 0, result.output
    assert "going on with 1 rows a micro-batch and 4 micro-batches a step, the same global batch" in result.output
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (whole, out)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_folder_that_vanishes_ends_the_run_by_one_line(tmp_path, monkeypatch):
    """Somebody removes it while the second step is taken: nothing is made anew in its place."""
    original, out = Trainer.train_step, tmp_path / "run"

    def train_step(self, batches):
        if self.step == 1:
            shutil.rmtree(out)
        return original(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", train_step)
        result = train(out)
    assert result.exit_code == 4, result.output
    assert " ".join(result.stderr.split()) == f"error: run folder {out}: No such file or directory"
    assert not out.exists()


@pytest.mark.parametrize("fault", [errno.EDQUOT, errno.EROFS])
def test_a_quota_or_a_disk_that_turns_read_only_leaves_the_last_checkpoint(tmp_path, monkeypatch, fault):
    """At the third step's save; all of the second's is there."""
    original, out = checkpoint.save, tmp_path / "run"

    def save(root, step, *arguments):
        if step == 3:
            raise OSError(fault, os.strerror(fault))
        return original(root, step, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save)
        result = train(out)
    assert result.exit_code == 4, result.output
    assert " ".join(result.stderr.split()) == f"error: run folder {out}: {os.strerror(fault)}"
    assert checkpoint.latest(out / "checkpoints") == (out / "checkpoints" / "step-2", [])
    assert train(out, "--resume", "auto").exit_code == 0


def test_a_second_signal_stops_at_once():
    trainer = SimpleNamespace(signalled=0)
    Trainer.interrupt(trainer, signal.SIGTERM)
    assert trainer.signalled == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        Trainer.interrupt(trainer, signal.SIGINT)


def test_trackers_that_fail_are_said_once_and_asked_no_more(capsys):
    asked = []

    def log(values, step):
        asked.append(step)
        raise ConnectionError("tracker.example: no route\nand more")

    progress = Progress(run={})
    for step in (1, 2):
        progress.track(SimpleNamespace(log=log), {"step": step, "loss": 1.0}, Console())
    assert asked == [1]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("note:") == 1
    assert "failed and get no more rows: tracker.example: no route" in said
