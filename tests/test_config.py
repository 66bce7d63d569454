"""Configuration: presets say what the paper says, and every refusal is one line that names the key."""

import math

import pytest
import yaml

from ibft.config import Config
from ibft.console import describe_objective
from ibft.errors import ConfigError
from ibft.load_config import ALIASES, known_keys, load_config, preset_names


def load(*overrides, file=None):
    return load_config(file, list(overrides))[0]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_configuration(name):
    assert load(f"preset={name}").preset == name


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "reduction", "tokens", "packing", "eos"),
    [
        ("authors-code", 0.2, 0.01, "mean", "all", False, False),
        ("paper-origen", 0.1, 0.02, "batchmean", "real", True, True),
        ("paper-evol", 0.1, 0.01, "batchmean", "real", True, True),
    ],
)
def test_presets_hold_the_published_settings(name, alpha, beta, reduction, tokens, packing, eos):
    config = load(f"preset={name}")
    assert (config.ib.alpha, config.ib.beta, config.ib.kl_reduction, config.ib.kl_tokens) == (
        alpha,
        beta,
        reduction,
        tokens,
    )
    assert (config.data.packing, config.data.add_eos, config.data.pad_to_max_length) == (packing, eos, not packing)
    assert (config.ib.layer, config.ib.latent_dim, config.lora.r, config.lora.alpha, config.lora.dropout) == (
        20,
        256,
        32,
        32,
        0.05,
    )
    assert len(config.lora.target_modules) == 7
    train = config.train
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio, train.weight_decay) == (
        1e-4,
        "cosine",
        0.1,
        0,
    )
    assert (train.num_train_epochs, config.data.max_length) == (3, 2048)
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 4


def test_without_a_preset_the_weights_are_those_of_paper_origen_and_the_layer_is_auto():
    config = load("model.name_or_path=some/model", "data.path=rows.jsonl")
    assert (config.ib.alpha, config.ib.beta, config.ib.layer, config.ib.latent_dim) == (0.1, 0.02, "auto", 256)
    assert load().ib.latent_dim == 64  # the bundled base


def test_target_modules_as_others_write_them():
    everything = load().lora.target_modules
    assert load("lora.target_modules=all-linear").lora.target_modules == everything
    assert load("lora.target_modules=q_proj, v_proj").lora.target_modules == ("q_proj", "v_proj")


def test_order_of_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper-evol\nib: {alpha: 0.3, beta: 0.4}\ntrain: {learning_rate: 5e-5}\n")
    config = load("ib.beta=0.5", file=file)
    assert (config.ib.alpha, config.ib.beta, config.ib.layer, config.train.learning_rate) == (0.3, 0.5, 20, 5e-5)
    assert load("preset=authors-code", file=file).data.pad_to_max_length


def test_a_written_configuration_reads_back(tmp_path):
    config = load("preset=authors-code", "train.report_to=tensorboard,wandb")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(file=file) == config


def test_aliases_are_taken_with_a_notice():
    config, notices = load_config(None, ["micro_batch_size=3", "lora_r=5"])
    assert (config.train.per_device_train_batch_size, config.lora.r) == (3, 5)
    assert notices == ["micro_batch_size is train.per_device_train_batch_size here", "lora_r is lora.r here"]
    assert set(ALIASES.values()) <= set(known_keys())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=3", "unknown key 'train.max_step'; did you mean 'train.max_steps'?"),
        ("trian.max_steps=3", "did you mean 'train.max_steps'?"),
        ("ib.alpha=-1", "ib.alpha: got -1: input should be greater than or equal to 0"),
        ("ib.beta=-0.1", "ib.beta: got -0.1"),
        ("ib.alpha=nan", "ib.alpha: got 'nan'"),
        ("ib.alpha=.inf", "ib.alpha: got inf"),
        ("ib.layer=deep", "ib.layer: got 'deep': expected auto, a number from 1, or several as in 4,6"),
        ("ib.layer=0", "ib.layer: got 0: expected auto"),
        ("ib.layer=[]", "ib.layer: got []: expected auto"),
        ("ib.layer=4,", "ib.layer: got '4,': expected auto"),
        ("ib.layer=4,auto", "ib.layer: got '4,auto': expected auto"),
        ("ib.layer=[4,0]", "ib.layer: got [4, 0]: expected auto"),
        ("ib.layer=[4,[6]]", "ib.layer: got [4, [6]]: expected auto"),
        ("ib.layer=4,6,4", "ib.layer: got '4,6,4': expected each layer once"),
        ("train.max_steps=ten", "train.max_steps: got 'ten': input should be a valid integer"),
        ("train.max_steps=", "train.max_steps: got None"),
        ("train.max_steps=0", "train.max_steps: got 0"),
        ("train.num_train_epochs=.inf", "train.num_train_epochs: got inf"),
        ("lora.target_modules=[]", "lora.target_modules: got"),
        ("model.attn_implementation=flash_attention_2", "train.per_device_train_batch_size=1"),
        ("train=3", "train: got 3, expected a section"),
        ("lora.target_modules=[q_proj,foo]", "lora.target_modules: got 'foo'"),
        ("preset=paper", "preset: got 'paper', expected one of"),
        ("ib.kl_tokens=all", "set data.packing=false data.pad_to_max_length=true"),
        ("data.pad_to_max_length=true", "data.pad_to_max_length pads rows"),
        ("model.name_or_path=x/y", "data.path is required"),
        ("max_steps", "got 'max_steps', expected section.key=value"),
        ("runtime.device=tpu", "runtime.device: got 'tpu'"),
        ("runtime.memory_budget=0", "runtime.memory_budget: got 0"),
        ("runtime.memory_budget=.inf", "runtime.memory_budget: got inf"),
        ("runtime.memory_budget=.nan", "runtime.memory_budget: got nan"),
        (
            "train.gradient_checkpointing=sometimes",
            "train.gradient_checkpointing: got 'sometimes': expected true, false, auto or mlp",
        ),
        ("train.activation_offloading=true", "train.gradient_checkpointing=false has none: set it to true or auto"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", ":1: malformed YAML"),
        ("a: b: c", ":1: malformed YAML"),
        ("- 1\n- 2", "expected sections with keys"),
        ("ib:\n  alfa: 1", "unknown key 'ib.alfa'; did you mean 'ib.alpha'?"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file=file)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(file=tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file=tmp_path / "binary.yaml")


def test_yaml_traps():
    """`1e-4` is text in YAML 1.1 and a bare `no` is false: both mean what they say here."""
    assert load("train.learning_rate=1e-4").train.learning_rate == 1e-4
    assert load("train.mixed_precision=no").train.mixed_precision == "fp32"
    assert load("model.quantization=none").model.quantization == "none"
    assert load("train.report_to=none").train.report_to == ()


def test_problems_to_decontaminate_against_are_one_or_many(tmp_path):
    for text, entries in (
        ("humaneval=a=b.jsonl", ("humaneval=a=b.jsonl",)),
        ("humaneval=a.jsonl, rows.jsonl,", ("humaneval=a.jsonl", "rows.jsonl")),
        ("[humaneval=a.jsonl, 'b,c.jsonl']", ("humaneval=a.jsonl", "b,c.jsonl")),
        ("none", ()),
        ("", ()),
    ):
        assert load(f"data.decontaminate={text}").data.decontaminate == entries
    file = tmp_path / "run.yaml"
    file.write_text("data: {decontaminate: mbpp=a.jsonl}\n")
    assert load(file=file).data.decontaminate == ("mbpp=a.jsonl",)
    with pytest.raises(ConfigError, match=r"^data.decontaminate: got 5"):
        load("data.decontaminate=5")


def test_layers_are_a_number_or_a_list(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("ib: {layer: [6, 4]}\n")
    assert load(file=file).ib.layer == (4, 6)
    file.write_text("layer: 4, 6\n")
    assert load(file=file).ib.layer == (4, 6)
    for text in ("ib.layer=4,6", "ib.layer=[4,6]", "ib.layer=6, 4", "layer=4,6"):
        assert load(text).ib.layer == (4, 6)
    for text in ("ib.layer=5", "ib.layer=[5]", "layer=[5]"):
        assert load(text).ib.layer == 5


def test_recomputation_is_a_switch_or_a_word():
    """Existing configurations with true and false mean what they meant; new ones leave it to the planner."""
    own = ["model.name_or_path=some/model", "data.path=rows.jsonl"]
    assert load(*own).train.gradient_checkpointing == "auto"
    assert load().train.gradient_checkpointing is False  # the bundled base
    for text, value in (("true", True), ("false", False), ("mlp", "mlp"), ("auto", "auto")):
        assert load(*own, f"train.gradient_checkpointing={text}").train.gradient_checkpointing == value
    config, notices = load_config(None, [*own, "activation_offloading=true"])
    assert config.train.activation_offloading
    assert notices == ["activation_offloading is train.activation_offloading here"]


def test_the_header_settles_how_strong_the_kl_is():
    """`mean` divides by Z, `batchmean` does not: 256 times, from one word."""
    assert "weighs 0.1 per latent dimension" in describe_objective(load("preset=paper-evol"), 20, 30)
    weight = 0.2 / 256
    text = describe_objective(load("preset=authors-code"), 20, 30)
    assert f"weighs {weight:.3g} per latent dimension" in text
    assert math.isclose(float(f"{weight:.3g}"), weight, rel_tol=1e-2)
    text = describe_objective(load("ib.alpha=0.1"), (4, 6), 8)
    assert "in the mean over layers 4, 6 of 8" in text
    assert "weighs 0.05 per latent dimension of each layer" in text
    assert "plain fine-tuning" in describe_objective(load("ib.alpha=0"), None, 30)


def test_every_field_says_what_it_means_or_is_a_standard_name():
    standard = {"alpha", "r", "learning_rate", "lr_scheduler_type", "weight_decay", "optim", "adam_beta1", "adam_beta2"}
    standard |= {"adam_epsilon", "seed", "device", "version", "preset", "logging_steps", "max_new_tokens", "batch_size"}
    standard |= {
        "per_device_eval_batch_size",
        "max_tasks",
        "keep_last",
        "warmup_ratio",
        "num_train_epochs",
    }
    for section in Config.model_fields.values():
        for name, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description or name in standard, name
