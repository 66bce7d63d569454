import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ibft.data.sources import load_rows
from ibft.errors import DataError, SetupError
from ibft.evaluation.judge import Verdict, judge, judge_tasks, why_not_judged

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process limits")

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not enforce this limit")


def verdict(program: str, timeout: float = 5.0) -> Verdict:
    return judge([program], timeout=timeout)[0]


def test_this_machine_can_judge():
    assert why_not_judged() is None


def test_verdicts_come_in_order():
    programs = ["pass" if i % 3 else f"raise ValueError({i})" for i in range(12)]
    assert [v.passed for v in judge(programs, jobs=4)] == [bool(i % 3) for i in range(12)]
    assert judge([]) == []


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
    ],
)
def test_passes(program):
    assert verdict(program) == Verdict(True, "passed")


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
def test_fails_with_its_reason(program, result):
    assert verdict(program) == Verdict(False, result)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass",
    ],
)
def test_leaving_early_is_not_passing(program):
    assert not verdict(f"{program}\nassert False").passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_timeout(program):
    start = time.monotonic()
    assert verdict(program, timeout=0.5) == Verdict(False, "timed out")
    assert time.monotonic() - start < 5


def alive(pid: int) -> bool:
    """A killed orphan stays a zombie where nothing reaps it: that is not alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] in "ZX")


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "while True: pass"])
def test_no_child_outlives_its_program(tmp_path, ending):
    """Where children can be had at all (root), they die with the program, whichever way it ends."""
    note = tmp_path / "pid"
    program = f"""
import os, time
try:
    pid = os.fork()
except OSError:
    pid = None
if pid == 0:
    time.sleep(60)
    os._exit(0)
open({str(note)!r}, "w").write(str(pid))
{ending}
"""
    verdict(program, timeout=1.0)
    child = note.read_text()
    if child == "None":
        assert os.getuid() != 0  # the process limit holds
        return
    deadline = time.monotonic() + 5
    while alive(int(child)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(child))


def test_the_environment_is_empty_and_the_folder_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, sys
assert not set(os.environ) - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}, os.environ  # what systems set by themselves
assert os.listdir() == [], os.listdir()
assert os.path.basename(os.getcwd()).startswith("ibft-judge-"), os.getcwd()
assert os.getsid(0) == os.getpid()
assert sys.flags.isolated and not any("site-packages" in path for path in sys.path), sys.path
assert "" not in sys.path and os.getcwd() not in sys.path
"""
    assert verdict(program) == Verdict(True, "passed")


@pytest.mark.parametrize("ending", ["pass", "1 / 0", "os._exit(0)", "while True: pass"])
def test_the_folder_is_removed(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = f"import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a', 0)\n{ending}"
    assert verdict(program, timeout=1.0).passed == (ending == "pass")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "result"),
    [
        pytest.param("x = bytearray(2 << 30)", "failed: MemoryError: ", marks=linux_only),
        ("open('a', 'wb').write(bytes(20 << 20))", "failed: OSError: [Errno 27] File too large"),
        ("fs = [open('a', 'w') for _ in range(40)]", "failed: OSError: [Errno 24] Too many open files: 'a'"),
    ],
)
def test_limits(program, result):
    assert verdict(program) == Verdict(False, result)


def test_limits_are_hard():
    program = """
import resource as r
for name, most in (("CPU", 6), ("AS", 1 << 30), ("FSIZE", 1 << 24), ("NOFILE", 32), ("NPROC", 0), ("CORE", 0)):
    soft, hard = r.getrlimit(getattr(r, f"RLIMIT_{name}"))
    assert soft == hard and 0 <= hard <= most, (name, soft, hard)
"""
    assert verdict(program, timeout=5.0) == Verdict(True, "passed")


def test_a_lower_hard_limit_is_respected(tmp_path):
    """Under a lower limit of files than the judge would set, it judges all the same."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ibft.evaluation.judge import judge
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(judge(["pass", "open('a', 'wb').write(bytes(9999))"]))
"""

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(
        [Verdict(True, "passed"), Verdict(False, "failed: OSError: [Errno 27] File too large")]
    ), done.stderr


def test_a_flood_of_output_is_not_stored():
    """Written straight to the report pipe, found by trying: read up to the cap, and no pass."""
    program = """
import os
while True:
    for fd in range(3, 9):
        try: os.write(fd, b"x" * 65536)
        except OSError: pass
"""
    assert verdict(program, timeout=20.0) == Verdict(False, "killed by signal 9")  # at once, not at the timeout


def test_settings_out_of_range():
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout: got"):
            judge(["pass"], timeout=timeout)
    with pytest.raises(ValueError, match="jobs: got 0"):
        judge(["pass"], jobs=0)


def test_a_machine_that_cannot_judge_says_why(monkeypatch):
    why_not_judged.cache_clear()
    monkeypatch.setattr(sys, "executable", "")
    assert why_not_judged() == "the path of the Python interpreter is unknown"
    with pytest.raises(SetupError, match="cannot be judged here: the path"):
        judge(["pass"])
    why_not_judged.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "an empty program does not pass" in str(why_not_judged())
    why_not_judged.cache_clear()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "no process can be started" in str(why_not_judged())
    why_not_judged.cache_clear()


TASK = {"task_id": "t/0", "entry_point": "f", "test": "def check(candidate):\n    assert candidate(2) == 3"}


def test_tasks():
    completions = ["def f(x):\n    return x + 1", "def f(x):\n    return x", "def g(x):\n    return x + 1", ""]
    verdicts = judge_tasks([TASK] * 4, completions)
    assert [v.passed for v in verdicts] == [True, False, False, False]
    assert verdicts[2].result == "failed: NameError: name 'f' is not defined"


def test_a_completion_cannot_replace_the_check():
    cheat = "def f(x):\n    return 0\ndef check(candidate):\n    pass"
    assert not judge_tasks([TASK], [cheat])[0].passed


def test_tasks_refused():
    with pytest.raises(ValueError, match="completions: got 1, expected one for each of 2 tasks"):
        judge_tasks([TASK] * 2, [""])
    with pytest.raises(DataError, match=r"task 2 \(t/1\): lacks the text fields entry_point, test"):
        judge_tasks([TASK, {"task_id": "t/1", "test": 3}], ["", ""])


def test_human_eval_reference_solutions_all_pass(human_eval):
    tasks = load_rows(human_eval)
    right = judge_tasks(tasks, [task["prompt"] + task["canonical_solution"] for task in tasks], timeout=20)
    assert [task["task_id"] for task, v in zip(tasks, right, strict=True) if not v.passed] == []
    wrong = judge_tasks(tasks, [task["prompt"] + "    pass\n" for task in tasks], timeout=20)
    assert sum(v.passed for v in wrong) == 0
