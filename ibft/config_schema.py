"""`ibft-fast schema`: the configuration as a JSON Schema (draft 2020-12), for completion and checks in an editor.

It is pydantic's own schema of `ibft.config.Config`, with the docstring below each field as its description, and then
takes what `ibft.load_config` takes beyond it: a section that is left empty, values that validators read otherwise, and
names of other trainers or dotted keys at the top. Those names are patterns, which editors accept and do not offer. What
settings demand of one another only a run checks.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ibft.config import Config
from ibft.load_config import ALIASES, preset_names
from ibft.output import to_stdout

Schema = dict[str, Any]
DRAFT = GenerateJsonSchema.schema_dialect
EXPONENT = r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"
LAYERS = r"^\s*[0-9]+\s*(,\s*[0-9]+\s*)+$"


class _Untitled(GenerateJsonSchema):
    """Editors show a title before the description, and ours would be the key again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def run_schema(out: str | None) -> None:
    """Write the schema to a file, or to stdout.

    Raises:
        DataError: it cannot be written.
    """
    text = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    if out in (None, "-"):
        to_stdout(text)
        return
    from ibft.evaluation.score import write

    write(Path(os.path.expanduser(out)), text)


def plain_schema() -> Schema:
    """Of the configuration as it is meant to be written: typed values under their own keys."""
    schema = Config.model_json_schema(schema_generator=_Untitled)
    for section in (schema, *schema["$defs"].values()):
        del section["title"]
    schema["properties"]["preset"]["anyOf"] = [{"enum": preset_names()}, {"type": "null"}]
    return schema


def config_schema() -> Schema:
    """Of all that the loader takes; unknown keys are refused."""
    schema = plain_schema()
    where = dict(_places(schema, schema, "#", ""))
    for key, pointer in where.items():
        _take_texts(key, _at(schema, pointer))
    for name, section in schema["properties"].items():
        if reference := section.pop("$ref", None):
            schema["properties"][name] = {"anyOf": [{"$ref": reference}, {"type": "null"}]}
    for key, pointer in where.items():
        if "." in key:
            _take_name(schema, key, pointer)
    for alias, key in ALIASES.items():
        _take_name(schema, alias, where[key])
        section, _, name = alias.rpartition(".")
        if section:  # lora: {lora_alpha: 16}
            _take_name(_at(schema, schema["properties"][section]["anyOf"][0]["$ref"]), name, where[key])
    return {"$schema": DRAFT, "title": "ibft-fast"} | schema


def _take_texts(key: str, setting: Schema) -> None:
    """What validators and pydantic read of a text, a false or nothing."""
    alternatives = setting.get("anyOf", [setting])
    if any(alternative.get("type") == "number" for alternative in alternatives):
        _also(setting, {"type": "string", "pattern": EXPONENT})  # to YAML 1.1 1e-4 is a text
    if key == "ib.layer":
        _also(setting, {"type": "string", "pattern": LAYERS})
    elif key == "data.decontaminate":
        _also(setting, {"type": "string"}, {"enum": [None, False]})
    elif key == "lora.target_modules":
        name = f"({'|'.join(setting['items']['enum'])})"
        _also(setting, {"type": "string", "pattern": rf"^(all-linear|\s*{name}\s*(,\s*{name}\s*)*)$"})
    elif key == "train.mixed_precision":
        _also(setting, {"enum": ["no", False]})
    elif key == "train.report_to":
        name = f"({'|'.join([*setting['items']['enum'], 'none'])})?"
        _also(setting, {"type": "string", "pattern": rf"^\s*{name}\s*(,\s*{name}\s*)*$"}, {"enum": [None, False]})


def _also(setting: Schema, *alternatives: Schema) -> None:
    """Let `setting` be one of the alternatives too."""
    if "anyOf" not in setting:
        own = {key: setting.pop(key) for key in list(setting) if key not in ("default", "description")}
        setting["anyOf"] = [own]
    setting["anyOf"] += alternatives


def _take_name(section: Schema, name: str, pointer: str) -> None:
    section.setdefault("patternProperties", {})[f"^{re.escape(name)}$"] = {"$ref": pointer}


def _places(schema: Schema, section: Schema, where: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Every key, and where it is, as JSON Schema refers to it: ("ib.alpha", "#/$defs/IBConfig/properties/alpha")."""
    for name, setting in section["properties"].items():
        if reference := setting.get("$ref"):
            yield from _places(schema, _at(schema, reference), reference, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{where}/properties/{name}"


def _at(schema: Schema, pointer: str) -> Schema:
    for step in pointer.split("/")[1:]:
        schema = schema[step]
    return schema
