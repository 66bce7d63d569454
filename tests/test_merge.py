"""A merged folder is base + adapter: the same logits, in any dtype and any number of files; or there is no folder."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ibft.cli import app
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


def cli(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


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


def assert_refused(result, code, *parts):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


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


def test_without_memory_it_is_not_verified_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.memory.free_memory", lambda device: 2**20)
    result = cli("merge", run, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "not verified: a whole model in fp32 takes 17 MiB, and 1 MiB are free" in " ".join(result.output.split())
    assert_refused(cli("merge", run, "-o", tmp_path / "other", "--verify"), 4, "--verify: a whole model")
    assert not (tmp_path / "other").exists()


def test_a_large_base_is_not_verified_on_a_cpu_unless_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.merge_check.LARGE", 1_000_000)
    result = cli("merge", run, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "not verified: 3,542,208 parameters take long on a CPU" in " ".join(result.output.split())
    result = cli("merge", run, "-o", tmp_path / "other", "--verify")
    assert "logits beside" in result.output


def test_a_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "mine").write_text("")
    assert_refused(cli("merge", run, "-o", tmp_path), 2, "is not empty")
    assert_refused(cli("merge", run, "-o", tmp_path / "mine"), 2, "is a file")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_what_has_no_adapter_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "run")
    out = tmp_path / "merged"
    assert_refused(cli("merge", tmp_path / "run", "-o", out), 2, "run/adapter has no adapter_config.json")
    assert_refused(cli("merge", tmp_path, "-o", out), 2, "neither a run folder nor an adapter nor a model")
    assert_refused(cli("merge", tmp_path / "nowhere", "-o", out), 2, "nowhere: no folder")
    assert_refused(cli("merge", BASE_DIR, "-o", out), 2, "there is no adapter to merge")
    assert_refused(cli("merge", run, "-o", out, "--dtype", "int8"), 2, "--dtype: got int8")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base_model_name_or_path": "/nowhere"}, "no folder /nowhere"),
        ({"r": 8}, "got A [16, 512] and B [192, 16], expected rank 8"),
        ({"use_dora": True}, "got use_dora=True"),
        ({"alora_invocation_tokens": [1]}, "got alora_invocation_tokens=[1]"),
        ({"alpha_pattern": {"q_proj": 8}}, "got alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "got modules_to_save="),
        ({"bias": "all"}, "got bias=all"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "got peft_type=IA3"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(alone, tmp_path, settings, told):
    assert_refused(cli("merge", alone(**settings), "-o", tmp_path / "merged"), 4, told)
    assert not (tmp_path / "merged").exists()


def test_damaged_weights_are_refused(alone, tmp_path):
    path = alone() / "adapter_model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(content[:-1000])
    assert_refused(cli("merge", alone(), "-o", tmp_path / "merged"), 4, "damaged")
    first = sorted(tensors)[0]  # an A, so that its B is alone
    save_file({name: value for name, value in tensors.items() if name != first}, path)
    assert_refused(cli("merge", alone(), "-o", tmp_path / "merged"), 4, "expected pairs of lora_A and lora_B")
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, path)
    assert_refused(cli("merge", alone(), "-o", tmp_path / "merged"), 4, "values that are not finite")
    assert [each.name for each in tmp_path.iterdir()] == ["alone"]


def test_a_value_beyond_fp16_is_refused(alone, tmp_path):
    path = alone() / "adapter_model.safetensors"
    save_file({name: value * 1e4 for name, value in load_file(path).items()}, path)
    assert_refused(cli("merge", alone(), "-o", tmp_path / "merged", "--dtype", "fp16"), 4, "beyond fp16: use --dtype")
    assert [each.name for each in tmp_path.iterdir()] == ["alone"]


def test_another_base_is_refused(alone, tmp_path):
    base = tmp_path / "base"
    save_tiny_model(base)
    AutoTokenizer.from_pretrained(BASE_DIR).save_pretrained(base)
    adapter = alone(base_model_name_or_path=str(base))
    assert_refused(cli("merge", adapter, "-o", tmp_path / "merged"), 4, "does not go with", "the base has [64, 128]")


def test_a_base_that_is_quantised_or_pickled_is_refused(alone, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    adapter = alone(base_model_name_or_path=str(base))
    save_file({"model.norm.weight": torch.zeros(4, dtype=torch.uint8)}, base / "model.safetensors")
    assert_refused(cli("merge", adapter, "-o", tmp_path / "merged"), 4, "is U8", "full precision")
    (base / "model.safetensors").write_bytes(b"no header")
    assert_refused(cli("merge", adapter, "-o", tmp_path / "merged"), 4, "weights of ")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert_refused(cli("merge", adapter, "-o", tmp_path / "merged"), 4, "has no model.safetensors")


def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch):
    def full(shard, path, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        assert_refused(cli("merge", run, "-o", tmp_path / "merged"), 4, "No space left on device")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    assert_refused(cli("merge", run, "-o", tmp_path / "merged"), 4, "takes 7 MiB, and 1 MiB are free")
    assert not list(tmp_path.iterdir())
