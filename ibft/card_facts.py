"""What a model card takes from result.json and manifest.json: what is such as a run writes it, and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

PARTS = {"ce": "CE", "kl": "KL", "ce_z": "CE_z", "active_dims": "share of latent dimensions in use"}


def number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 2**63


def layer(value: Any) -> bool:
    return count(value) or (isinstance(value, list | tuple) and all(map(count, value)))


def text(value: Any) -> bool:
    return isinstance(value, str)


def anything(value: Any) -> bool:
    return value is not None


Shape = Callable[[Any], bool] | list["Shape"] | dict[str, "Shape"]
SOLVED: dict[str, Shape] = {"passed": number, "tasks": count, "value": number}
RESULT: Shape = {
    "steps": number, "eval_ce": [number], "last": dict.fromkeys(PARTS, number),
    "pass_at_1": {"before": SOLVED, "after": SOLVED}, "warnings": [anything],
}  # fmt: skip
MANIFEST: Shape = {
    "data_sha256": text, "ib_layer": layer, "dtype": text, "commit": text, "device": text, "processes": count,
    "versions": lambda value: isinstance(value, Mapping),
}  # fmt: skip


def sound(facts: Any, shape: Shape) -> Any:
    """Of a mapping the keys that the shape has, with sound values; a list if all in it is sound; else None."""
    if isinstance(shape, dict):
        named = facts if isinstance(facts, Mapping) else {}
        kept = {key: value for key, each in shape.items() if (value := sound(named.get(key), each)) is not None}
        return kept or None
    if isinstance(shape, list):
        every = [sound(value, shape[0]) for value in facts] if isinstance(facts, list | tuple) else [None]
        return None if None in every else every
    return facts if shape(facts) else None
