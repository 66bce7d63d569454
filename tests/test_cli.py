"""The command line as a user meets it: help at once, a whole run without a network, and errors of one line."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from ibft.cli import app
from ibft.tiny import BASE_DIR

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
QUICK = ["train.max_steps=2", "train.logging_steps=1", "data.max_samples=40", "runtime.device=cpu"]

# Installed before anything else: whoever asks for a network connection is written down and refused.
NO_NETWORK = """
import socket, sys
log = open(sys.argv.pop(1), "a")
def refuse(name):
    def refused(*args, **kwargs):
        print(name, args[1:] or args, file=log, flush=True)
        raise OSError("the network is cut off")
    return refused
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
socket.getaddrinfo = refuse("getaddrinfo")
socket.create_connection = refuse("create_connection")
from ibft.cli import main
main()
"""


def invoke(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)


def user_environment():
    """Without what tests/conftest.py sets: no offline switches, no interpreter."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_", "TRITON_"))}


def assert_refused(result, code, *parts):
    """The right exit code and one line on stderr; nothing of a traceback."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_help_is_immediate_and_imports_no_torch():
    probe = """
import sys
sys.argv = ["ibft-fast", "--help"]
from ibft.cli import main
try:
    main()
except SystemExit:
    print("torch" in sys.modules)
"""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert done.stdout.strip().endswith("False")
    assert "train" in done.stdout
    assert min(times) < 1.0


def test_the_public_op_pulls_in_no_trainer():
    heavy = "{'transformers', 'peft', 'bitsandbytes', 'accelerate', 'datasets'}"
    probe = f"from ibft import ib_kl_loss; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_default_run_needs_no_network(tmp_path):
    """The whole of `ibft-fast train`, shortened, in a process whose sockets refuse; then what it leaves behind."""
    attempts, run = tmp_path / "attempts", tmp_path / "run"
    attempts.touch()
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, attempts, "train", "-o", run, *QUICK, "eval.max_tasks=4",
        "eval.max_new_tokens=16"], capture_output=True, text=True, env=user_environment(), timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert attempts.read_text() == ""
    for words in (
        "4-bit NF4",
        "KL: sum over dims",
        "held-out CE",
        "Pass@1",
        "tokens/s",
        "peak memory of the process",
        "only 2 optimizer steps",
        f"next: ibft-fast generate {run}; ",
    ):
        assert words in done.stdout

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    logged = {
        "loss",
        "ce",
        "kl",
        "ce_z",
        "grad_norm_lora",
        "grad_norm_bottleneck",
        "mu_abs_mean",
        "var_mean",
        "active_dims",
        "kl_dim_median",
    }
    assert logged | {"learning_rate", "tokens_per_second", "memory_mib"} <= steps[0].keys()
    result = json.loads((run / "result.json").read_text())
    assert result["pass_at_1"]["before"]["tasks"] == result["pass_at_1"]["after"]["tasks"] == 4
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert len(manifest["data_sha256"]) == 64
    assert (run / "config.yaml").is_file()
    for name in ("adapter", "adapter-best"):
        assert load_file(run / name / "adapter_model.safetensors")
        assert set(load_file(run / name / "ib_bottleneck.safetensors")) == {
            "encoder.weight", "encoder.bias", "up.weight", "up.bias",
        }  # fmt: skip


def test_a_run_repeats_from_its_own_config(tmp_path):
    first = invoke("-o", tmp_path / "a", *QUICK, "eval.max_tasks=1", "eval.max_new_tokens=4")
    assert first.exit_code == 0, first.output
    second = invoke(tmp_path / "a/config.yaml", "-o", tmp_path / "b")
    assert second.exit_code == 0, second.output

    def losses(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    assert losses("a") == pytest.approx(losses("b"), rel=1e-6)


@pytest.mark.skipif(
    not (SHARED_DATA / "code_alpaca_2k.json.gz").is_file(), reason="needs code_alpaca_2k.json.gz (see IBFT_DATA)"
)
def test_code_alpaca_on_the_bundled_base(tmp_path):
    data = SHARED_DATA / "code_alpaca_2k.json.gz"
    result = invoke(
        f"data.path={data}",
        "train.max_steps=30",
        "data.max_length=256",
        "-o",
        tmp_path / "run",
        "train.logging_steps=1",
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["ce"] for row in rows if "ce" in row]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])  # finite, and falling by more than noise

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_DIR), tmp_path / "run/adapter")
    assert sum(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name) == 7 * 8


def test_plain_fine_tuning_and_dry_run(tmp_path):
    result = invoke("ib.alpha=0", *QUICK, "eval.max_tasks=1", "eval.max_new_tokens=4", "-o", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "plain").rglob("ib_bottleneck*"))
    assert "grad_norm_bottleneck" not in (tmp_path / "plain/metrics.jsonl").read_text()
    assert not (tmp_path / "plain/latent.jsonl").exists()
    result = invoke("--dry-run", "-o", tmp_path / "dry")
    assert result.exit_code == 0
    assert "% of them padding; 17 steps an epoch, 80 in all" in result.output
    assert not (tmp_path / "dry").exists()


def test_code_that_cannot_be_judged_ends_the_run_well(tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.evaluation.judge.why_not_judged", lambda **_: "no sandbox on this system")
    result = invoke(*QUICK, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "not judged: no sandbox on this system" in result.output


def test_tensorboard(tmp_path):
    result = invoke(
        *QUICK, "train.report_to=tensorboard", "eval.max_tasks=1", "eval.max_new_tokens=4", "-o", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_bad_configuration(tmp_path):
    assert_refused(invoke("train.max_step=3"), 2, "did you mean 'train.max_steps'")
    assert_refused(invoke("ib.alpha=-1"), 2, "ib.alpha")
    assert_refused(invoke("ib.layer=8"), 2, "expected 1 .. 7 (the model has 8 layers)")
    assert_refused(invoke("missing.yaml"), 2, "missing.yaml: No such file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    assert_refused(invoke("-o", tmp_path / "run", *QUICK), 2, "already holds a run", "-o")


def test_what_other_trainers_write_gets_advice():
    """Not the nearest key, which is another thing."""
    for said, *arguments in (
        ("got 'ib.alpha = 0.2', expected section.key=value, without spaces", "ib.alpha", "=", "0.2"),
        ("unknown key 'load_in_4bit'; model.quantization=nf4 is the default", "load_in_4bit=true"),
        ("unknown key 'bf16'; it is train.mixed_precision=bf16 here", "bf16=true"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


def test_the_version():
    from importlib.metadata import version

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"ibft-fast {version('ibft-fast')}\n")


def test_bad_data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    assert_refused(invoke(f"data.path={file}", "-o", tmp_path / "run"), 3, f"{file}:2")
    file.write_text("")
    assert_refused(invoke(f"data.path={file}"), 3, "rows.jsonl")
    file.write_text('{"instruction": "a", "output": ""}\n')
    assert_refused(invoke(f"data.path={file}", "data.add_eos=false"), 3)
    file.write_text('{"query": "a", "answer": "b"}\n')
    assert_refused(invoke(f"data.path={file}"), 3, "query")
    assert_refused(invoke(f"data.path={tmp_path}/none.jsonl"), 3, "none.jsonl")
    whole = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert_refused(invoke(f"data.path={tmp_path}/cut.jsonl.gz"), 3, "cut.jsonl.gz")
    assert not (tmp_path / "run").exists()


def test_bad_environment(tmp_path):
    import torch

    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    model = [f"data.path={data}", "-o", tmp_path / "run"]
    assert_refused(invoke(f"model.name_or_path={tmp_path}", *model), 4, "config.json")
    (tmp_path / "config.json").write_text((BASE_DIR / "config.json").read_text())
    assert_refused(invoke(f"model.name_or_path={tmp_path}", *model), 4, "no weights")
    assert_refused(invoke("model.name_or_path=nobody/no-such-model-here", *model), 4, "hf download")
    assert_refused(invoke(f"model.name_or_path={tmp_path}/absent", *model), 4, "no folder")
    assert_refused(invoke("train.report_to=wandb", *QUICK, "-o", tmp_path / "run"), 4, "pip install wandb")
    if not torch.cuda.is_available():
        assert_refused(invoke("runtime.device=cuda", "-o", tmp_path / "run"), 4, "no CUDA device")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert_refused(invoke("-o", tmp_path / "file" / "run", *QUICK), 4, "cannot write the run folder")


def test_non_finite_training_stops_with_its_own_code(tmp_path):
    result = invoke(*QUICK, "train.learning_rate=1e30", "train.warmup_ratio=0", "train.max_steps=5",
    "train.max_grad_norm=0",
                    "eval.max_tasks=1", "eval.max_new_tokens=4", "-o", tmp_path / "run")  # fmt: skip
    assert_refused(result, 5, "not finite")


def test_debug_shows_the_traceback():
    from ibft.errors import ConfigError

    with pytest.raises(ConfigError):
        invoke("--debug", "train.max_step=3")


def test_an_interrupted_run_is_saved(tmp_path):
    import signal

    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ibft.cli", "train", "-o", run, *QUICK, "train.max_steps=10000", "eval.max_tasks=1",
         "eval.max_new_tokens=4"],
        stdout=subprocess.PIPE, text=True, env=user_environment(),
    )  # fmt: skip
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in output
    assert load_file(run / "adapter/adapter_model.safetensors")
