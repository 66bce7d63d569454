"""The verification of a merge: the numbers of whole models, in the memory of a few matrices; and it can fail."""

import json
import shutil
import weakref

import pytest
import torch
from fake_runs import assert_refused, change_settings, cli, save_adapter, save_run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from ibft.config import BUNDLED, ModelConfig
from ibft.errors import SetupError
from ibft.merge import Lora
from ibft.merge_base import Base
from ibft.merge_check import _not_rounded_once, streamed_logits
from ibft.model import load_base
from ibft.tiny import BASE_DIR

CPU = torch.device("cpu")
PROMPTS = [list(range(3, 40)), list(range(100, 160)), [7]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("check") / "run")


class Peak(TorchDispatchMode):
    """Most bytes in tensors made inside the block at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def streamed(base, adapter=None, in_4_bits=False):
    opened = Base.of(ModelConfig(name_or_path=str(base)))
    return streamed_logits(opened, adapter, PROMPTS, CPU, in_4_bits, lambda: None)


@torch.no_grad()
def whole(model):
    """Each prompt alone."""
    return torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_streamed_logits_are_those_of_the_whole_model(run, quantization):
    base = load_base(ModelConfig(name_or_path=BUNDLED, quantization=quantization), dtype=torch.float32, device=CPU)
    expected = whole(base)
    torch.testing.assert_close(streamed(BASE_DIR, None, quantization == "nf4"), expected, atol=1e-5, rtol=1e-5)
    worn = whole(PeftModel.from_pretrained(base, run / "adapter"))
    assert (worn - expected).abs().max() > 0.1  # else the adapter is nowhere
    torch.testing.assert_close(streamed(BASE_DIR, run / "adapter", quantization == "nf4"), worn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "deepseek"])
def test_biases_norms_of_heads_and_scaled_positions_are_the_models_own(tmp_path, kind):
    save_tiny_model(tmp_path, kind)
    prompts = [[5, 6, 7, 8] * 20, [9, 3]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in prompts])
    base = Base.of(ModelConfig(name_or_path=str(tmp_path)))
    torch.testing.assert_close(streamed_logits(base, None, prompts, CPU, False, lambda: None), expected)


def test_tied_heads_and_heads_in_pieces_are_read(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr("ibft.streamed.PIECE", 1000)  # five of 192 columns
    torch.testing.assert_close(streamed(tmp_path), whole(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_memory_is_that_of_one_layer_whatever_the_number_of_layers(tmp_path, in_4_bits):
    def peak(layers):
        folder = tmp_path / str(layers)
        save_tiny_model(folder, layers=layers, hidden=256)
        with Peak() as seen:
            opened = Base.of(ModelConfig(name_or_path=str(folder)))
            streamed_logits(opened, None, [[3, 4, 5]], CPU, in_4_bits, lambda: None)
        return seen.most, 4 * sum(value.numel() for value in load_file(folder / "model.safetensors").values())

    (few, small), (many, large) = peak(2), peak(8)
    layer = (large - small) / 6
    assert layer > 2e6
    assert many < few + 0.1 * layer
    assert 4 * 256 * 512 < many < 1.5 * layer  # a matrix at the least: the measure sees them


def break_sum(monkeypatch, change):
    plain = Lora.added_to
    monkeypatch.setattr(Lora, "added_to", lambda self, weight: change(plain(self, weight), weight))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_wrong_sum_is_refused_and_nothing_is_left(run, tmp_path, monkeypatch, dtype):
    break_sum(monkeypatch, lambda merged, weight: weight.float() + 0.999 * (merged - weight.float()))
    result = cli("merge", run, "-o", tmp_path / "merged", "--dtype", dtype)
    assert_refused(result, 4, "not merged: model.layers.0.", "is not base + adapter")
    assert not list(tmp_path.iterdir())


def test_a_base_that_the_sum_left_out_is_refused(run, tmp_path, monkeypatch):
    break_sum(monkeypatch, lambda merged, weight: weight.float())
    assert_refused(cli("merge", run, "-o", tmp_path / "merged"), 4, "is not base + adapter")


def test_logits_that_rounding_does_not_explain_are_refused(run, tmp_path, monkeypatch):
    """All tensors are right, but config.json is not."""

    def copy_others(self, folder, dtype):
        real(self, folder, dtype)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))

    real = Base.copy_others
    monkeypatch.setattr(Base, "copy_others", copy_others)
    result = cli("merge", run, "-o", tmp_path / "merged")
    assert_refused(result, 4, "not merged: its logits are", "rounding explains")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding_is_told_from_two_and_from_none(dtype):
    torch.manual_seed(0)
    plain, delta = torch.randn(300, 100).bfloat16(), 0.1 * torch.randn(300, 100)
    right = (plain.float() + delta).to(dtype)
    assert _not_rounded_once(right, plain, delta) == ""
    assert _not_rounded_once(plain.to(dtype), plain, None) == ""
    assert "apart" in _not_rounded_once(plain.to(dtype), plain, delta)
    one = right.clone()
    one[299, 99] *= 1.02
    assert "apart" in _not_rounded_once(one, plain, delta)
    one[299, 99] = torch.nan
    assert "apart" in _not_rounded_once(one, plain, delta)
    for factor in (0.9999, 1.0001):  # far below what one weight's rounding hides
        assert "apart" in _not_rounded_once((plain.float() + factor * delta).to(dtype), plain, delta)
    twice = (plain.double() + delta.to(torch.bfloat16).double()).to(dtype)
    assert "apart" in _not_rounded_once(twice, plain, delta)


def test_a_base_without_one_of_its_weights_is_refused(tmp_path):
    shutil.copytree(BASE_DIR, tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = load_file(path)
    norm = weights.pop("model.norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter")
    change_settings(adapter, base_model_name_or_path=str(tmp_path / "base"))
    for verify in ("--verify", "--no-verify"):
        result = cli("merge", adapter, "-o", tmp_path / "merged", verify)
        assert_refused(result, 4, "model.norm.weight: got none, expected [192]")
    save_file(weights | {"model.norm.weight": norm[:100].clone()}, path)
    with pytest.raises(SetupError, match=r"norm.weight: got \[100\], expected \[192\]"):
        Base.of(ModelConfig(name_or_path=str(tmp_path / "base")))
