"""`ibft-fast decontaminate`: rows against problems, what it prints and writes, and what a training run drops by it."""

import json
import os
import re
from pathlib import Path

import pytest

from ibft.data.decontaminate import Against, read_against, rows_to_drop, run_decontaminate, texts_of
from ibft.data.ids import choose_numbers, hash_rows
from ibft.data.overlap import Source
from ibft.data.sources import load_rows
from ibft.errors import ConfigError, DataError
from ibft.evaluation.suites import SUITES

TASK = "Given a list of temperatures, return how many days it takes until a warmer one comes, for each day."  # 19 words
CODE = (
    "    stack = []\n    for day, t in enumerate(ts):\n        while stack and ts[stack[-1]] < t:\n            pass\n"
)
PROBLEM = {
    "task_id": "HumanEval/7",
    "prompt": f'def warmer(ts):\n    """ {TASK} """\n',
    "entry_point": "warmer",
    "canonical_solution": CODE,
    "test": "def check(candidate): assert candidate([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [1, 1, 1, 1, 1, 1, 1, 1, 0]",
}
CLEAN = {"instruction": "Name a colour.", "output": "Blue."}
ROWS = [
    CLEAN,
    {"instruction": TASK.upper(), "output": "..."},
    {
        "messages": [
            {"role": "user", "content": "Help"},
            {"role": "assistant", "content": f"```\ndef f(ts):\n{CODE}```"},
        ]
    },
    {"output": "Blue.", "instruction": "Name a colour."},
    {"instruction": " ".join(TASK.split()[:12]), "output": PROBLEM["test"]},
    CLEAN,
    {"instruction": TASK.upper(), "output": "..."},
]


def save(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return save(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def suite(tmp_path):
    return "humaneval=" + save(tmp_path / "problems.jsonl", [PROBLEM])


def test_the_file_says_which_rows_to_drop_and_why_and_training_takes_it(data, suite, tmp_path):
    out = tmp_path / "new" / "drop.json"
    run_decontaminate(data, [suite], out=str(out))
    task = "given a list of temperatures return how many days it takes until a"
    assert json.loads(out.read_text()) == {
        "kind": "ibft-fast overlap",
        "data": data,
        "split": "train",
        "data_sha256": hash_rows(ROWS),
        "rows": 7,
        "n": 13,
        "against": [suite],
        "ids": [1, 2, 3, 5, 6],
        "overlaps": [
            {"row": 1, "against": suite, "problem": "HumanEval/7", "where": "prompt", "words": task},
            {
                "row": 2, "against": suite, "problem": "HumanEval/7", "where": "solution",
                "words": "stack for day t in enumerate ts while stack and ts stack 1",
            },
            {"row": 6, "against": suite, "problem": "HumanEval/7", "where": "prompt", "words": task},
        ],
        "duplicates": [[0, 3, 5], [1, 6]],
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["drop.json"]
    assert choose_numbers(ROWS, data, keep=None, drop=str(out)) == [0, 4]


def test_it_prints_counts_examples_and_duplicates(data, suite, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    run_decontaminate(data, [suite])
    said = capsys.readouterr().out
    assert re.search(r"problems +found +prompt rows +solution rows *\n", said)
    assert re.search(r"humaneval=problems.jsonl +1 +1 +2 +1 *\n", said)
    assert "  row 1, HumanEval/7, prompt: given a list of temperatures return how many days it takes until a\n" in said
    assert "duplicates: 2 groups of equal rows, 3 rows besides the first of each\n  rows 0, 3, 5\n  rows 1, 6\n" in said
    assert "to drop: 5 of 7 rows (3 contaminated, 3 equal to an earlier one)" in said


def test_examples_are_cut_to_the_width(data, suite, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    run_decontaminate(data, [suite])
    example = "  row 1, HumanEval/7, prompt: given a list of temperatures …"
    assert len(example) == 60
    assert example in capsys.readouterr().out.splitlines()


def test_names_in_brackets_are_printed_as_they_are(tmp_path, capsys):
    rows = save(tmp_path / "rows[red].jsonl", [{"task_id": "[bold]x", "q": TASK}])
    run_decontaminate(rows, [rows])
    said = capsys.readouterr().out
    assert "row 0, [bold]x, text: given a list" in said
    assert said.count("rows[red].jsonl") == 3


def test_problems_that_cannot_be_looked_for_are_told(tmp_path, capsys):
    short = [PROBLEM | {"task_id": f"p{i}", "canonical_solution": "    return sorted(x)"} for i in range(4)]
    del short[0]["canonical_solution"]
    run_decontaminate(
        save(tmp_path / "rows.jsonl", ROWS), ["humaneval=" + save(tmp_path / "short.jsonl", short)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "short.jsonl: not looked for: 4 solutions with fewer than 8 words" in said
    assert "short.jsonl: not looked for: 4 prompts of which every run of words is in more than 3 problems" in said
    assert "(0 contaminated, 3 equal to an earlier one)" in said


def test_without_problems_only_equal_rows_are_looked_for(data, tmp_path, capsys):
    out = tmp_path / "drop.json"
    run_decontaminate(data, out=str(out))
    found = json.loads(out.read_text())
    assert (found["ids"], found["overlaps"], found["against"]) == ([3, 5, 6], [], [])
    assert "found:" not in capsys.readouterr().out


def test_nothing_to_drop_writes_no_file(suite, tmp_path, capsys):
    out = tmp_path / "drop.json"
    run_decontaminate(save(tmp_path / "clean.jsonl", [CLEAN, ROWS[4]]), [suite], out=str(out))
    assert not out.exists()
    assert "nothing to drop" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_written_over(data, suite, tmp_path):
    out = tmp_path / "drop.json"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*drop.json is there already"):
        run_decontaminate(data, [suite], out=str(out))
    assert out.read_text() == "mine"
    with pytest.raises(DataError, match=r"--out: .*: (Not a directory|File exists)"):
        run_decontaminate(data, [suite], out=str(out / "below.json"))


def test_a_write_that_fails_leaves_no_file(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"--out: .*drop.json: No space left on device"):
        run_decontaminate(data, out=str(tmp_path / "new" / "drop.json"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("humaneval=", "got humaneval=, expected a file after the ="),
        ("verilogeval-v1", "verilogeval-v1 needs a file: verilogeval-v1=PATH"),
        ("humanevl", "got humanevl, expected SUITE or SUITE=PATH"),
        ("humanevl=rows.jsonl", "got humanevl=rows.jsonl, expected SUITE or SUITE=PATH"),
        ("=rows.jsonl", "got =rows.jsonl, expected"),
        ("", "got nothing, expected"),
        ("x" * 5000, "expected SUITE or SUITE=PATH"),
    ],
)
def test_a_malformed_entry_is_refused_before_anything_is_read(entry, said):
    with pytest.raises(ConfigError, match=f"^--against: .*{said}"):
        run_decontaminate("no-such-file.jsonl", [entry])
    with pytest.raises(ConfigError, match=f"^data.decontaminate: .*{said}"):
        rows_to_drop(ROWS, [entry], option="data.decontaminate")


def test_entries_are_suites_suites_with_a_file_or_rows(tmp_path):
    odd = save(tmp_path / "a=b.jsonl", ROWS)
    entries = ["humaneval", "verilogeval-v1=v.jsonl", "owner/name", "rows.jsonl", odd, "bundled:tiny", "humaneval"]
    assert read_against(entries, "--against") == [
        Against("humaneval", SUITES["humaneval"], None),
        Against("verilogeval-v1=v.jsonl", SUITES["verilogeval-v1"], "v.jsonl"),
        *(Against(rows, None, rows) for rows in ("owner/name", "rows.jsonl", odd, "bundled:tiny")),
    ]


def test_missing_problems_are_one_clear_error(data, tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        run_decontaminate(data, [f"humaneval={tmp_path}/none.jsonl"])
    with pytest.raises(DataError, match=r"expected text under prompt, entry_point, test"):
        run_decontaminate(data, [f"humaneval={data}"])


@pytest.mark.parametrize(
    ("name", "problem", "prompts", "solution"),
    [
        ("mbpp", {"task_id": 11, "text": "ask", "code": "c", "test_list": ["a1", "a2"]}, ["ask", "a1\na2"], "c"),
        ("mbpp-plus", {"task_id": 2, "prompt": "ask", "code": "c", "test": "t", "test_list": ["a"]}, ["ask", "a"], "c"),
        ("gsm8k", {"question": "ask", "answer": "a"}, ["ask"], "a"),
        ("verilogeval-v1", {"prompt": "m", "test": "t", "canonical_solution": "s"}, ["m"], "s"),
        ("verilogeval-v2", {"prompt": "m", "test": "t", "ref": "r"}, ["m"], "r"),
        (
            "jsonl-tests",
            {"instruction": "ask", "input": "more", "output": "o", "entry_point": "f", "test": "t"},
            ["ask", "more"],
            "o",
        ),
    ],
)
def test_what_is_asked_and_the_solution_are_looked_for_and_tests_are_not(tmp_path, name, problem, prompts, solution):
    entry = f"{name}={save(tmp_path / 'p.jsonl', [problem])}"
    task_id = str(problem.get("task_id", f"{name}/1"))
    assert texts_of(read_against([entry], "--against")[0]) == [
        *((Source(entry, task_id, "prompt"), text) for text in prompts),
        (Source(entry, task_id, "solution"), solution),
    ]


def test_rows_are_looked_for_with_all_their_text(tmp_path):
    rows = [{"task_id": "a", "messages": [{"content": "one"}], "n": 3}, {"task_id": None, "x": "two"}, {"n": 1}]
    entry = save(tmp_path / "rows.jsonl", rows)
    assert texts_of(Against(entry, None, entry)) == [
        (Source(entry, "a", "text"), "one"),
        (Source(entry, "row 1", "text"), "two"),
        (Source(entry, "row 2", "text"), ""),
    ]
    assert texts_of(Against("bundled:tiny", None, "bundled:tiny"))[0][0].problem == "tiny/test/0"


def test_a_suite_given_twice_with_other_files_is_counted_and_named_apart(tmp_path):
    entries = []
    for name in "ab":
        (tmp_path / name).mkdir()
        problems = [PROBLEM | {"task_id": f"{name}{i}"} for i in range(3)]
        entries.append("humaneval=" + save(tmp_path / name / "p.jsonl", problems))
    drops = rows_to_drop(ROWS, entries, deduplicate=False)
    assert drops.contaminated == {1, 2, 6}
    assert drops.summary == f"of 7 rows 3 share words with {entries[0]}, {entries[1]}"


def test_a_training_run_can_drop_either_kind(suite):
    both = rows_to_drop(ROWS, [suite])
    assert (both.contaminated, both.duplicates) == ({1, 2, 6}, {3, 5, 6})
    assert both.summary == "of 7 rows 3 share words with humaneval=problems.jsonl and 3 are equal to an earlier one"
    only = rows_to_drop(ROWS, [suite], deduplicate=False)
    assert (only.contaminated, only.duplicates) == ({1, 2, 6}, set())
    assert only.summary == "of 7 rows 3 share words with humaneval=problems.jsonl"
    equal = rows_to_drop(ROWS, [])
    assert (equal.contaminated, equal.duplicates) == (set(), {3, 5, 6})
    assert equal.summary == "of 7 rows 3 are equal to an earlier one"


def test_rows_of_token_ids_are_said_not_to_be_compared(suite, tmp_path, capsys):
    rows = [{"input_ids": [5, 6], "id": 1}, {"input_ids": [5, 6], "id": 2}, ROWS[1]]
    drops = rows_to_drop(rows, [suite])
    assert (drops.contaminated, drops.duplicates) == ({2}, {1})
    assert drops.summary.endswith("; 2 are token ids, which cannot be compared with problems")
    assert "token ids" not in rows_to_drop(rows, []).summary
    assert "token ids" not in rows_to_drop(ROWS, [suite]).summary
    path = save(tmp_path / "ids.jsonl", rows)
    run_decontaminate(path, [suite])
    said = " ".join(capsys.readouterr().out.split())
    assert "note: 2 of 3 rows are token ids, which cannot be compared with problems: give the text" in said
    run_decontaminate(path)
    assert "token ids" not in capsys.readouterr().out


def test_a_pair_under_another_id_is_dropped(tmp_path, capsys):
    rows = [CLEAN | {"id": 1}, CLEAN | {"id": 2}, {"q": "x", "a": "y", "id": 3}, {"q": "x", "a": "y", "id": 4}]
    assert rows_to_drop(rows, []).duplicates == {1}
    fields = {"instruction": "q", "output": "a"}
    assert rows_to_drop(rows[2:], [], fields=fields).duplicates == {1}
    assert rows_to_drop(rows, [], whole=True).duplicates == set()
    run_decontaminate(save(tmp_path / "rows.jsonl", rows))
    told = capsys.readouterr().out
    assert "to drop: 1 of 4 rows" in told
    assert "contamination was not looked for: name problems with --against" in told


def test_the_terminal_is_neither_steered_nor_too_poor(data, tmp_path):
    from typer.testing import CliRunner

    from ibft.cli import app

    problems = save(tmp_path / "p.jsonl", [{"task_id": "a\x1b[31m数", "q": TASK}])
    result = CliRunner(charset="ascii").invoke(app, ["decontaminate", "--data", data, "--against", problems])
    assert (result.exit_code, result.exception) == (0, None)
    assert "  row 1, a\\x1b[31m?, text: given a list" in result.output


def test_more_words_find_less(suite):
    assert rows_to_drop(ROWS, [suite], 12).contaminated == {1, 2, 4, 6}
    assert rows_to_drop(ROWS, [suite], 20).contaminated == {2}  # the solution has 15 words: whole
    with pytest.raises(ConfigError, match="--n: got 7, expected 8 or more"):
        rows_to_drop(ROWS, [suite], 7)


def test_the_bundled_rows_have_splits(suite, capsys):
    run_decontaminate("bundled:tiny", [suite], split="validation")
    assert "(0 contaminated" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--split: got none, expected train, validation, test"):
        run_decontaminate("bundled:tiny", [suite], split="none")


# --- published data -------------------------------------------------------------------------------


def test_codealpaca_shares_with_humaneval_the_prime_loop_and_two_tasks(shared_data):
    rows = load_rows(str(shared_data / "new_codealpaca.jsonl.gz"))
    drops = rows_to_drop(rows, [f"humaneval={shared_data}/HumanEval.jsonl.gz"])
    prime, heron, gcd = {713, 882, 1895, 2425, 3232, 4036, 4374}, {3756}, {4032}
    assert drops.contaminated == prime | heron | gcd
    assert drops.duplicates == set()


def test_a_planted_humaneval_solution_is_found_in_codealpaca(shared_data):
    rows = load_rows(str(shared_data / "new_codealpaca.jsonl.gz"))
    problem = load_rows(str(shared_data / "HumanEval.jsonl.gz"))[3]
    against = [f"humaneval={shared_data}/HumanEval.jsonl.gz"]
    before = rows_to_drop(rows, against).contaminated
    assert 100 not in before
    rows[100] = rows[100] | {
        "output": "Sure!\n" + problem["canonical_solution"].replace("    ", "\t").replace(":", " :")
    }
    rows.append({"text": problem["prompt"]})
    assert rows_to_drop(rows, against).contaminated == before | {100, len(rows) - 1}


def test_both_halves_of_verilogeval_hold_the_same_problems(shared_data):
    """So they overlap where their solutions are long enough: of Machine's 143 all but six."""
    rows = load_rows(str(shared_data / "VerilogEval_Machine.jsonl.gz"))
    drops = rows_to_drop(rows, [f"verilogeval-v1={shared_data}/VerilogEval_Human.jsonl.gz"])
    assert len(drops.contaminated) == 137
