"""The tasks: the same each time, split without leaks, and told apart by their unit tests."""

import json
from typing import Any

import pytest

from ibft.tiny import SPLITS, task_file
from ibft.tiny.compose import Composition, all_compositions
from ibft.tiny.generator import SIZES, family_behaviours, probes, split, task_rows, write_tasks
from ibft.tiny.primitives import FAMILIES

ROWS = {name: [json.loads(line) for line in task_file(name).read_text().splitlines()] for name in SPLITS}
BY_KEY = {c.key: c for c in all_compositions()}
FIELDS = {"task_id", "instruction", "output", "entry_point", "test", "composition"}


def passes(function: Any, test: str) -> bool:
    """Whether `function` passes a row's `check`. Only the project's own reference functions come here."""
    namespace: dict[str, Any] = {}
    exec(test, namespace)
    try:
        namespace["check"](function)
    except Exception:  # a wrong function may fail in any way
        return False
    return True


def test_bundled_files_are_what_the_generator_makes(tmp_path):
    write_tasks(tmp_path)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == task_file(name).read_bytes(), name


def test_seed_decides_everything():
    assert task_rows(1) == task_rows(1)
    assert task_rows(1)["test"] != task_rows(2)["test"]
    assert [c.key for c in split(1)["test"]] != [c.key for c in split(2)["test"]]


def test_rows_have_the_schema_and_sizes():
    for name in SPLITS:
        assert len(ROWS[name]) == SIZES[name]
        for number, row in enumerate(ROWS[name]):
            assert row.keys() == FIELDS
            assert row["task_id"] == f"tiny/{name}/{number}"
            assert row["entry_point"] in row["instruction"], "the name cannot be guessed"
            assert row["output"].startswith(f"def {row['entry_point']}(")
            assert "{" not in row["instruction"], "an unfilled template"


def test_splits_are_disjoint_and_the_pool_holds_none_of_them():
    sets = {name: {c.key for c in members} for name, members in split().items()}
    assert {name: len(sets[name]) for name in SIZES} == SIZES
    assert sum(map(len, sets.values())) == len(set.union(*sets.values()))
    for name in SPLITS:
        assert {row["composition"] for row in ROWS[name]} == sets[name]


@pytest.mark.parametrize("source", ["train", "pool"])
def test_each_block_of_the_test_tasks_is_known(source):
    def blocks(name: str) -> set[tuple[str, str, str]]:
        parts = ((c.family.name, c.filter.key, c.map.key, c.fold.key) for c in split()[name])
        return {(family, kind, key) for family, *keys in parts for kind, key in zip("fmr", keys, strict=True)}

    assert blocks("test") <= blocks(source)


def test_every_reference_passes_its_own_tests():
    for row in (row for name in SPLITS for row in ROWS[name]):
        namespace: dict[str, Any] = {}
        exec(row["output"], namespace)
        assert passes(namespace[row["entry_point"]], row["test"]), row["task_id"]


def test_every_other_composition_of_the_family_fails():
    functions = {
        family.name: {b.composition.key: b.composition.function() for b in family_behaviours(family)[1]}
        for family in FAMILIES
    }
    for row in ROWS["test"]:
        alive = [key for key, f in functions[row["composition"].split(":")[0]].items() if passes(f, row["test"])]
        assert alive == [row["composition"]], row["task_id"]


def test_loop_and_one_line_mean_the_same():
    for composition in all_compositions():
        namespace: dict[str, Any] = {}
        exec(composition.loop("loop", "data", "x", note="a note"), namespace)
        one_line = composition.function()
        for value in probes(composition.family.probe)[:20]:
            assert namespace["loop"](value) == one_line(value), composition.key


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("numbers:even|square|sum", [1, 2, -4, 5], 20),
        ("numbers:negative|half|min", [-3, 8, -10], -5),
        ("numbers:all|same|max", [], 0),
        ("numbers:end5|same|backward", [5, -15, 51, 25], [25, -15, 5]),
        ("digits:odd|triple|product", -3123, 243),
        ("digits:all|complement|list", 907, [0, 9, 2]),
        ("words:vowel|upper|dash", "an old Kiwi is", "AN-OLD-IS"),
        ("words:all|length|distinct", "a bb cc ddd", 3),
        ("chars:novowel|next|join", "abe z", "c!{"),
        ("chars:upper|code|sum", "aAbB", 131),
        ("number_keys:all|ten|top2", [1, 12, 30, 9], [9, 12]),
        ("number_keys:odd|mod4|tally", [1, 5, 3, 2], {1: 2, 3: 1}),
        ("word_keys:has_a|final|group", ["cat", "bat", "a", "dog"], {"t": ["cat", "bat"], "a": ["a"]}),
        ("word_keys:capital|length|best", ["Ab", "Abc", "abcd"], "Abc"),
    ],
)
def test_functions_against_values_worked_out_by_hand(key, value, expected):
    assert BY_KEY[key].function()(value) == expected


def test_the_corpus_shows_only_the_pool(monkeypatch):
    from ibft.tiny import corpus

    shown: list[Composition] = []
    real = corpus.document

    def spy(composition, rng, share):
        shown.append(composition)
        return real(composition, rng, share)

    monkeypatch.setattr(corpus, "document", spy)
    stream = corpus.documents(seed=3, instruction_share=0.5)
    texts = [next(stream) for _ in range(3000)]
    held_out = {row["composition"] for name in SPLITS for row in ROWS[name]}
    assert 2000 < len(shown) < len(texts), "the rest only calls functions"
    assert not held_out & {c.key for c in shown}
    assert not {row["instruction"] for name in SPLITS for row in ROWS[name]} & {t.split("\n")[0] for t in texts}
    for text in texts:
        if text.startswith("from tools"):
            names = text.split("\n")[0].removeprefix("from tools import ").split(", ")
            assert all(f"print({name}(" in text for name in names), "every name is copied"
        compile(text if text.startswith(("def ", "#", "from tools")) else text.split("\n", 1)[1], "document", "exec")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="got 'tests', expected one of train, validation, test"):
        task_file("tests")
    with pytest.raises(ValueError, match="got 'floats', expected int, ints, words or text"):
        probes("floats")
