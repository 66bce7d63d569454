"""Every setting in words: what `docs/config.md` and the files of `ibft-fast init` say of a key.

`python -m ibft.config_reference > docs/config.md`. All of it is read from `ibft.config` (types, bounds, defaults, the
docstring below each field) and from `ibft.load_config` (names of other trainers), so that nothing is said twice.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ibft.config_schema import Schema, plain_schema
from ibft.load_config import ALIASES

INTRODUCTION = """\
# Settings

Made from `ibft/config.py` by `python -m ibft.config_reference > docs/config.md`.

A setting is a key of a section in a YAML file, or `section.key=value` on the command line:
`ibft-fast train my.yaml ib.alpha=0.2`. Each source overrides the one before: the defaults below; the settings of the
bundled model (the preset `tiny`), only where that model is trained; a preset; the file; the command line. An unknown
key is refused. `ibft-fast init` writes a file with all of them, `ibft-fast schema` a JSON Schema for editors.

The last column has the names by which other trainers know a setting. They are taken too, and the run says so.
"""


@dataclass(frozen=True)
class Setting:
    """key: with its section, as "ib.alpha". values: what it takes, in words. default: as JSON has it. meaning: its
    docstring in one line, "" where it has none."""

    key: str
    values: str
    default: Any
    meaning: str

    @property
    def section(self) -> str:
        """Its first part: "data" of "data.fields.prompt"; "" of a key that is in no section."""
        return self.key.partition(".")[0] if "." in self.key else ""


def settings() -> list[Setting]:
    """All of them, in the order of `ibft.config`."""
    schema = plain_schema()
    return list(_settings(schema, schema["$defs"], ""))


def _settings(section: Schema, sections: Schema, prefix: str) -> Iterator[Setting]:
    for name, schema in section["properties"].items():
        if "$ref" in schema:
            yield from _settings(sections[schema["$ref"].rpartition("/")[2]], sections, f"{prefix}{name}.")
        else:
            meaning = " ".join(schema.get("description", "").split())
            yield Setting(prefix + name, joined(values(schema)), schema.get("default"), meaning)


def values(schema: Schema) -> list[str]:
    """What a JSON Schema takes, each alternative in words."""
    if "anyOf" in schema:
        return [words for alternative in schema["anyOf"] for words in values(alternative)]
    if "enum" in schema or "const" in schema:
        return [spelled(value) for value in schema.get("enum", [schema.get("const")])]
    match schema["type"]:
        case "boolean":
            return ["true", "false"]
        case "null":
            return ["null"]
        case "string":
            return ["text"]
        case "array":
            return [f"a list of: {joined(values(schema['items']))}"]
        case "integer":
            return ["a whole number" + bounds(schema)]
        case "number":
            return ["a number" + bounds(schema)]
    raise AssertionError(schema)


def bounds(schema: Schema) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[name]}" for name, word in words.items() if name in schema)


def joined(alternatives: list[str]) -> str:
    *others, last = alternatives
    if not others:
        return last
    comma = "," if any(" " in words for words in alternatives) else ""
    return f"{', '.join(others)}{comma} or {last}"


def spelled(value: Any) -> str:
    """As YAML has it, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def reference() -> str:
    """docs/config.md."""
    other_names: dict[str, list[str]] = {}
    for alias, key in ALIASES.items():
        other_names.setdefault(key, []).append(alias)
    parts = [INTRODUCTION]
    for section, members in groupby(settings(), lambda setting: setting.section):
        rows = [
            (
                f"`{setting.key}`",
                setting.values,
                f"`{spelled(setting.default)}`",
                setting.meaning,
                ", ".join(f"`{alias}`" for alias in other_names.get(setting.key, [])),
            )
            for setting in members
        ]
        head = [("key", "values", "default", "meaning", "other names"), ("---",) * 5]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in head + rows)
        parts.append(f"## {section or 'top of the file'}\n\n{table}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
