"""A merged folder is base + adapter: the same logits, in any dtype and any number of files; or there is no folder."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from fake_runs import cli
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ibft.merge import read_adapter, run_merge
from ibft.merge_check import PROMPTS
from ibft.tiny import BASE_DIR
from ibft.trained import find_trained
from ibft_kernels import _dispatch

SETTINGS = [
    "data.max_samples=40", "data.max_length=128", "train.max_steps=3", "train.learning_rate=3e-2", "eval.max_tasks=1",
    "eval.max_new_tokens=1", "runtime.device=cpu", "runtime.seed=7",
]  # fmt: skip
IDS = torch.arange(3, 63)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
        result = cli("train", *SETTINGS, "-o", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def alone(run, tmp_path):
    """The adapter without its run; a function that changes its settings."""
    folder = tmp_path / "alone"
    shutil.copytree(run / "adapter", folder)

    def change(**settings):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return change


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    """The bundled base with its embeddings as head."""
    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(BASE_DIR)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = load_file(BASE_DIR / "model.safetensors")
    weights.pop("lm_head.weight")
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


def base_and_adapter(base, adapter):
    """Plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits_of(model, ids=IDS):
    """In float64, so that what differs is the weights."""
    return model.double().eval()(input_ids=ids).logits[0]


def weights_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_in_fp32_the_logits_are_those_of_base_and_adapter(run, tmp_path):
    run_merge(str(run), tmp_path / "merged", "fp32", verify=False)
    expected = logits_of(base_and_adapter(BASE_DIR, run / "adapter"))
    assert (expected - logits_of(plain(BASE_DIR))).abs().max() > 1  # else this tests nothing
    torch.testing.assert_close(logits_of(plain(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_every_weight_is_the_sum_rounded_once(run, tmp_path, dtype):
    run_merge(str(run), tmp_path / "merged", dtype, verify=False)
    kind, eps = {"bf16": (torch.bfloat16, 2**-8), "fp16": (torch.float16, 2**-11)}[dtype]
    whole = base_and_adapter(BASE_DIR, run / "adapter").merge_and_unload().state_dict()
    merged = weights_of(tmp_path / "merged")
    assert merged.keys() == whole.keys()
    for name, value in merged.items():
        assert value.dtype == kind
        # half an ulp; 1e-6 for the order of the additions and for fp16's smallest numbers
        assert ((value.float() - whole[name]).abs() <= eps * whole[name].abs() + 1e-6).all(), name
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_tied_embeddings_stay_tied(alone, tied_base, tmp_path):
    adapter = alone(base_model_name_or_path=str(tied_base))
    run_merge(str(adapter), tmp_path / "merged", "fp32", verify=False)
    assert "lm_head.weight" not in weights_of(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits_of(base_and_adapter(tied_base, adapter))
    torch.testing.assert_close(logits_of(plain(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(alone, tmp_path):
    adapter = alone(use_rslora=True)
    assert {lora.scale for lora in read_adapter(adapter).values()} == {32 / math.sqrt(16)}
    run_merge(str(adapter), tmp_path / "merged", "fp32", verify=False)
    expected = logits_of(base_and_adapter(BASE_DIR, adapter))
    torch.testing.assert_close(logits_of(plain(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_several_files_hold_what_one_does(run, tmp_path):
    run_merge(str(run), tmp_path / "one", verify=False)
    run_merge(str(run), tmp_path / "many", verify=False, max_shard_size="1MB")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "many" / name).stat().st_size < 1_100_000 for name in files)
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert all(torch.equal(many[name], one[name]) for name in one)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == 2 * sum(value.numel() for value in one.values())
    assert torch.equal(logits_of(plain(tmp_path / "many")), logits_of(plain(tmp_path / "one")))


def test_a_base_in_several_files_is_read(alone, tmp_path):
    AutoModelForCausalLM.from_pretrained(BASE_DIR).save_pretrained(tmp_path / "base", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base/model.safetensors").exists()
    run_merge(str(alone()), tmp_path / "one", verify=False)
    run_merge(str(alone(base_model_name_or_path=str(tmp_path / "base"))), tmp_path / "merged", verify=False)
    one, merged = weights_of(tmp_path / "one"), weights_of(tmp_path / "merged")
    assert merged.keys() == one.keys()
    assert all(torch.equal(merged[name], one[name]) for name in one)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_command_leaves_a_whole_model_and_says_what_it_measured(run, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()  # an empty folder will do
    result = cli("merge", run, "-o", out)
    assert result.exit_code == 0, result.output
    assert [each.name for each in tmp_path.iterdir()] == ["merged"]
    assert {each.name for each in out.iterdir()} == {
        "config.json", "generation_config.json", "merged.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (BASE_DIR / "tokenizer.json").read_bytes()
    verified = json.loads((out / "merged.json").read_text())["verified"]
    whole, quantised = verified.values()

    tokenizer, model = AutoTokenizer.from_pretrained(BASE_DIR), base_and_adapter(BASE_DIR, run / "adapter")
    merged = plain(out)
    prompts = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    expected, got = (torch.cat([logits_of(each, ids) for ids in prompts]) for each in (model, merged))
    assert whole["positions"] == len(expected)
    assert whole["largest"] == pytest.approx(float((got - expected).abs().max()), rel=1e-3)
    assert whole["mean"] == pytest.approx(float((got - expected).abs().mean()), rel=1e-3)
    assert whole["same_argmax"] == float((got.argmax(-1) == expected.argmax(-1)).double().mean())
    assert quantised["mean"] > 5 * whole["mean"]  # 4 bits against 8 of bf16's mantissa
    for name, found in verified.items():
        assert f"logits beside {name}: at most {found['largest']:.3g} apart" in " ".join(result.output.split())


def test_a_run_that_was_not_quantised_is_not_compared_with_4_bits(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("quantization: nf4", "quantization: none"))
    run_merge(str(tmp_path / "run/adapter-best"), tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged/merged.json").read_text())["verified"]) == 1


def test_a_template_of_the_users_own_goes_with_the_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "mine.jinja").write_text("Q: {{ prompt }}\nA:")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("template: auto", f"template: {tmp_path}/mine.jinja"))
    run_merge(str(tmp_path / "run"), tmp_path / "merged", verify=False)
    copy = tmp_path / "merged/prompt_template.jinja"
    assert copy.read_text() == "Q: {{ prompt }}\nA:"
    assert find_trained(str(tmp_path / "merged")).template == str(copy)


def test_it_is_verified_unless_that_is_left_out(run, tmp_path):
    result = cli("merge", run, "-o", tmp_path / "merged", "--no-verify")
    assert "not verified: --no-verify" in " ".join(result.output.split())
    assert json.loads((tmp_path / "merged/merged.json").read_text())["verified"] == {}


def test_the_weights_are_as_readable_as_the_rest_and_marked_for_torch(run, tmp_path):
    run_merge(str(run), tmp_path / "merged", verify=False, max_shard_size="1MB")
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert {file.stat().st_mode for file in files} == {(tmp_path / "merged/merged.json").stat().st_mode}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_merged_json_names_base_and_adapter_without_their_paths(run, alone, tmp_path):
    run_merge(str(run), tmp_path / "merged", verify=False)
    facts = json.loads((tmp_path / "merged/merged.json").read_text())
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    assert facts == {
        "base": "bundled:tiny", "revision": None, "adapter": "adapter", "dtype": "bf16", "template": "released",
        "adapter_sha256": hashlib.sha256(weights).hexdigest(), "verified": {},
    }  # fmt: skip
    run_merge(str(alone()), tmp_path / "other", verify=False)
    facts = json.loads((tmp_path / "other/merged.json").read_text())
    assert (facts["base"], facts["adapter"]) == ("base", "alone")


def test_all_that_a_tokenizer_may_consist_of_goes_with_the_model(alone, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    names = [
        "added_tokens.json", "special_tokens_map.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
        "merges.txt", "chat_template.jinja", "chat_template.json", "chat_templates/tool.jinja",
        "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    for number, name in enumerate(names):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}" if name.endswith("json") else f"{number}")
    (base / "notes.txt").touch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ibft.merge.local_model", lambda trained: None)  # these are no real tokenizer's
        run_merge(str(alone(base_model_name_or_path=str(base))), tmp_path / "merged", verify=False)
    for name in [*names, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    assert not (tmp_path / "merged/notes.txt").exists()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_config_json_says_the_new_dtype_by_the_name_that_it_has(alone, tmp_path, key):
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config | ({key: "bfloat16"} if key else {})))
    run_merge(str(alone(base_model_name_or_path=str(base))), tmp_path / "merged", "fp16", verify=False)
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged == config | {key or "torch_dtype": "float16"}


def test_a_stale_quantization_config_is_left_out_and_told(alone, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    config = json.loads((base / "config.json").read_text())
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": stale}))
    result = cli("merge", alone(base_model_name_or_path=str(base)), "-o", tmp_path / "merged")
    assert result.exit_code == 0, (result.output, result.exception)
    told = " ".join(result.output.split())
    assert "config.json names a quantization_config, but the weights are in full precision: left out" in told
    assert json.loads((tmp_path / "merged/config.json").read_text()) == config
    assert len(json.loads((tmp_path / "merged/merged.json").read_text())["verified"]) == 2


def test_of_a_hub_id_the_revision_that_was_trained_on_is_read(alone, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings["revision"]))
        assert {"config.json", "vocab.txt", "chat_templates/*"} <= set(settings["allow_patterns"])
        return str(BASE_DIR)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("ibft.merge.local_model", lambda trained: None)
    adapter = alone(base_model_name_or_path="owner/base", revision="abc123")
    run_merge(str(adapter), tmp_path / "merged", verify=False)
    assert asked == [("owner/base", "abc123")]
    facts = json.loads((tmp_path / "merged/merged.json").read_text())
    assert (facts["base"], facts["revision"]) == ("owner/base", "abc123")
