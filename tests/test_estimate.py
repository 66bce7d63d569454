"""`ibft-fast estimate` as a user meets it: from config.json alone, one screen, and the exit codes of `train`."""

import json
import re

import pytest
import torch
from test_cli import assert_refused
from typer.testing import CliRunner

from ibft.cli import app

DEEPSEEK = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 102400,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def model(tmp_path):
    """A 7B's config.json, and nothing beside it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    return [f"model.name_or_path={folder}", "data.path=some/rows"]


def test_the_bundled_run():
    """Data and tokenizer are here: exact steps; the device is here: its rate."""
    result = invoke("runtime.device=cpu")
    assert result.exit_code == 0, result.output
    for words in (
        "3.54 M parameters", "kept activations", "total", "plan: no recomputation", "fits: ", "free here",
        "steps: 80 (train.max_steps)", "GFLOP a step", "time: at least",
    ):  # fmt: skip
        assert words in result.output, words
    result = invoke("runtime.device=cpu", "train.max_steps=-1", "train.num_train_epochs=2.5", "data.packing=false")
    assert "steps: 323 (2.5 epochs of 129)" in result.output  # 516 samples, 4 a step


def test_a_7b_from_its_config_alone(model):
    result = invoke(*model, "train.optim=adamw_8bit", "--memory", "8")
    assert result.exit_code == 0, result.output
    for words in (
        "6.91 B parameters in 30 layers", "on a CUDA device", "layers are recomputed", "CUDA context",
        "fits: 7.6 GiB of 8.0 GiB", "steps: unknown; some/rows is a hub data set", "recomputation 2",
    ):  # fmt: skip
        assert words in result.output, words
    # what is done again, as a share of the rest
    again = int(re.search(r"plan: .* \(\+(\d+)% arithmetic\)", result.output)[1])
    share = int(re.search(r"recomputation (\d+)%", result.output)[1])
    assert again == pytest.approx(100 * share / (100 - share), abs=1.5)
    # the lines add up to the total
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    sizes = [float(row[2]) for row in rows if row[2].strip()]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.06)


def test_what_does_not_fit_says_what_would(model):
    result = invoke(*model, "--memory", "8", "train.per_device_train_batch_size=4", "train.gradient_checkpointing=true")
    assert result.exit_code == 0, result.output
    assert "does not fit: " in result.output
    (line,) = [line for line in result.output.splitlines() if "the cheapest change that fits: " in line]
    change = line.split(": ")[1].split()
    assert "fits: " in invoke(*model, "--memory", "8", "train.per_device_train_batch_size=4",
                              "train.gradient_checkpointing=true", *change).output  # fmt: skip
    assert "no setting makes it fit" in invoke(*model, "--memory", "3").output
    keys = invoke(*model, "--memory", "16", "eval.tasks=bundled:tiny").output
    assert "generating for Pass@1 keeps up to" in keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card that is here is asked instead")
def test_without_a_card_every_size_is_shown(model):
    result = invoke(*model)
    assert "on a card of (--memory GIB), with train.gradient_checkpointing=auto" in result.output
    assert "8 GiB" in result.output
    assert "time: unknown, no CUDA device here" in result.output


def test_refusals(model, tmp_path):
    assert_refused(invoke("train.max_step=3"), 2, "did you mean 'train.max_steps'")
    assert_refused(invoke("ib.layer=8"), 2, "expected 1 .. 7")
    assert_refused(invoke(f"data.path={tmp_path}/none.jsonl"), 3, "none.jsonl")
    assert_refused(invoke("model.name_or_path=nobody/no-such-model-here", "data.path=some/rows"), 4, "hf download")
    assert_refused(invoke(f"model.name_or_path={tmp_path}", "data.path=some/rows"), 4, "config.json")
    (tmp_path / "base" / "config.json").write_text(json.dumps(DEEPSEEK | {"tie_word_embeddings": True}))
    assert_refused(invoke(*model, "model.offload_embeddings=true"), 2, "model.offload_embeddings", "tied")


@pytest.mark.parametrize("memory", ["inf", "nan", "0", "-8", "1e300"])
def test_a_card_has_a_size(model, memory):
    assert_refused(invoke(*model, "--memory", memory), 2, "runtime.memory_budget: got ")


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_model_that_is_no_llama_is_refused_before_its_weights(tmp_path, command):
    """By the fields that its config lacks, or that hold no sizes."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    arguments = [command, f"model.name_or_path={tmp_path}", "data.path=some/rows"]
    for config, code, message in (
        ({"model_type": "gpt2"}, 2, "GPT2Config is not of the Llama family"),
        ({"model_type": "llava"}, 2, "LlavaConfig is not of the Llama family"),
        (DEEPSEEK | {"hidden_size": "big"}, 4, "'hidden_size' expected int"),
        (DEEPSEEK | {"num_attention_heads": 0}, 4, "cannot take"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_refused(CliRunner().invoke(app, arguments, catch_exceptions=False), code, message)


def test_data_files_are_looked_at_without_a_tokenizer(model, tmp_path):
    """They are wrong whether or not their tokens can be counted; and no command fetches a tokenizer into a folder."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    result = invoke(model[0], f"data.path={rows}", "--memory", "8")
    assert result.exit_code == 0, result.output
    assert "steps: unknown; there is no tokenizer in" in result.output
    assert "--dry-run" not in result.output
    assert_refused(invoke(model[0], "data.path=nope.jsonl"), 3, "nope.jsonl: no such file")
    for key in ("data.eval_path", "eval.tasks"):
        assert_refused(invoke(model[0], f"data.path={rows}", f"{key}=nope.jsonl"), 3, "nope.jsonl: no such file")
        assert_refused(invoke(*model, f"{key}=nope.jsonl"), 3, "nope.jsonl: no such file")
    (tmp_path / "broken.jsonl").write_text("{broken")
    assert_refused(invoke(model[0], f"data.path={tmp_path}/broken.jsonl"), 3, "broken.jsonl:1: malformed JSON")


def test_train_says_its_plan(tmp_path):
    """The line, and the manifest; a budget that is too small is named with what would fit."""
    quick = ["train.max_steps=1", "data.max_samples=8", "runtime.device=cpu", "eval.max_tasks=1",
             "eval.max_new_tokens=2"]  # fmt: skip
    result = CliRunner().invoke(
        app, ["train", *quick, "train.gradient_checkpointing=auto", "runtime.memory_budget=0.04",
        "train.activation_offloading=true", "-o", str(tmp_path / "run")], catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "predicted of runtime.memory_budget=0.04; " in result.output
    assert "train.activation_offloading: " in result.output
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert sum(manifest["memory"]["layers"].values()) == 8
    assert manifest["memory"]["predicted_bytes"] > 0
    result = CliRunner().invoke(app, ["train", "--dry-run", "runtime.memory_budget=0.01", "runtime.device=cpu"])
    assert "this may run out of memory; " in result.output
