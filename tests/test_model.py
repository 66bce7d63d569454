"""Loading models, and what a run saves: the adapter is an ordinary PEFT adapter of the ordinary base."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_samples, randomise_lora, save_tiny_model, tiny_config, tiny_trainer

from ibft.bottleneck import InformationBottleneck
from ibft.config import ModelConfig
from ibft.errors import ConfigError, SetupError
from ibft.model import load_base, load_model_config, resolve_layer
from ibft.rundir import BOTTLENECK_FILE, RunDir


class SavedTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_adapter_loads_in_plain_peft_on_the_plain_base(tmp_path, quantization):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = save_tiny_model(tmp_path / "base")
    trainer = tiny_trainer(folder, random_samples([12, 20]), f"model.quantization={quantization}", "ib.encoder=mlp")
    trainer.train()
    randomise_lora(trainer.model)
    run = RunDir(tmp_path / "run")
    run.create()
    saved = run.save_adapter("adapter", trainer.model, trainer.objective.bottleneck, SavedTokenizer())

    settings = {}
    if quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **settings)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(base, saved).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-6)
        with plain.disable_adapter():
            assert (plain(ids).logits - expected).abs().max() > 1e-2  # the adapter does something

    twin = InformationBottleneck(64, 16, "mlp")
    twin.load_state_dict(load_file(saved / BOTTLENECK_FILE))
    for left, right in zip(twin.parameters(), trainer.objective.bottleneck.parameters(), strict=True):
        assert torch.equal(left, right)


def test_saving_again_replaces_the_old(tmp_path):
    folder = save_tiny_model(tmp_path / "base")
    trainer = tiny_trainer(folder, random_samples([12]))
    run = RunDir(tmp_path / "run")
    run.create()
    first = run.save_adapter("adapter", trainer.model, None, SavedTokenizer())
    randomise_lora(trainer.model)
    run.save_adapter("adapter", trainer.model, None, SavedTokenizer())
    weights = load_file(first / "adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for value in weights.values())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "adapter", "metrics.jsonl"]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_auto_layer():
    assert [resolve_layer("auto", layers) for layers in (30, 32, 28, 8, 2)] == [20, 21, 19, 5, 1]
    assert resolve_layer(7, 8) == 7
    for wrong in (8, 9, 100):
        with pytest.raises(ConfigError, match=r"ib.layer: got .*, expected 1 .. 7 \(the model has 8 layers\)"):
            resolve_layer(wrong, 8)


def test_folders_that_hold_no_model(tmp_path):
    def refused(path):
        with pytest.raises(SetupError) as caught:
            load_model_config(ModelConfig(name_or_path=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder" in refused(tmp_path / "absent")
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "no weights: expected *.safetensors" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{broken")
    assert "cannot be loaded" in refused(tmp_path)
    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    for wrong, message in (
        ({"hidden_size": "big"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "cannot take: integer division or modulo by zero"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0; expected 1 or more"),
        ({"vocab_size": -1, "num_hidden_layers": 0}, "num_hidden_layers: 0, vocab_size: -1; expected 1 or more"),
        ({"dtype": "half a byte"}, "config.json that transformers cannot take"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(sizes | wrong))
        assert message in refused(tmp_path)


def test_damaged_weights(tmp_path):
    folder = save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SetupError, match="cannot be loaded"):
        load_base(tiny_config(folder).model, dtype=torch.float32, device=torch.device("cpu"))


def test_a_model_of_another_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    settings = ModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match="not of the Llama family"):
        load_base(settings, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"GPT2Config is not of the Llama family: .* intermediate_size"):
        load_model_config(settings)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "gated: accept its terms on its page, then run `hf auth login`"),
        ("RepositoryNotFoundError", "neither a local folder nor a hub id that you can see"),
        ("LocalEntryNotFoundError", "fetch it once with `hf download some/model`"),
    ],
)
def test_hub_ids_that_cannot_be_had(monkeypatch, error, message):
    """What huggingface_hub raises, as transformers wraps it."""
    import transformers
    from huggingface_hub import errors as hub

    def refuse(*_args, **_kwargs):
        kind = getattr(hub, error)
        raise OSError("We couldn't load it\nlong advice") from kind.__new__(
            kind
        )  # its constructor wants a live response

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(SetupError) as caught:
        load_model_config(ModelConfig(name_or_path="some/model"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_for_real():
    """Offline (as every test here is), an id that is not in the cache."""
    with pytest.raises(SetupError, match="fetch it once with `hf download"):
        load_model_config(ModelConfig(name_or_path="nobody/no-such-model-here"))


def test_two_runs_never_share_a_folder(tmp_path):
    RunDir(tmp_path / "run").create()
    with pytest.raises(
        ConfigError, match="already holds a run: go on with it by --resume auto, or choose another folder with -o"
    ):
        RunDir(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDir(tmp_path / "file")


def test_lora_initialisation_does_not_depend_on_what_ran_before(tmp_path):
    folder = save_tiny_model(tmp_path)

    def weights():
        torch.rand(torch.randint(1, 9, ()).item())
        trainer = tiny_trainer(folder, random_samples([12]))
        named = [*trainer.model.named_parameters(), *trainer.objective.bottleneck.named_parameters()]
        return {name: value.detach().clone() for name, value in named if value.requires_grad}

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
