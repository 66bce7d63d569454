"""HumanEval+ and MBPP+ of EvalPlus. The problems here are made up, in the shapes of the files on the hub: many inputs
with their results, or with a second reference to call, compared by a function of the test's own that uses numpy."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ibft.errors import DataError, SetupError
from ibft.evaluation.judge import make_judge
from ibft.evaluation.judge_files import run_judge
from ibft.evaluation.prompts import STYLES, extract, make_prompt, stops_of
from ibft.evaluation.python_judge import Job, Verdict, judge_python
from ibft.evaluation.sandbox import INSIDE, Sandbox, why_not
from ibft.evaluation.suites import SUITES, load_problems, package_folders

sys.path.insert(0, str(INSIDE))
import wire

sys.path.remove(str(INSIDE))
RULES = ("official", "strict")
PASSED = Verdict(True, "passed")

COMPARE = """
import numpy as np


def is_floats(x) -> bool:
    if isinstance(x, np.ndarray):
        return x.dtype in (np.float32, np.float64)
    return all(isinstance(y, float) for y in x) if isinstance(x, (list, tuple)) else isinstance(x, float)


def assertion(out, exp, atol):
    same = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if atol != 0 and not same:
        {close}
    else:
        assert same
"""
HUMANEVAL = COMPARE.format(close="np.testing.assert_allclose(out, exp, atol=atol)")
MBPP = COMPARE.format(close="assert np.allclose(out, exp, rtol=1e-07, atol=atol)")
AS_SETS = """
def assertion(out, exp, atol):
    assert set(out) == set(exp)
"""
AS_TRUTH = """
def assertion(out, exp, atol):
    assert exp == (out if isinstance(out, bool) else out is not None)
"""


def humaneval(head, body, inputs, results, atol=0):
    """results None: the test holds a copy of the reference and calls it."""
    name = re.search(r"def (\w+)\(", head)[1]
    reference = f"{head}{body}".replace(f" {name}(", " ref_func(")
    if results is None:
        loop = f"for i, inp in enumerate(inputs):\n        assertion(candidate(*inp), ref_func(*inp), {atol})"
        test = f"{HUMANEVAL}\n\n{reference}\n\ndef check(candidate):\n    inputs = {inputs}\n    {loop}\n"
    else:
        loop = f"for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, {atol})"
        test = f"{HUMANEVAL}\n\ndef check(candidate):\n    inputs = {inputs}\n    results = {results}\n    {loop}\n"
    return {
        "task_id": f"HumanEval/{name}",
        "prompt": f'{head}    """ As the name says. """\n',
        "canonical_solution": body,
        "entry_point": name,
        "test": test,
    }


def mbpp(number, code, asserts, inputs, results, compare=MBPP, atol=0, imports=()):
    name = re.search(r"def (\w+)\(", code)[1]
    if results is None:
        reference = code.replace(f" {name}(", " ref_func(")
        loop = f"for i, inp in enumerate(inputs):\n    assertion({name}(*inp), ref_func(*inp), {atol})"
        test = f"import numpy as np\nfrom math import inf\n{compare}\n{reference}\ninputs = {inputs}\n{loop}\n"
    else:
        loop = f"for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion({name}(*inp), exp, {atol})"
        test = f"import numpy as np\nfrom math import inf\n{compare}\ninputs = {inputs}\nresults = {results}\n{loop}\n"
    return {
        "task_id": number, "code": code, "prompt": f"Write a function {name}.", "source_file": "x.ipynb",
        "test_imports": list(imports), "test_list": asserts, "test": test,
    }  # fmt: skip


def nested(depth):
    return [nested(depth - 1), depth] if depth else []


FLOATS = humaneval(
    "def halves(values: list) -> list:\n", "    return [x / 2 for x in values]\n",
    [[[1.0, 2.5]], [[]], [[-7.1, 1e-9, 1e9]]], [[0.5, 1.25], [], [-3.55, 5e-10, 5e8]],
)  # fmt: skip
ONE_FLOAT = humaneval(
    "import math\n\ndef root(x):\n", "    return math.sqrt(x)\n",
    [[2], [10.0], [0], [True]], [1.4142135, 3.1622776, 0.0, 1.0], atol=1e-4,
)  # fmt: skip
TUPLES = humaneval(
    "def ends(l):\n", "    return (min(l), max(l)) if l else None\n",
    [[[3, 1, 2]], [[]], [["b", "a"]], [[-(2**70), 2**70]], [[True, False]]],
    [(1, 3), None, ("a", "b"), (-(2**70), 2**70), (False, True)],
)  # fmt: skip
DEEP = humaneval(
    "def depth(x):\n", "    return 1 + max([depth(y) for y in x if isinstance(y, list)], default=0)\n",
    [[nested(3)], [nested(90)], [[[], [[]], {}]]], [4, 91, 3],
)  # fmt: skip
TWICE = humaneval(
    "def counts(n: int) -> list:\n", "    return [n + 2 * i for i in range(n)]\n", [[3], [0], [20_000]], None
)
IN_PLACE = humaneval(
    "def ordered(l):\n", "    l.sort()\n    return l\n", [[[3, 1, 2]], [[]]], [[1, 2, 3], []]
)  # fmt: skip
HUMANEVAL_ROWS = [FLOATS, ONE_FLOAT, TUPLES, DEEP, TWICE, IN_PLACE]

SHARED = mbpp(
    2, "def shared(a, b):\n    return tuple(set(a) & set(b))\n",
    ["assert set(shared((3, 4, 5), (5, 7, 4))) == set((4, 5))"],
    [[(3, 4, 5), (5, 7, 4)], [(1, 2), ()], [("a", (1, 2)), ((1, 2),)]], [(4, 5), (), ((1, 2),)], AS_SETS,
)  # fmt: skip
BEGINS = mbpp(
    794, "import re\ndef begins(text):\n    return re.search(r'^a.*b$', text)\n",
    ["assert begins('aab')", "assert not begins('aabc')"], [["ab"], ["ba"], [""]], [True, False, False], AS_TRUTH,
)  # fmt: skip
SMALLEST = mbpp(
    404, "def smallest(a, b):\n    return min(a, b)\n", ["assert smallest(1, 2) == 1"],
    [[1, 2], [float("inf"), 3.5], [-5, -4]], [1, 3.5, -5],
)  # fmt: skip
AREA = mbpp(
    14, "import math\ndef area(r):\n    return math.pi * r ** 2\n",
    ["assert math.isclose(area(1), 3.1415926, rel_tol=1e-3)"],
    [[1], [10], [0.5]], [3.141592653589793, 314.1592653589793, 0.7853981633974483], imports=["import math"],
)  # fmt: skip
PAIRS = mbpp(
    9, "from itertools import combinations\ndef pairs(l):\n    return [list(x) for x in combinations(l, 2)]\n",
    ["assert pairs([1, 2]) == [[1, 2]]"], [[["R", "G", "B"]], [list(range(60))]], None,
)  # fmt: skip
MBPP_ROWS = [SHARED, BEGINS, SMALLEST, AREA, PAIRS]


def verdict(row, program, rule):
    suite = SUITES["humaneval-plus" if "entry_point" in row else "mbpp-plus"]
    return make_judge(suite, rule, timeout=10, jobs=1, allow_limits=True).one(row, program)


def name_of(row):
    return re.search(r"def (\w+)\(", row.get("code") or row["prompt"])[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("suite", "rows"), [("humaneval-plus", HUMANEVAL_ROWS), ("mbpp-plus", MBPP_ROWS)])
def test_reference_solutions_pass(suite, rows, rule, tmp_path, capsys):
    """Through the command, from a file."""
    problems = write(tmp_path / "problems.jsonl", rows)
    run_judge(suite=suite, problems=problems, samples=None, out="", rule=rule, check=True, allow_limits=True)
    assert f"reference solutions: {len(rows)} of {len(rows)} pass" in capsys.readouterr().out


WRONG = {
    "off by 1e-3": (FLOATS, "    return [x / 2 + 1e-3 for x in values]"),
    "one of many off by 1e-3": (FLOATS, "    return [x / 2 + (x == 2.5) / 1000 for x in values]"),
    "too long": (FLOATS, "    return [x / 2 for x in values] + [0.0]"),
    "beyond its own tolerance": (ONE_FLOAT, "    return math.sqrt(x) + 1e-3"),
    "text for a number": (ONE_FLOAT, "    return str(math.sqrt(x))"),
    "list for a tuple": (TUPLES, "    return [min(l), max(l)] if l else None"),
    "empty for none": (TUPLES, "    return (min(l), max(l)) if l else ()"),
    "wrong for the last input": (TUPLES, "    return (min(l), max(l)) if l and l[0] is not True else None"),
    "wrong within": (DEEP, "    return min(90, 1 + max([depth(y) for y in x if isinstance(y, list)], default=0))"),
    "wrong where the reference is called": (TWICE, "    return [n + 2 * i for i in range(min(n, 19_999))]"),
    "an array for a list": (FLOATS, "    import numpy\n    return numpy.array(values) / 2"),
    "another set": (SHARED, "def shared(a, b): return tuple(set(a) | set(b))"),
    "always a match": (BEGINS, "import re\ndef begins(text): return re.search('', text)"),
    "never a match": (BEGINS, "def begins(text): return None"),
    "other bound": (SMALLEST, "def smallest(a, b): return max(a, b)"),
    "the asserts alone": (AREA, "def area(r): return 3.14159"),
    "no function": (PAIRS, "def other(l): return []"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_fail(name, rule):
    assert not verdict(*WRONG[name], rule).passed


RIGHT = {
    "within the tolerance": (FLOATS, "    return [x / 2 + 1e-8 for x in values]"),
    "within its own tolerance": (ONE_FLOAT, "    return math.sqrt(x) + 5e-5"),
    "computed with numpy": (ONE_FLOAT, "    import numpy\n    return numpy.sqrt(x)"),
    "numpy's integers": (
        DEEP,
        "    import numpy\n    " + DEEP["canonical_solution"].strip().replace("1 +", "numpy.int64(1) +"),
    ),
    "numpy's truth": (BEGINS, "import numpy\ndef begins(t): return bool(numpy.bool_(t[:1] == 'a' and t[-1:] == 'b'))"),
    "numpy's numbers in a tuple": (TUPLES, "    import numpy\n    return tuple(numpy.sort(l)[[0, -1]]) if l else None"),
    "another order of a set": (SHARED, "def shared(a, b): return sorted(set(a) & set(b), key=str, reverse=True)"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_pass(name, rule):
    assert verdict(*RIGHT[name], rule) == PASSED


EQUAL = "type('E', (), dict(__eq__=lambda *a: True, __hash__=lambda a: 0))()"
PATCH = "import numpy, numpy.testing\nnumpy.allclose = numpy.testing.assert_allclose = lambda *a, **k: True\n"
CHEATS = {
    "equal to everything": ("{head} return " + EQUAL, True),
    "within a list": ("{head} return [" + EQUAL + "] * 9", False),
    "numpy replaced": (PATCH + "{head} return 0.25", True),
    "numpy replaced by a float of its own": (
        PATCH + "class F(float):\n    def __eq__(self, x): return True\n{head} return F(0.25)", True,
    ),
    "numpy's array": ("import numpy\n{head} return numpy.ones(3)", False),
    "numpy's array that is equal to all": (
        "import numpy\nclass A(numpy.ndarray):\n    def __eq__(self, x): return True\n"
        "{head} return numpy.ones(3).view(A)",
        True,
    ),
    "assertion": ("def assertion(*a): pass\n{head} return 0.25", False),
    "assertion, on being called": (
        "import sys\n{head}\n    for f in [sys._getframe(i) for i in (1, 2)]:\n"
        "        f.f_globals['assertion'] = lambda *a: None\n    return 0.25",
        False,
    ),
    "the test's function from below": (
        "import gc\n{head}\n    for f in gc.get_objects():\n"
        "        if getattr(f, '__name__', '') in ('assertion', 'is_floats') and hasattr(f, '__code__'):\n"
        "            f.__code__ = (lambda *a: None).__code__\n    return 0.25",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", [ONE_FLOAT, AREA], ids=["humaneval-plus", "mbpp-plus"])
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail_strictly(row, name):
    """The last of each says whether one process can be fooled by it: that the cheat is one."""
    text, fools = CHEATS[name]
    head = f"def {name_of(row)}(x):"
    program = text.format(head=head)
    if "entry_point" in row:  # a completion goes on after the prompt: Python takes the later definition
        program = f"    pass\n{program}"
    assert not verdict(row, program, "strict").passed
    assert verdict(row, program, "official").passed == fools


@pytest.mark.parametrize("rule", RULES)
def test_a_thousand_inputs(rule):
    inputs = [[list(range(i % 97)), i] for i in range(1000)]
    row = humaneval("def total(l, i):\n", "    return sum(l) - i\n", inputs, [sum(x) - i for x, i in inputs])
    assert verdict(row, row["canonical_solution"], rule) == PASSED
    assert not verdict(row, "    return sum(l) - min(i, 998)\n", rule).passed


def test_a_million_numbers_cross():
    row = humaneval(
        "def tri(n):\n", "    return [i / 2 if i % 2 else i * 10**6 for i in range(n + 1)]\n", [[2], [10**6]], None
    )
    assert verdict(row, row["canonical_solution"], "strict") == PASSED


# -- numpy in the sandbox ----------------------------------------------------------------------------------------------

TIERS = ("bubblewrap", "namespaces", "limits")
NUMPY = package_folders(SUITES["mbpp-plus"])
SITE = Path(pytest.__file__).parents[1]


def seen(tier, program, rule, packages):
    if reason := why_not(tier):
        pytest.skip(f"{tier}: {reason}")
    job = Job(program, "", "assert f() == 1", "", ["f"], packages)
    return judge_python(Sandbox(tier), job, rule, 10.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tier", TIERS)
def test_numpy_and_nothing_beside_it(tier, rule):
    program = f"""
import os, sys, numpy, numpy.linalg
assert numpy.linalg.norm(numpy.array([[3.0, 4.0]])) == 5
assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
assert not any("site-packages" in path for path in sys.path), sys.path
if {tier != "limits"}:
    assert not os.path.exists({str(SITE / "pytest")!r})
try:
    import pytest
except ModuleNotFoundError:
    f = lambda: 1
"""
    assert seen(tier, program, rule, NUMPY) == PASSED


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tier", TIERS)
def test_other_suites_have_no_numpy(tier, rule):
    program = "import os\nassert 'OPENBLAS_NUM_THREADS' not in os.environ\nimport numpy\nf = lambda: 1"
    assert seen(tier, program, rule, {}) == Verdict(False, "failed: ModuleNotFoundError: No module named 'numpy'")
    assert [name for name, suite in SUITES.items() if suite.packages] == ["humaneval-plus", "mbpp-plus"]


@pytest.mark.parametrize("rule", RULES)
def test_a_test_of_another_suite_has_no_numpy(rule):
    task = {"task_id": "t", "entry_point": "f", "test": "def check(candidate):\n    import numpy"}
    judge = make_judge(SUITES["jsonl-tests"], rule, jobs=1, allow_limits=True)
    assert judge.one(task, "f = print").result == "failed: ModuleNotFoundError: No module named 'numpy'"


def test_numpy_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "numpy", None)
    for name in ("humaneval-plus", "mbpp-plus"):
        with pytest.raises(SetupError, match=f"^{name} needs numpy, which its tests import .pip install numpy"):
            package_folders(SUITES[name])
    assert package_folders(SUITES["humaneval"]) == {}
    problems = write(tmp_path / "problems.jsonl", [SHARED])
    samples = write(tmp_path / "samples.jsonl", [{"task_id": "2", "completion": SHARED["code"]}])
    out = str(tmp_path / "verdicts.jsonl")
    with pytest.raises(SetupError, match="mbpp-plus needs numpy"):
        run_judge(suite="mbpp-plus", problems=problems, samples=samples, out=out, allow_limits=True)


# -- what crosses ------------------------------------------------------------------------------------------------------


def hex_of(value):
    """Of any size, and telling 0.0 from -0.0."""
    return hex(value) if isinstance(value, int) else value.hex()


def crossed(value):
    return wire.decode(json.loads(json.dumps(wire.encode(value))))


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.complex128(1 + 2j), 1 + 2j),
        (np.str_("a"), "a"),
    ],
)
def test_numpys_numbers_arrive_as_pythons(value, arrives):
    for found in (crossed(value), crossed([value])[0], crossed({value: 0}).popitem()[0]):
        assert found == arrives
        assert type(found) is type(arrives)


@pytest.mark.parametrize("value", [np.ones(2), [np.ones(1)], np.longdouble(1), np.array(1.0)])
def test_numpys_arrays_do_not_cross(value):
    with pytest.raises(wire.NotPlain, match=r"a value of type (ndarray|longdouble)"):
        wire.encode(value)


def test_a_match_arrives_as_a_thing_and_no_more():
    found, other = crossed([re.match("a", "a")] * 2)
    assert found
    assert found != other
    assert found not in (None, True, "a", ("a",))
    assert not hasattr(found, "group")


@pytest.mark.parametrize(
    "value",
    [2**63 - 1, 2**63, -(2**63), 1 << 20_000, True, 1.0, -0.0, float("inf"), 1e308],
    ids=lambda x: hex_of(x)[:9],
)
def test_numbers_within_others_stay_what_they_are(value):
    for found in (
        crossed([value])[0],
        crossed((value,))[0],
        crossed({value: value})[value],
        crossed({0: (value,)})[0][0],
    ):
        assert type(found) is type(value)
        assert hex_of(found) == hex_of(value)


def test_a_frame_of_numbers_is_as_small_as_they_are():
    assert len(json.dumps(wire.encode(list(range(1000))), separators=(",", ":"))) < 4000


# -- problems and prompts ----------------------------------------------------------------------------------------------


def test_problems(tmp_path):
    loaded = load_problems(SUITES["mbpp-plus"], write(tmp_path / "a.jsonl", [SHARED, AREA]))
    assert [*loaded] == ["2", "14"]
    loaded = load_problems(SUITES["humaneval-plus"], write(tmp_path / "b.jsonl", [FLOATS]))
    assert [*loaded] == ["HumanEval/halves"]
    for suite, row, field in (
        ("mbpp-plus", SHARED, "test"),
        ("mbpp-plus", SHARED, "test_list"),
        ("humaneval-plus", FLOATS, "test"),
    ):
        lacking = {name: value for name, value in row.items() if name != field}
        with pytest.raises(DataError, match=f"expected text under {field}$"):
            load_problems(SUITES[suite], write(tmp_path / "c.jsonl", [lacking]))
    assert [SUITES[name].hub for name in ("humaneval-plus", "mbpp-plus")] == [
        ("evalplus/humanevalplus", "test"), ("evalplus/mbppplus", "test"),
    ]  # fmt: skip


@pytest.mark.parametrize("style", [style for style in STYLES if style != "origen"])
@pytest.mark.parametrize(("suite", "row"), [("humaneval", FLOATS), ("mbpp", SHARED)])
def test_asked_as_the_suite_that_it_extends(style, suite, row):
    plus = f"{suite}-plus"
    assert make_prompt(style, plus, row) == make_prompt(style, suite, row)
    assert "assertion" not in make_prompt(style, plus, row).text
    assert stops_of(style, plus) == stops_of(style, suite)
    for raw in ("    return 1\nif x:\n    y", "```python\nx = 1\n```\nwords", "x = 1\n```\nwords", "x\nassert y"):
        assert extract(style, plus, raw) == extract(style, suite, raw)


def test_a_base_model_is_stopped_where_its_function_ends():
    assert stops_of("plain", "humaneval-plus").reached("    return 1\ndef g")
    assert extract("plain", "mbpp-plus", "def f(): ...\nassert f()") == "def f(): ..."
    assert "assert set(shared((3, 4, 5), (5, 7, 4)))" in make_prompt("plain", "mbpp-plus", SHARED).text
