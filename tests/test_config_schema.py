"""The schema that editors read says of a configuration what the loader says of it."""

import json
import re
from importlib.resources import files

import pytest
import yaml
from typer.testing import CliRunner

from ibft.cli import app
from ibft.config_schema import config_schema
from ibft.errors import ConfigError
from ibft.load_config import ALIASES, known_keys, load_config, preset_names
from ibft.starter import starter

SCHEMA = config_schema()
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
BASE = {"model": {"name_or_path": "some/model"}, "data": {"path": "rows.jsonl"}}


def is_of(value, name):
    if name in ("integer", "number"):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (name == "number" or value % 1 == 0)
    return isinstance(value, TYPES[name])


def same(value, other):
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def fits(value, schema):
    """Whether a value is valid by a schema, of the keywords that ours has; another one is an error."""
    checks = {
        "$ref": lambda rule: fits(value, resolve(rule)),
        "anyOf": lambda rule: any(fits(value, alternative) for alternative in rule),
        "type": lambda rule: is_of(value, rule),
        "enum": lambda rule: any(same(value, each) for each in rule),
        "const": lambda rule: same(value, rule),
        "minimum": lambda rule: not is_of(value, "number") or value >= rule,
        "maximum": lambda rule: not is_of(value, "number") or value <= rule,
        "exclusiveMinimum": lambda rule: not is_of(value, "number") or value > rule,
        "exclusiveMaximum": lambda rule: not is_of(value, "number") or value < rule,
        "pattern": lambda rule: not isinstance(value, str) or re.search(rule, value) is not None,
        "items": lambda rule: not isinstance(value, list) or all(fits(each, rule) for each in value),
        "minItems": lambda rule: not isinstance(value, list) or len(value) >= rule,
        "additionalProperties": lambda rule: not isinstance(value, dict) or members_fit(value, schema),
    }
    said = {"$schema", "title", "description", "default", "$defs", "properties", "patternProperties"}
    assert set(schema) <= {*checks, *said}, schema
    return all(check(schema[name]) for name, check in checks.items() if name in schema)


def members_fit(value, schema):
    assert schema["additionalProperties"] is False
    for name, member in value.items():
        rules = [schema["properties"][name]] if name in schema["properties"] else []
        rules += [rule for pattern, rule in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        if not rules or not all(fits(member, rule) for rule in rules):
            return False
    return True


def resolve(reference):
    found = SCHEMA
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def valid(tree):
    """By the few lines above, and by jsonschema where it is installed: they agree."""
    by_hand = fits(tree, SCHEMA)
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return by_hand
    assert Draft202012Validator(SCHEMA).is_valid(tree) == by_hand
    return by_hand


def loads(tree, folder):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    try:
        load_config(file, [])
    except ConfigError:
        return False
    return True


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("name", preset_names())
def test_presets_files_of_init_and_resolved_configurations_are_valid(name):
    preset = yaml.safe_load(files("ibft").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8"))
    assert valid(preset)
    assert valid(yaml.safe_load(starter(name)))
    assert valid(load_config(None, [f"preset={name}"])[0].model_dump(mode="json"))  # as a run writes it


@pytest.mark.parametrize(
    "tree",
    [
        {"learning_rat": 1e-4},
        {"ib": {"alfa": 0.1}},
        {"data": {"fields": {"question": "q"}}},
        {"ib.alfa": 0.1},
        {"lora": {"lora_r": 8}},
        {"version": 2},
        {"preset": "paper"},
        {"ib": 0.1},
        {"ib": {"alpha": -0.1}},
        {"ib": {"alpha": "much"}},
        {"ib": {"layer": 0}},
        {"ib": {"layer": "4,six"}},
        {"ib": {"latent_dim": 2.5}},
        {"ib": {"encoder": "deep"}},
        {"train": {"report_to": "tensorboards"}},
        {"train": {"report_to": ["none"]}},
        {"train": {"mixed_precision": True}},
        {"train": {"gradient_checkpointing": "some"}},
        {"train": {"max_steps": 0}},
        {"data": {"val_size": 1}},
        {"data": {"fields": None}},
        {"lora": {"target_modules": []}},
        {"lora": {"target_modules": "all"}},
        {"lora": {"target_modules": "q_proj,"}},
        {"runtime": {"seed": 2**32}},
        {"runtime": {"memory_budget": 0}},
    ],
    ids=str,
)
def test_what_the_loader_refuses_is_not_valid(tree, tmp_path):
    assert not loads(tree, tmp_path)
    assert not valid(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"ib": None, "preset": None},
        {"ib": {"alpha": 0, "layer": "4, 6"}},
        {"ib": {"layer": [6, 4]}},
        {"ib": {"alpha": "5e-2", "learning_rate": "1e-3"}},  # as YAML 1.1 reads 5e-2
        {"ib.alpha": 0.2},
        {"lora": {"lora_alpha": 16}},
        {"lora": {"target_modules": "all-linear"}},
        {"lora": {"target_modules": "q_proj, v_proj"}},
        {"train": {"report_to": "tensorboard, wandb"}},
        {"train": {"report_to": "none"}},
        {"train": {"report_to": None}},
        {"train": {"mixed_precision": False}},  # as YAML 1.1 reads no
        {"train": {"mixed_precision": "no"}},
        {"train": {"gradient_checkpointing": "mlp", "max_steps": -1, "num_train_epochs": 2}},
        {"runtime": {"memory_budget": 24}},
    ],
    ids=str,
)
def test_what_the_loader_takes_is_valid(tree, tmp_path):
    assert loads(tree, tmp_path)
    assert valid(tree)


def test_names_of_other_trainers_are_checked_as_the_keys_that_they_stand_for():
    resolved = load_config(None, [])[0].model_dump(mode="json")
    for name, key in {**ALIASES, **{key: key for key in known_keys()}}.items():
        value = resolved
        for step in key.split("."):
            value = value[step]
        assert valid({name: value}), name
        assert valid(nested(name, value)), name
        assert not valid({name: {"no": "value"}}), name


def test_editors_offer_no_names_of_other_trainers():
    assert list(SCHEMA["properties"]) == [
        "version", "preset", "model", "data", "lora", "ib", "train", "eval", "checkpoint", "runtime",
    ]  # fmt: skip
    assert SCHEMA["properties"]["preset"]["anyOf"][0] == {"enum": preset_names()}


def test_descriptions_are_the_docstrings_of_the_fields():
    ib = SCHEMA["$defs"]["IBConfig"]["properties"]
    assert ib["beta"]["description"] == "Weight of the prediction loss from z, within the bottleneck term."
    assert ib["layer"]["description"].startswith("Tapped decoder block")
    assert "title" not in ib["beta"]


def test_the_command_prints_it_or_writes_it(tmp_path):
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.stdout) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    file = tmp_path / "new" / "schema.json"
    assert CliRunner().invoke(app, ["schema", "-o", str(file)]).exit_code == 0
    assert file.read_text(encoding="utf-8") == printed.stdout
    refused = CliRunner().invoke(app, ["schema", "-o", str(tmp_path)])
    assert (refused.exit_code, refused.stderr.count("\n")) == (3, 1)
    assert str(tmp_path) in refused.stderr
