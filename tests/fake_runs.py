"""Run folders and adapters as training leaves them, with random weights and without training."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import randomise_lora
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ibft.cli import app
from ibft.load_config import load_config
from ibft.rundir import RunDir
from ibft.tiny import BASE_DIR

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cli(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def assert_refused(result, code, *parts):
    assert result.exit_code == code, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def save_adapter(folder, base=BASE_DIR, rank: int = 4):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    worn = get_peft_model(model, settings)
    randomise_lora(worn)
    worn.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def save_run(folder, *overrides, template: str = "released"):
    run = RunDir(folder)
    Path(folder).mkdir(parents=True)
    run.write_config(load_config(None, ["runtime.device=cpu", *overrides])[0])
    run.write_json("manifest.json", {"template": template})
    save_adapter(folder / "adapter")
    return folder


def change_settings(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return adapter
