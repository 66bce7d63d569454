"""From presets, a YAML file and `section.key=value` overrides to one `Config`; every refusal is one clear line."""

import difflib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ibft.config import BUNDLED, Config
from ibft.data.read_files import kind_of
from ibft.errors import ConfigError

# names that users of Hugging Face's Trainer, TRL, Axolotl and Unsloth know -> ours
ALIASES = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "sequence_len": "data.max_length",
    "packing": "data.packing",
    "sample_packing": "data.packing",
    "val_set_size": "data.val_size",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "alpha": "ib.alpha",
    "beta": "ib.beta",
    "layer": "ib.layer",
    "learning_rate": "train.learning_rate",
    "max_steps": "train.max_steps",
    "num_epochs": "train.num_train_epochs",
    "num_train_epochs": "train.num_train_epochs",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_offloading": "train.activation_offloading",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "optimizer": "train.optim",
    "optim": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "report_to": "train.report_to",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.keep_last",
    "seed": "runtime.seed",
    "device": "runtime.device",
}

ADVICE = {  # of other trainers, and no key here
    "load_in_4bit": "model.quantization=nf4 is the default",
    "load_in_8bit": "model.quantization is nf4 or none",
    "bf16": "it is train.mixed_precision=bf16 here",
    "fp16": "it is train.mixed_precision=fp16 here",
    "datasets": "data.path names one data set",
    "cutoff_len": "it is data.max_length here",
    "output_dir": "it is the option -o here",
    "adapter": "it is LoRA: lora.r and the rest of that section",
    "train_on_inputs": "data.labels=all teaches prompts too",
    "flash_attention": "it is model.attn_implementation here, which fused layers do not need",
    "deepspeed": "several GPUs: docs/several-gpus.md",
    "fsdp": "several GPUs: docs/several-gpus.md",
    "chat_template": "data.template=chat is the tokenizer's, data.template=FILE.jinja another",
}

Tree = dict[str, Any]


def load_config(path: str | Path | None, overrides: list[str]) -> tuple[Config, list[str]]:
    """The validated configuration, and notices for the user (aliases taken).

    Raises:
        ConfigError: anything wrong with file, keys or values; the message names file, key and the nearest known key.
    """
    notices: list[str] = []
    tree: Tree = {}
    if path is not None:
        _merge(tree, _canonical(_read_settings(Path(path)), f"{path}: ", notices))
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"got {override!r}, expected section.key=value (or a .yaml file as the first argument)")
        _merge(tree, _canonical(_nest(key.strip(), _parse_value(value)), "", notices))

    chosen = tree.get("preset")
    model = tree.get("model", {})
    preset = _preset(chosen) if chosen is not None else {}
    name = model.get("name_or_path") or preset.get("model", {}).get("name_or_path") or BUNDLED
    layered: Tree = {}
    if name == BUNDLED:
        _merge(layered, _preset("tiny"))
    _merge(layered, preset)
    _merge(layered, tree)
    return _validate(layered), notices


def preset_names() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in files("ibft").joinpath("presets").iterdir())


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key, e.g. "ib.alpha"."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _preset(name: object) -> Tree:
    if name not in preset_names():
        raise ConfigError(
            f"preset: got {name!r}, expected one of {', '.join(preset_names())}{_nearest(str(name), preset_names())}"
        )
    tree: Tree = yaml.safe_load(files("ibft").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8"))
    return tree


def _read_settings(path: Path) -> Tree:
    kind = kind_of(path.name)
    hint = f"; a file of rows is named by data.path={path}"
    if kind not in (None, ".json"):
        raise ConfigError(f"{path}: got a {kind} file, expected the settings as .yaml{hint}")
    try:
        return read_yaml(path)
    except ConfigError as error:  # JSON may be either
        raise ConfigError(f"{error}{hint if kind else ''}") from error


def read_yaml(path: Path) -> Tree:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: malformed YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got a {type(content).__name__}, expected sections with keys")
    return content


def _parse_value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return text


def _nest(key: str, value: Any) -> Tree:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif not (isinstance(value, dict) or (value is None and f"{prefix}{key}" in Config.model_fields)):
            yield f"{prefix}{key}", value


def _canonical(tree: Tree, where: str, notices: list[str]) -> Tree:
    """Aliases replaced, unknown keys refused with the nearest known one."""
    known = set(known_keys())
    result: Tree = {}
    for key, value in _flatten(tree):
        target = key
        if key not in known and key in ALIASES:
            target = ALIASES[key]
            notices.append(f"{where}{key} is {target} here")
        if target not in known:
            if target in Config.model_fields:
                raise ConfigError(
                    f"{where}{target}: got {value!r}, expected a section with keys such as {_example(target)}"
                )
            advice = f"; {ADVICE[key]}" if key in ADVICE else _nearest(key, [*known, *ALIASES])
            raise ConfigError(f"{where}unknown key {key!r}{advice}")
        _merge(result, _nest(target, value))
    return result


def _example(section: str) -> str:
    return ", ".join([key for key in known_keys() if key.startswith(section + ".")][:2])


def _nearest(key: str, candidates: list[str]) -> str:
    found = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    if not found:
        leaf = key.rpartition(".")[2]
        leaves = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        found = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    return f"; did you mean {ALIASES.get(found[0], found[0])!r}?" if found else ""


def _merge(into: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _validate(tree: Tree) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # the location ends with the member of a union that was tried; the user's key is the part that names a field
        known = set(known_keys())
        parts = [str(part) for part in first["loc"]]
        while parts and ".".join(parts) not in known:
            parts.pop()
        key = ".".join(parts)
        same = [entry for entry in error.errors() if not key or ".".join(map(str, entry["loc"])).startswith(key)]
        reasons = dict.fromkeys(entry["msg"].removeprefix("Value error, ") for entry in same)
        message = " or ".join(reason[0].lower() + reason[1:] for reason in reasons)
        got = f"got {first['input']!r}: " if key else ""
        raise ConfigError(f"{key}: {got}{message}" if key else message) from error
