"""What importing costs, TRL's trainer, and docs/integrations.md as it stands."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hf_trainers import hf_trainer, losses
from transformers import Trainer

from ibft.errors import SetupError

DOC = Path(__file__).parents[2] / "docs" / "integrations.md"


def test_nothing_of_transformers_is_imported_before_a_trainer_is_named():
    code = (
        "import sys; from ibft import ib_kl_loss; import ibft.integrations; from ibft.integrations import IBFTConfig; "
        "print([name for name in ('transformers', 'peft', 'trl', 'bitsandbytes') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_the_trainer_for_trl_needs_trl_and_is_the_mixin_over_its_own(folder, tmp_path, monkeypatch):
    """A stand-in for TRL: TRL itself is not among the test dependencies."""
    import ibft.integrations

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "ibft.integrations.sft", raising=False)
    with pytest.raises(SetupError, match="IBFTSFTTrainer needs TRL: run `pip install trl`"):
        _ = ibft.integrations.IBFTSFTTrainer
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(SFTTrainer=type("SFTTrainer", (Trainer,), {})))
    trainer = hf_trainer(folder, tmp_path, kind=ibft.integrations.IBFTSFTTrainer, max_steps=1)
    trainer.train()
    assert losses(trainer)[0][2] > 0
    monkeypatch.delitem(sys.modules, "ibft.integrations.sft")


def snippets():
    return re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    code, _ = snippets()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(DOC), "exec"), names)
    rows = [row for row in names["trainer"].state.log_history if "kl" in row]
    assert rows[-1]["ce"] < rows[0]["ce"]
    assert (tmp_path / "adapter" / "ib_bottleneck.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_pages_model_in_four_bits_is_fused(folder, tmp_path):
    """With a folder for the model's name."""
    names: dict = {}
    exec(compile(snippets()[1].replace("Qwen/Qwen2.5-Coder-7B", str(folder)), str(DOC), "exec"), names)
    trainer = hf_trainer(folder, tmp_path, model=names["model"], bf16=True, max_steps=1)
    trainer.train()
    assert trainer.fused.left_alone == {}
    assert losses(trainer)[0][2] > 0
