"""Verdicts on Python programs: what passes, what fails and for which reason, by both rules."""

import datetime
import decimal
import json
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.sources import load_rows
from ibft.errors import DataError
from ibft.evaluation.judge import judge_tasks, make_judge
from ibft.evaluation.python_judge import Job, Verdict, free_names, job_of, judge_python
from ibft.evaluation.sandbox import INSIDE, Sandbox, find_tier
from ibft.evaluation.suites import SUITES

sys.path.insert(0, str(INSIDE))
import wire

sys.path.remove(str(INSIDE))
PASSED = Verdict(True, "passed")


def sandbox() -> Sandbox:
    return Sandbox(find_tier(allow_limits=True))


def official(program: str, timeout: float = 5.0) -> Verdict:
    return judge_python(sandbox(), Job(program, "", "", "", []), "official", timeout)


def strict(program: str, test: str, timeout: float = 5.0) -> Verdict:
    task = {"task_id": "t", "entry_point": "f", "test": f"def check(candidate):\n    {test}\n"}
    return judge_python(sandbox(), job_of("jsonl-tests", task, program), "strict", timeout)


@pytest.mark.parametrize(
    "program",
    [
        "print('out')\nimport sys; print('err', file=sys.stderr)",
        "print('x' * 10**7)",  # output goes nowhere: it neither fills a pipe nor counts as a file
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 0\nassert A().x == 0",
        "from __future__ import annotations\nimport json, re, math, collections, typing",
        "open('a.txt', 'w').write('x'); assert open('a.txt').read() == 'x'",
        "assert 'é' == '\\u00e9'",
        "if __name__ == '__main__':\n    raise ValueError('scripts are not run as main')",
        "import threading, time, sys\nsys.stdout.close()",
        "import sys\nassert sys.flags.isolated and not any('site-packages' in path for path in sys.path), sys.path",
    ],
)
def test_passes_officially(program):
    assert official(program) == PASSED


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("x = (", "failed: SyntaxError: '(' was never closed (<candidate>, line 1)"),
        ("x = '\0'", "failed: SyntaxError: source code string cannot contain null bytes"),
        ("\ud800", "failed: not UTF-8 text: surrogates not allowed"),
        ("import sys\nsys.exit(0)", "failed: SystemExit: 0"),
        ("import os\nos._exit(0)", "left before its test had returned (exit 0)"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("def f(): f()\nf()", "failed: RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "failed: E"),
        ("raise ValueError('x' * 999)", ("failed: ValueError: " + "x" * 999)[:300]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
    ],
)
def test_fails_officially_with_its_reason(program, result):
    assert official(program) == Verdict(False, result)


def test_timeouts():
    assert official("while True: pass", timeout=0.5) == Verdict(False, "timed out")
    assert strict("def f(x):\n    while True: pass", "candidate(1)", timeout=0.5) == Verdict(False, "timed out")
    assert strict("def f(x): return 1", "while True: pass", timeout=0.5) == Verdict(False, "timed out")


def raises(what: str) -> str:
    return f"\n    try: candidate(1)\n    except {what}\n    else: assert False"


RIGHT = [
    ("def f(x):\n    x.append(4)\n    x[0] = {'a': 1}", "y = [1]; candidate(y); assert y == [{'a': 1}, 4]"),
    ("def f(x):\n    x[0].sort()", "y = [[3, 1]]; z = y[0]; candidate(y); assert z == [1, 3] and y[0] is z"),
    ("def f(x):\n    x.pop('a'); x['b'] = 2", "y = {'a': 1}; candidate(y); assert y == {'b': 2}"),
    ("def f(x):\n    x.discard(1)", "y = {1, 2}; candidate(y); assert y == {2}"),
    ("def f(x, *, k=1):\n    return x * k", "assert candidate(2, k=3) == 6"),
    ("def f(x):\n    yield from range(x)", "assert list(candidate(3)) == [0, 1, 2]"),
    ("def f(x):\n    return map(str, range(x))", "assert list(candidate(2)) == ['0', '1']"),
    ("def f(x):\n    return {'a': 1}.keys()", "assert candidate(1) == {'a'}"),
    ("def f(x):\n    return 10 ** 5000", "assert candidate(1) == 10 ** 5000"),
    ("def f(x):\n    return float('nan'), -0.0", "a, b = candidate(1); assert a != a and str(b) == '-0.0'"),
    ("def f(x):\n    raise ValueError('no')", raises("ValueError as e: assert str(e) == 'no'")),
    ("class E(KeyError): pass\ndef f(x):\n    raise E('no')", raises("KeyError: pass")),
    ("def f(x):\n    return lambda y: x + y", "assert candidate(1)(2) == 3"),
    ("f = lambda x: x", "assert candidate(1) == 1"),
    ("from functools import lru_cache\n@lru_cache\ndef f(x):\n    return x", "assert candidate(1) == 1"),
    ("n = 0\ndef f(x):\n    global n\n    n += 1\n    return n", "assert [candidate(0), candidate(0)] == [1, 2]"),
    ("def f(x):\n    return 1, [2, (3,)], {4}, b'5', None", "assert candidate(1) == (1, [2, (3,)], {4}, b'5', None)"),
    ("def f(x):\n    return '\\ud800', 1j", "assert candidate(1) == ('\\ud800', 1j)"),
    ("def f(x):\n    return True", "assert candidate(1) is True"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "test"), RIGHT)
def test_honest_programs_pass_strictly(program, test):
    assert strict(program, test) == PASSED


@pytest.mark.parametrize(
    ("program", "test", "result"),
    [
        ("def f(x): return x", "assert candidate(2) == 3, 'no'", "failed: AssertionError: no"),
        ("def g(x): return x", "candidate(2)", "failed: NameError: name 'f' is not defined"),
        ("x = (", "candidate(2)", "failed: SyntaxError: '(' was never closed (<candidate>, line 1)"),
        ("def f(x): return [x]", "assert candidate(2) == (2,)", "failed: AssertionError: "),
        (
            "class A: pass\ndef f(x): return A()",
            "candidate(2)",
            "failed: it returned a value of type A, which the test cannot be given",
        ),
        (
            "def f(x): return x",
            "candidate(lambda: 1)",
            "failed: the test passes a value of type function, which the candidate cannot be given",
        ),
        ("class E(Exception): pass\ndef f(x): raise E('no')", "candidate(2)", "failed: E: no"),
        ("def f(x): return x", "undefined", "failed: NameError: name 'undefined' is not defined"),
        (
            "import sys\ndef f(x): sys.exit(0)",
            "\n    try: candidate(1)\n    except Exception: pass",
            "failed: SystemExit: 0",
        ),
        (
            "import os\ndef f(x): os._exit(0)",
            "\n    try: candidate(1)\n    except Exception: pass",
            "failed: it left before its test had returned",
        ),
        ("\ud800", "candidate(1)", "failed: not UTF-8 text: surrogates not allowed"),
    ],
)
def test_fails_strictly_with_its_reason(program, test, result):
    assert strict(program, test) == Verdict(False, result)


@pytest.mark.parametrize(
    "frame", [b"", b"\0\0\0\5", b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1x", b'\0\0\0\x0f{"value": ["x"]}']
)
def test_forged_answers_are_no_pass(frame):
    """The candidate writes to its answers itself, before and instead of the answer."""
    program = f"""
import os
def f(x):
    for fd in range(3, 9):
        try: os.write(fd, {frame!r})
        except OSError: pass
    os._exit(0)
"""
    assert not strict(program, "assert candidate(2) == 3").passed


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
keys = st.booleans() | st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda each: (
        st.lists(each, max_size=4) | st.dictionaries(keys, each, max_size=4) | st.sets(keys, max_size=4)
        | st.tuples(each, each)
    ),
    max_leaves=12,
)  # fmt: skip


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a) and all(map(same, a, b))
    return a == b and repr(a) == repr(b) if isinstance(a, float | complex) else a == b


@given(values)
def test_plain_data_crosses_as_it_is(value):
    assert same(wire.decode(json.loads(json.dumps(wire.encode(value)))), value)


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Point(1, 2), (1, 2)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (deque([1, 2]), deque([1, 2])),
        (range(1, 9, 2), range(1, 9, 2)),
        (bytearray(b"x"), bytearray(b"x")),
        (frozenset({1}), frozenset({1})),
        (Fraction(1, 3), Fraction(1, 3)),
        (decimal.Decimal("1.10"), decimal.Decimal("1.10")),
        (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2)),
        (datetime.datetime(2026, 1, 2, 3), datetime.datetime(2026, 1, 2, 3)),
        (datetime.time(3, 4), datetime.time(3, 4)),
    ],
)
def test_what_subclasses_and_others_arrive_as(value, arrives):
    found = wire.decode(wire.encode(value))
    assert found == arrives
    assert type(found) is type(arrives)


@pytest.mark.parametrize(
    "data", [[], ["x"], ["int"], ["int", "z"], ["dict", [1]], ["set", ["list"]], {"a": 1}, 1.5, ["callable", 0]]
)
def test_what_no_encoder_writes_is_refused(data):
    with pytest.raises(wire.Closed):
        wire.decode(data)


def test_names_that_a_test_takes_from_the_program():
    test = "assert f(g(1), len([])) == x\nfor i in range(3):\n    assert h(i)\nassert all(k(y) for y in [1])"
    assert sorted(free_names("import math\nx = 1", test)) == ["f", "g", "h", "k"]
    assert free_names("", "assert (") == []
    assert free_names("", "assert sum(1, 2) == len([1])", {"sum"}) == ["sum"]


MBPP = {
    "task_id": "2", "code": "def add(a, b):\n    return a + b", "test_setup_code": "import math", "test_imports": [],
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
}  # fmt: skip


@pytest.mark.parametrize("rule", ["official", "strict"])
def test_mbpp(rule):
    judge = make_judge(SUITES["mbpp"], rule, allow_limits=True)
    wrong = "def add(a, b):\n    return 3"
    assert [v.passed for v in judge.all([(MBPP, MBPP["code"]), (MBPP, wrong), (MBPP, "")])] == [True, False, False]


def test_mbpp_functions_named_like_pythons_own():
    """The program's, where the problem asks for it; no other: a program's own `len` does not measure its answer."""
    problem = {
        "task_id": "1",
        "code": "def sum(a, b):\n    return a + b",
        "test_list": ["assert sum(1, 2) == len('abc')"],
    }
    judge = make_judge(SUITES["mbpp"], "strict", allow_limits=True)
    cheat = "def sum(a, b):\n    return 0\ndef len(x):\n    return 0"
    assert [v.passed for v in judge.all([(problem, problem["code"]), (problem, cheat)])] == [True, False]


TASK = {"task_id": "t/0", "entry_point": "f", "test": "def check(candidate):\n    assert candidate(2) == 3"}


def test_tasks_of_a_training_run():
    completions = ["def f(x):\n    return x + 1", "def f(x):\n    return x", "def g(x):\n    return x + 1", ""]
    verdicts = judge_tasks([TASK] * 4, completions, allow_limits=True)
    assert [v.passed for v in verdicts] == [True, False, False, False]
    assert verdicts[2].result == "failed: NameError: name 'f' is not defined"
    assert judge_tasks([], [], allow_limits=True) == []


def test_tasks_refused():
    with pytest.raises(ValueError, match="completions: got 1, expected one for each of 2 tasks"):
        judge_tasks([TASK] * 2, [""])
    with pytest.raises(DataError, match=r"task 2 \(t/1\): lacks the text fields entry_point, test"):
        judge_tasks([TASK, {"task_id": "t/1", "test": 3}], ["", ""])


def test_verdicts_come_in_order():
    judge = make_judge(SUITES["jsonl-tests"], "official", jobs=4, allow_limits=True)
    pairs = [(TASK, f"import time\ntime.sleep({i % 3 / 20})\ndef f(x): return {2 + i % 2}") for i in range(12)]
    assert [v.passed for v in judge.all(pairs)] == [bool(i % 2) for i in range(12)]


def test_settings_out_of_range():
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout: got"):
            make_judge(SUITES["jsonl-tests"], "strict", timeout=timeout)
    with pytest.raises(ValueError, match="jobs: got 0"):
        make_judge(SUITES["jsonl-tests"], "strict", jobs=0)


@pytest.mark.parametrize("rule", ["official", "strict"])
def test_human_eval_reference_solutions_all_pass(human_eval, rule):
    tasks = load_rows(human_eval)
    judge = make_judge(SUITES["humaneval"], rule, timeout=20, allow_limits=True)
    right = judge.all([(task, task["canonical_solution"]) for task in tasks])
    assert [task["task_id"] for task, v in zip(tasks, right, strict=True) if not v.passed] == []
    few = tasks[::8]
    assert sum(v.passed for v in judge.all([(task, "    pass\n") for task in few])) == 0


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "ibft/tiny/tasks").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_the_bundled_tasks_reference_solutions_pass(file):
    tasks = load_rows(str(file))[:24]
    verdicts = judge_tasks(tasks, [task["output"] for task in tasks], allow_limits=True)
    assert [task["task_id"] for task, v in zip(tasks, verdicts, strict=True) if not v.passed] == []
