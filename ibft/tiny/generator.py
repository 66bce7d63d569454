"""Makes the bundled programming tasks: `python -m ibft.tiny.generator --out DIR`.

Every task is a distinct composition of known blocks (`primitives`), told apart from *every other* function of its
family by its unit tests. The compositions fall into four disjoint sets, the same for the same seed:

    train, validation, test    the task files; test compositions occur nowhere else
    pool                       what the base model was pretrained on (`corpus`); no task composition is in it

so that a model can know each block and still never have seen a test task's combination. Pure standard library.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .compose import Composition, compositions, function_name
from .primitives import FAMILIES, Family

SEED = 2510
SIZES = {"train": 516, "validation": 66, "test": 128}
_PROBES = 96
_MAX_TESTS = 12

_TEMPLATES = (
    "Write a Python function {name} that takes {given} and returns {noun}.",
    "Write a function called {name}. It gets {given} and must {order}.",
    "Define {name} for {given}: {order}.",
    "Given {given}, {order}. Name the function {name}.",
    "I need a Python function named {name} which returns {noun}.",
    "Implement {name}: from {given}, {order}.",
)
_VOCABULARY = [
    "level", "apple", "Otter", "sees", "banana", "Is", "cats", "radar", "a", "trees", "ant", "Egg", "moms",
    "KAYAK", "Anna", "noon", "bus", "as", "Kiwi", "grass", "eel", "oxen", "Xylo", "civic", "uncle", "dogs", "fly",
    "It", "ROTOR", "tea", "42", "7up", "b2b", "atlas", "stats",
]  # fmt: skip


@dataclass(frozen=True)
class Behaviour:
    """A composition and the `repr` of its value on each probe of its family."""

    composition: Composition
    values: tuple[str, ...]


def probes(kind: str) -> list[Any]:
    """The inputs on which functions are compared: edge cases first, then random ones (the same at each call)."""
    rng = random.Random(f"{SEED}-{kind}")
    if kind == "int":
        return [0, 7, -35, 100, 9999, 30201, *(rng.randint(-(10 ** rng.randint(2, 9)), 10**9) for _ in range(_PROBES))]
    if kind == "ints":
        lists = [[rng.randint(-25, 40) for _ in range(rng.randint(2, 9))] for _ in range(_PROBES)]
        lists += [[rng.randint(-7, 12) for _ in range(rng.randint(4, 10))] for _ in range(_PROBES)]
        return [[], [0], [-4], [5, 5, 5], [3, -3, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], *lists]
    words = [rng.sample(_VOCABULARY, rng.randint(2, 7)) for _ in range(2 * _PROBES)]
    for row in words[::3]:
        row.append(row[0])
    if kind == "words":
        return [[], ["a"], ["Noon", "noon"], *words]
    if kind == "text":
        return ["", "a", "Anna sees 3 cats", "AEIOU xyz 00", *(" ".join(row) for row in words)]
    raise ValueError(f"kind: got {kind!r}, expected int, ints, words or text")


def distinct(candidates: Iterable[Composition], inputs: list[Any]) -> list[Behaviour]:
    """Those compositions that differ on some input from each one before them (the plainer writing comes first)."""
    seen: dict[tuple[str, ...], Behaviour] = {}
    for composition in candidates:
        function = composition.function()
        values = tuple(repr(function(value)) for value in inputs)
        if len(set(values)) > 3:  # a function that is nearly constant is no task
            seen.setdefault(values, Behaviour(composition, values))
    return list(seen.values())


def choose_tests(target: int, behaviours: list[Behaviour], alike: list[dict[str, int]]) -> list[int]:
    """Indices of few inputs, the first three edge cases among them, on which no other behaviour equals `target`'s.

    Greedy set cover: each round takes the input that leaves the fewest others alive.

    Args:
        target: index of the behaviour to tell from all others.
        behaviours: the distinct behaviours of one family.
        alike: for each input, which behaviours give a value, as the bits of an integer (`index_values`).
    """
    values = behaviours[target].values
    chosen, alive = [0, 1, 2], -1
    for p in chosen:
        alive &= alike[p][values[p]]
    while alive != 1 << target:
        best = min(range(len(values)), key=lambda p: (alive & alike[p][values[p]]).bit_count())
        if best in chosen or len(chosen) >= _MAX_TESTS:
            raise ValueError(f"{behaviours[target].composition.key}: no {_MAX_TESTS} tests tell it from all others")
        chosen.append(best)
        alive &= alike[best][values[best]]
    return chosen


def index_values(behaviours: list[Behaviour]) -> list[dict[str, int]]:
    """For each input, a map from a value to the behaviours that give it: bit i stands for `behaviours[i]`."""
    alike: list[dict[str, int]] = [{} for _ in behaviours[0].values]
    for i, behaviour in enumerate(behaviours):
        for groups, value in zip(alike, behaviour.values, strict=True):
            groups[value] = groups.get(value, 0) | 1 << i
    return alike


@cache
def family_behaviours(family: Family) -> tuple[list[Any], list[Behaviour]]:
    """A family's inputs and its distinct behaviours on them (1 second in all, hence kept)."""
    inputs = probes(family.probe)
    return inputs, distinct(compositions(family), inputs)


def split(seed: int = SEED) -> dict[str, list[Composition]]:
    """The four disjoint sets of compositions: train, validation, test, pool. Families are equally frequent in tasks."""
    rng = random.Random(seed)
    sets: dict[str, list[Composition]] = {name: [] for name in (*SIZES, "pool")}
    for number, family in enumerate(FAMILIES):
        members = [behaviour.composition for behaviour in family_behaviours(family)[1]]
        rng.shuffle(members)
        for name, size in SIZES.items():
            # a size that the families do not divide gives one more to the first of them
            share = size // len(FAMILIES) + (number < size % len(FAMILIES))
            sets[name] += members[:share]
            members = members[share:]
        sets["pool"] += members
    return sets


def instruction(composition: Composition, name: str, rng: random.Random) -> str:
    """One paraphrase of the task, naming the function that is wanted."""
    template = rng.choice(_TEMPLATES)
    return template.format(
        name=name,
        given=rng.choice(composition.family.given),
        noun=composition.describe(rng),
        order=composition.order(rng),
    )


def task_rows(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The rows of each split: task_id, instruction, output, entry_point, test (HumanEval's `check`), composition."""
    alike = {family.name: index_values(family_behaviours(family)[1]) for family in FAMILIES}
    position = {b.composition.key: i for family in FAMILIES for i, b in enumerate(family_behaviours(family)[1])}
    rng = random.Random(f"{seed}-text")
    rows: dict[str, list[dict[str, str]]] = {}
    for name, members in split(seed).items():
        if name not in SIZES:
            continue
        rng.shuffle(members)
        rows[name] = []
        for number, composition in enumerate(members):
            entry_point, target = function_name(rng), position[composition.key]
            inputs, behaviours = family_behaviours(composition.family)
            lines = [
                f"    assert candidate({inputs[p]!r}) == {behaviours[target].values[p]}"
                for p in choose_tests(target, behaviours, alike[composition.family.name])
            ]
            arg, variable = composition.family.args[0], composition.family.variables[0]
            rows[name].append(
                {
                    "task_id": f"tiny/{name}/{number}",
                    "instruction": instruction(composition, entry_point, rng),
                    "output": composition.one_line(entry_point, arg, variable),
                    "entry_point": entry_point,
                    "test": "\n".join(["def check(candidate):", *lines, ""]),
                    "composition": composition.key,
                }
            )
    return rows


def write_tasks(folder: Path, seed: int = SEED) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` under `folder` (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in task_rows(seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny task files.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .jsonl files")
    write_tasks(parser.parse_args().out)


if __name__ == "__main__":
    main()
