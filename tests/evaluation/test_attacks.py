"""No attack passes under `strict`, harms what is around it, or changes another sample's verdict (`attacks/`)."""

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ibft.evaluation import sandbox
from ibft.evaluation.judge import Judge, make_judge, why_not_judged
from ibft.evaluation.python_judge import Verdict
from ibft.evaluation.sandbox import why_not
from ibft.evaluation.suites import SUITES
from ibft.evaluation.verilog_judge import icarus_version

pytestmark = pytest.mark.xdist_group("attacks")  # one after the other: they wait for timeouts, and look at processes

ATTACKS = Path(__file__).with_name("attacks")
SECRET = "the user's secret"
RIGHT = "def f(x):\n    return x + 1\n"
PROBLEM = {
    "task_id": "increment",
    "prompt": "module top_module (input [3:0] a, output [3:0] q);\n",
    "canonical_solution": "assign q = a + 1;\nendmodule\n",
    "test": (ATTACKS / "test_bench.sv").read_text(),
}
TIERS = ("bubblewrap", "namespaces")
TIMEOUT = 2.0  # a sample's; the tests below add up to about ten of them


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    """Isolation by one tool alone."""
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr("ibft.evaluation.judge.find_tier", lambda **_: request.param)
    return request.param


@pytest.fixture
def home(tmp_path_factory):
    """A folder like a user's home: a secret in it, and not where programs may look."""
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix="ibft-test-") as folder:
        Path(folder, "secret").write_text(SECRET)
        yield Path(folder)


@pytest.fixture
def listener():
    """A server on loopback that notes who comes."""
    came = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                came.append(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], came


@pytest.fixture
def mine(monkeypatch):
    """The pids of the sandbox's processes that this test has started: they carry a mark, which Python ignores."""
    mark = f"mark-{uuid.uuid4().hex}"
    monkeypatch.setattr(sandbox, "ENTRY", (*sandbox.ENTRY, "-X", mark))

    def found() -> set[str]:
        pids = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                text = path.read_bytes()
                if mark.encode() in text or text == b"sleep\x0060\x00":  # what an attack would leave
                    pids.add(path.parent.name)
        return pids

    return found


def wait_for(holds: Callable[[], bool]) -> bool:
    """Within 5 seconds: the kernel takes a moment to end a namespace."""
    deadline = time.monotonic() + 5
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def programs(folder: str) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted((ATTACKS / folder).iterdir())}


PYTHON, VERILOG, HONEST = (programs(folder) for folder in ("python", "verilog", "verilog_honest"))


def python_judge() -> Judge:
    return make_judge(SUITES["jsonl-tests"], "strict", timeout=TIMEOUT, jobs=2)


def task(test: str = "assert candidate(2) == 3") -> dict[str, str]:
    return {"task_id": "t", "entry_point": "f", "test": f"def check(candidate):\n    {test}\n"}


def attack(name: str, **given: object) -> tuple[dict[str, str], str]:
    """(task, program), which is given those names."""
    text = PYTHON[name]
    first = text.partition("\n")[0]
    mine = task(first.removeprefix("# test: ")) if first.startswith("# test: ") else task()
    return mine, "".join(f"{key} = {value!r}\n" for key, value in given.items()) + text


def test_no_attack_passes_harms_or_changes_another_verdict(tier, home, listener, mine, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port, came = listener
    given = {"SECRET_FILE": str(home / "secret"), "OUTSIDE": str(home / "outside"), "PORT": port}
    pairs, names = [], []
    for name in PYTHON:
        pairs += [attack(name, **given), (task(), RIGHT)]
        names += [name, ""]
    verdicts = list(python_judge().all(pairs))
    passed = [name for name, verdict in zip(names, verdicts, strict=True) if name and verdict.passed]
    assert passed == []
    assert [verdict for name, verdict in zip(names, verdicts, strict=True) if not name and not verdict.passed] == []
    assert [path.name for path in home.iterdir()] == ["secret"]
    assert (home / "secret").read_text() == SECRET
    assert came == []
    assert list(tmp_path.iterdir()) == []
    assert wait_for(lambda: mine() == set())


@pytest.mark.timeout(3600)
def test_many_samples_leave_nothing_behind(home, mine, monkeypatch, tmp_path, soaking):
    """Right ones, wrong ones, and attacks that end at once: no process, file, folder or descriptor is left."""
    if reason := why_not_judged():
        pytest.skip(reason)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quick = ["daemon", "file_outside", "link_to_a_file_outside", "kills_its_parent", "os_exit_0", "printed_verdict"]
    given = {"SECRET_FILE": str(home / "secret"), "OUTSIDE": str(home / "outside")}
    kinds = [(task(), RIGHT), (task(), "def f(x):\n    return x\n"), *(attack(name, **given) for name in quick)]
    count = 10_000 if soaking else 80
    open_before = len(os.listdir("/proc/self/fd"))
    verdicts = python_judge().all([kinds[i % len(kinds)] for i in range(count)])
    assert [v.passed for v in verdicts] == [i % len(kinds) == 0 for i in range(count)]
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in home.iterdir()] == ["secret"]
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert wait_for(lambda: mine() == set())


def test_the_attacks_would_work_without_the_walls(home, listener, monkeypatch):
    """What those tests rest on: run as the user, the same programs read the secret and leave files."""
    monkeypatch.setattr("ibft.evaluation.judge.find_tier", lambda **_: "limits")
    given = {"SECRET_FILE": str(home / "secret"), "OUTSIDE": str(home / "outside")}
    names = ("the_user_s_file", "the_home_folder", "file_outside")
    found = dict(zip(names, python_judge().all([attack(name, **given) for name in names]), strict=True))
    assert found["the_user_s_file"] == found["the_home_folder"] == Verdict(True, "passed")
    assert (home / "outside").exists()


@pytest.mark.parametrize("name", ["equals_everything", "a_number_that_equals_everything"])
def test_the_official_rule_is_what_these_fool(name):
    judge = make_judge(SUITES["jsonl-tests"], "official", timeout=TIMEOUT, allow_limits=True)
    (verdict,) = judge.all([attack(name)])
    assert verdict.passed


def test_another_samples_folder_cannot_be_read(tier):
    """Two at once: each leaves a file in its folder, waits, and searches for those of both."""
    program = """
import os, time
def f(x):
    open("here", "w").write("mine")
    time.sleep(0.5)
    seen = []
    for root in ("/tmp", "/ibft-sample", "/var/tmp", "/mnt", "/home"):
        for folder, _, files in os.walk(root):
            seen += [os.path.join(folder, name) for name in files if name == "here"]
    return len(seen)
"""
    verdicts = list(python_judge().all([(task("assert candidate(2) == 1"), program)] * 2))
    assert verdicts == [Verdict(True, "passed")] * 2


def test_the_system_can_be_read_and_not_written(tier):
    program = """
import os
def f(x):
    import json, decimal
    try:
        open(os.path.join(os.path.dirname(os.__file__), "written"), "w")
    except OSError:
        return 3
"""
    assert list(python_judge().all([(task(), program)])) == [Verdict(True, "passed")]


needs_icarus = pytest.mark.skipif(icarus_version() is None, reason="Icarus Verilog is not installed")


def verilog(rule: str = "strict") -> Judge:
    return make_judge(SUITES["verilogeval-v1"], rule, timeout=TIMEOUT, jobs=2)


@needs_icarus
def test_no_design_fools_the_strict_rule(tier):
    names = [*VERILOG]
    verdicts = dict(zip(names, verilog().all([(PROBLEM, VERILOG[name]) for name in names]), strict=True))
    assert [name for name, verdict in verdicts.items() if verdict.passed] == []
    assert not any("reference solution" in verdict.result for verdict in verdicts.values())


@needs_icarus
def test_honest_designs_pass_the_strict_rule(tier):
    names = [*HONEST]
    verdicts = verilog().all([(PROBLEM, HONEST[name]) for name in names])
    assert {name: verdict.result for name, verdict in zip(names, verdicts, strict=True) if not verdict.passed} == {}


@needs_icarus
@pytest.mark.parametrize(
    "name",
    [
        "ends_the_simulation", "reads_the_reference", "forces_its_inputs", "writes_the_count", "forces_the_match",
        "a_number_glued_to_force", "a_number_glued_to_a_task", "a_real_glued_to_force",
    ],
)  # fmt: skip
def test_these_designs_fool_the_official_rule(tier, name):
    (verdict,) = verilog("official").all([(PROBLEM, VERILOG[name])])
    assert verdict.passed, verdict


@needs_icarus
def test_a_wrong_design_fails_by_both_rules(tier):
    for rule in ("official", "strict"):
        (verdict,) = verilog(rule).all([(PROBLEM, "assign q = a;\nendmodule\n")])
        assert not verdict.passed
        assert verdict.result.startswith("failed: ")
        assert verdict.result.endswith("samples.")
