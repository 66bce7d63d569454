"""Several processes of one run: the same gradient as one, the first alone writes, and the end of one ends all."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ibft.cli import app
from ibft.load_config import load_config
from ibft_kernels import _dispatch

# 13 rows, 4 a step: in the last step of an epoch the second process has nothing to do
SETTINGS = [
    "data.max_samples=13", "data.max_length=128", "data.packing=false", "train.logging_steps=1", "train.eval_steps=4",
    "train.learning_rate=1e-3", "train.per_device_train_batch_size=1", "train.mixed_precision=fp32",
    "checkpoint.save_steps=2", "eval.max_tasks=1", "eval.max_new_tokens=1", "runtime.device=cpu",
    f"data.eval_path={Path(__file__).with_name('held_out.jsonl')}",
]  # fmt: skip
ONE, TWO = "train.gradient_accumulation_steps=4", "train.gradient_accumulation_steps=2"
FREE = {"time", "tokens_per_second", "memory_mib"}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def join(rank: int, port: int) -> None:
    """Makes this process one of two, as a launcher would."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()} | {"MASTER_ADDR": "127.0.0.1"})


def run_as(rank: int, port: int, settings: list[str], out: Path) -> None:
    join(rank, port)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = (out.parent / f"process-{rank}.txt").open("w")
    _dispatch.INTERPRETED = False
    from ibft.cli import main

    sys.argv = ["ibft-fast", "train", *settings, "-o", str(out), "--resume", "auto"]
    main()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(function, calls):
    """A process a call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "ibft.run", "ibft.loop"])
    started = [context.Process(target=function, args=arguments) for arguments in calls]
    for process in started:
        process.start()
    return started


def start_two(out: Path, *settings: str):
    port = free_port()
    return start(run_as, [(rank, port, [*SETTINGS, *settings], out) for rank in (0, 1)])


def wait_for(path: Path, pair) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        assert all(process.is_alive() for process in pair), texts(path)
        time.sleep(0.02)


def texts(path: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(path.parents[2].glob("process-*.txt")))


def ends(pair, seconds: float) -> list[int | None]:
    """Exit codes; None: it had to be killed."""
    until = time.monotonic() + seconds
    codes = []
    for process in pair:
        process.join(max(0, until - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def rows_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in FREE} for row in rows]


def assert_agree(run: Path, other: Path) -> None:
    rows, others = rows_of(run), rows_of(other)
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Eight steps by one process, which end in the second epoch."""
    out = tmp_path_factory.mktemp("processes") / "alone"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)
        result = CliRunner().invoke(app, ["train", *SETTINGS, ONE, "train.max_steps=8", "-o", str(out)])
    assert result.exit_code == 0, result.output
    return out


def test_two_processes_train_what_one_trains(alone, tmp_path):
    """By the command that a user types; the same rows logged, and in the folder what one process leaves there."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0", "-m", "ibft.cli", "train", *SETTINGS, TWO, "train.max_steps=8", "-o", str(out),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step     1  loss") == 1
    assert_agree(out, alone)
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (out, alone)]
    assert files[0] == files[1]
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2


def gradients_of(rank: int, count: int, port: int, to: Path) -> None:
    """Of two steps, by one of `count` processes; the first one writes them down."""
    if count > 1:
        join(rank, port)
    torch.set_num_threads(1)
    _dispatch.INTERPRETED = False
    from ibft.console import Console
    from ibft.data.prepare import load_data
    from ibft.model import load_tokenizer
    from ibft.run import build_trainer, choose_device, make_accelerator
    from ibft.rundir import RunDir

    config, _ = load_config(None, [*SETTINGS, f"train.gradient_accumulation_steps={4 // count}", "lora.dropout=0.1"])
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, Console(quiet=True))
    accelerator = make_accelerator(config, choose_device(config), torch.float32, RunDir(to.with_suffix("")))
    seeded = torch.manual_seed
    torch.manual_seed = lambda seed: seeded(seed + rank)  # as on another GPU: the second draws other weights
    trainer, _ = build_trainer(config, tokenizer, data, 5, accelerator, torch.float32)
    with torch.no_grad():
        for weight in trainer.groups["lora"]:  # LoRA's B begins at zero, which hides what A does
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight))) / 50
    found = {}
    for number, micro_batches in enumerate(trainer.batches(data.train, epoch=0)):
        if number not in (0, 3):  # a whole step, and the epoch's last: one row
            continue
        found[f"{number}/values"] = trainer.backward(micro_batches, collect=True).values
        for group, weights in trainer.groups.items():
            for index, weight in enumerate(weights):
                found[f"{number}/{group}/{index}"] = weight.grad.clone()
        trainer.optimizer.zero_grad()
    if rank == 0:
        save_file(found, to)
    accelerator.end_training()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Noise and dropout follow the sample, counts are the whole step's: 1e-5, each weight, a full and a ragged step."""
    files = {count: tmp_path / f"{count}.safetensors" for count in (1, 2)}
    port = free_port()
    started = start(gradients_of, [(0, 1, 0, files[1]), (0, 2, port, files[2]), (1, 2, port, files[2])])
    assert ends(started, 120) == [0, 0, 0]
    one, two = load_file(files[1]), load_file(files[2])
    assert one.keys() == two.keys()
    assert len([name for name in one if name.startswith("3/lora/")]) == 8 * 7 * 2
    for name, expected in one.items():
        error = (two[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= 1e-5, f"{name}: {float(error):.1e}"


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(alone, tmp_path):
    out = tmp_path / "run"
    pair = start_two(out, TWO, "train.max_steps=8")
    wait_for(out / "checkpoints" / "step-2" / "manifest.json", pair)
    os.kill(pair[1].pid, signal.SIGTERM)
    assert ends(pair, 60) == [143, 143], texts(out / "a" / "b")
    step = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 2 <= step < 8
    assert (out / "checkpoints" / f"step-{step}").is_dir()
    result = CliRunner().invoke(app, ["train", *SETTINGS, ONE, "train.max_steps=8", "-o", str(out), "--resume", "auto"])
    assert result.exit_code == 0, result.output
    assert f"after step {step} of 8" in result.output
    assert_agree(out, alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_ends_the_other_by_one_line_and_the_run_goes_on(alone, tmp_path, killed):
    out = tmp_path / "run"
    pair = start_two(out, TWO, "train.max_steps=8")
    wait_for(out / "checkpoints" / "step-2" / "manifest.json", pair)
    pair[killed].kill()
    codes = ends(pair, 60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 4
    said = (tmp_path / f"process-{1 - killed}.txt").read_text()
    assert "another process of this run is gone" in said
    assert "Traceback" not in said
    pair = start_two(out, TWO, "train.max_steps=8")
    assert ends(pair, 120) == [0, 0], texts(out / "a" / "b")
    assert_agree(out, alone)


def test_what_is_for_one_process_alone_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["train", *SETTINGS, "train.auto_micro_batch=true", "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "train.auto_micro_batch: for one process, got 2" in result.output
