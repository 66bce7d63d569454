"""What cannot be merged is refused in one line, and leaves nothing behind."""

import shutil

import pytest
import torch
from fake_runs import assert_refused, change_settings, cli, save_run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoTokenizer

from ibft.tiny import BASE_DIR


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("faults") / "run")


@pytest.fixture
def alone(run, tmp_path):
    """The adapter without its run; a function that changes its settings."""
    folder = tmp_path / "alone"
    shutil.copytree(run / "adapter", folder)
    return lambda **settings: change_settings(folder, **settings)


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
        ({"r": 8}, "got A [4, 512] and B [192, 4], expected rank 8"),
        ({"use_dora": True}, "got use_dora=True"),
        ({"alora_invocation_tokens": [1]}, "got alora_invocation_tokens=[1]"),
        ({"alpha_pattern": {"q_proj": 8}}, "got alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "got modules_to_save="),
        ({"bias": "all"}, "got bias=all"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "got peft_type=IA3"),
        ({"init_lora_weights": "loftq"}, "got init_lora_weights=loftq"),
        ({"init_lora_weights": "eva"}, "got init_lora_weights=eva"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "got layer_replication="),
        ({"rank_pattern": {"q_proj": 8}}, "got rank_pattern="),
        ({"lora_bias": True}, "got lora_bias=True"),
        ({"fan_in_fan_out": True}, "got fan_in_fan_out=True"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan, expected two finite numbers"),
        ({"lora_alpha": float("-inf")}, "lora_alpha -inf"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"lora_alpha": True}, "lora_alpha True"),
        ({"r": True}, "got r True"),
        ({"use_rslora": "no"}, "got use_rslora 'no', expected true or false"),
        ({"use_rslora": 1}, "got use_rslora 1"),
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_an_adapter_that_is_not_in_floats_is_refused(alone, tmp_path, dtype):
    path = alone() / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    result = cli("merge", alone(), "-o", tmp_path / "merged")
    assert_refused(result, 4, f"got {str(dtype).removeprefix('torch.')}, expected float32")


def test_names_of_which_peft_would_find_none_are_refused(alone, tmp_path):
    path = alone() / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): value for name, value in load_file(path).items()}, path)
    result = cli("merge", alone(), "-o", tmp_path / "merged")
    assert_refused(result, 4, "expected names that begin with base_model.model.")
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
    for dtype, name in ((torch.uint8, "U8"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({"model.norm.weight": torch.zeros(4).to(dtype)}, base / "model.safetensors")
        assert_refused(cli("merge", adapter, "-o", tmp_path / "merged"), 4, f"is {name}", "full precision")
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
