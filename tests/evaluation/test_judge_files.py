"""`evaluate judge` on files: faulty lines, a stop and going on, and what is refused."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ibft.cli import app
from ibft.evaluation.python_judge import Verdict
from ibft.evaluation.samples import LONGEST

ROOT = Path(__file__).parents[2]
TASKS = [
    {"task_id": f"t/{i}", "entry_point": "f", "output": f"def f(x):\n    return x + {i}",
     "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}"}
    for i in range(3)
]  # fmt: skip


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def problems(tmp_path):
    return write(tmp_path / "problems.jsonl", TASKS)


def judge(problems, *arguments, suite="jsonl-tests"):
    command = ["evaluate", "judge", "--suite", suite, "--problems", problems, "--run-without-isolation", *arguments]
    return CliRunner().invoke(app, [*map(str, command)])


def right(i: int, **more) -> dict:
    return {"task_id": f"t/{i}", "completion": TASKS[i]["output"], **more}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_verdicts_keep_what_the_samples_said(problems, tmp_path):
    first = right(0, sample=0, temperature=0.2, seed=5, raw="...")
    samples = write(tmp_path / "s.jsonl", [first, right(1) | {"task_id": "t/2"}])
    result = judge(problems, "--samples", samples, "-o", tmp_path / "v.jsonl")
    assert result.exit_code == 0, result.output
    assert "1 of 2 samples pass (50.0%)" in result.output
    first, second = rows_of(tmp_path / "v.jsonl")
    assert first.pop("sandbox") == second["sandbox"]
    assert len(first.pop("sha256")) == len(first.pop("problem_sha256")) == 16
    assert first == {
        "task_id": "t/0", "line": 1,
        "suite": "jsonl-tests", "rule": "strict", "timeout": 5.0, "sample": 0, "temperature": 0.2, "seed": 5,
        "passed": True, "result": "passed",
    }  # fmt: skip
    assert (second["passed"], second["result"]) == (False, "failed: AssertionError: ")


def test_faulty_lines_are_named_and_the_rest_is_judged(problems, tmp_path):
    lines = [
        right(0, sample=0), right(0, sample=0), {"task_id": "none", "completion": ""},
        {"task_id": "t/1", "completion": None}, "{", [], {"completion": "x"}, {"task_id": 3, "completion": ""},
        {"task_id": "t/1", "completion": "#" * (50 << 20)}, "", right(2), "[" * 10**5,
    ]  # fmt: skip
    samples = write(tmp_path / "s.jsonl", lines)
    result = judge(problems, "--samples", samples, "-o", tmp_path / "v.jsonl")
    assert result.exit_code == 3
    said = result.output
    for line, fault in [
        (2, "sample 0 of t/0 was on line 1 already"),
        (3, "unknown task none"),
        (4, "completion is NoneType, expected text"),
        (5, "not JSON"),
        (6, "a list, expected an object"),
        (7, "no text under task_id"),
        (8, "no text under task_id"),
        (9, f"a completion of 52,428,800 bytes, at most {LONGEST:,}"),
        (12, "not JSON"),
    ]:
        assert f"line {line}: {fault}" in said
    assert "9 faulty lines; the rest is judged" in said
    found = [(row["task_id"], row["line"], row["passed"]) for row in rows_of(tmp_path / "v.jsonl")]
    assert found == [("t/0", 1, True), ("t/1", 4, False), ("t/1", 9, False), ("t/2", 11, True)]


def test_gzipped_samples_and_bytes_that_are_no_text(problems, tmp_path):
    path = tmp_path / "s.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(right(0)).encode() + b"\n\xff\xfe{\n"))
    result = judge(problems, "--samples", path, "-o", tmp_path / "v.jsonl")
    assert result.exit_code == 3
    assert "line 2: not JSON" in result.output
    assert len(rows_of(tmp_path / "v.jsonl")) == 1


def test_killed_and_started_again_it_goes_on_where_it_was(problems, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    samples = []
    for i in range(24):  # each leaves a file: without isolation, to count how often it ran
        program = f"import os, time\nopen({str(marks)!r} + '/{i}-' + str(time.time_ns()), 'w')\ntime.sleep(0.05)\n"
        samples.append({"task_id": "t/1", "sample": i, "completion": program + TASKS[1 if i % 3 else 2]["output"]})
    path, out = write(tmp_path / "s.jsonl", samples), tmp_path / "v.jsonl"
    code = (
        "from ibft.evaluation import judge as m\nm.find_tier = lambda **_: 'limits'\n"
        "from ibft.evaluation.judge_files import run_judge\n"
        f"run_judge(suite='jsonl-tests', problems={str(problems)!r}, samples={str(path)!r}, out={str(out)!r}, jobs=2)"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(rows_of(out))
    assert 5 <= done < 24
    with out.open("a") as file:
        file.write('{"task_id": "t/1", "li')  # as a kill in the middle of a write leaves it
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    rows = rows_of(out)
    assert [row["line"] for row in rows] == [*range(1, 25)]
    assert [row["passed"] for row in rows] == [bool(i % 3) for i in range(24)]
    ran = [int(path.name.partition("-")[0]) for path in marks.iterdir()]
    assert sorted({*ran}) == [*range(24)]
    assert max(ran.count(i) for i in range(done)) == 1  # what had a verdict did not run again


def test_verdicts_of_others_are_not_gone_on_with(problems, tmp_path):
    samples, out = write(tmp_path / "s.jsonl", [right(0), right(1)]), tmp_path / "v.jsonl"
    assert judge(problems, "--samples", samples, "-o", out).exit_code == 0
    before = out.read_bytes()
    assert judge(problems, "--samples", samples, "-o", out).exit_code == 0
    assert out.read_bytes() == before
    for arguments in (["--rule", "official"], ["--timeout", "4"], []):
        if not arguments:
            write(samples, [right(1), right(1)])
        result = judge(problems, "--samples", samples, "-o", out, *arguments)
        assert result.exit_code == 3
        assert "(line 1); name another file with --out" in result.output
        assert out.read_bytes() == before


def test_verdicts_on_other_tests_are_not_gone_on_with(problems, tmp_path):
    samples, out = write(tmp_path / "s.jsonl", [right(0)]), tmp_path / "v.jsonl"
    assert judge(problems, "--samples", samples, "-o", out).exit_code == 0
    write(problems, [TASKS[0] | {"test": "def check(candidate):\n    assert False"}])
    result = judge(problems, "--samples", samples, "-o", out)
    assert (result.exit_code, "(line 1)" in result.output) == (3, True)


@pytest.mark.parametrize("text", ["my notes, no newline at end", '{"mine": 1}', "a\nb", "\n"])
def test_a_file_of_something_else_is_left_as_it_is(problems, tmp_path, text):
    samples, out = write(tmp_path / "s.jsonl", [right(0)]), tmp_path / "notes.txt"
    out.write_text(text)
    result = judge(problems, "--samples", samples, "-o", out)
    assert (result.exit_code, "name another file with --out" in result.output) == (3, True)
    assert out.read_text() == text


def test_samples_and_problems_are_not_written_over(problems, tmp_path):
    samples = tmp_path / "s.jsonl"
    samples.write_text(json.dumps(right(0)))
    for out, option in ((samples, "--samples"), (problems, "--problems")):
        before = out.read_text()
        result = judge(problems, "--samples", samples, "-o", out)
        assert (result.exit_code, f"which is the file of {option}" in result.output) == (2, True)
        assert out.read_text() == before


def test_a_sample_that_cannot_be_judged_does_not_end_the_others(problems, tmp_path, monkeypatch):
    def fails(sandbox, job, *_):
        if "x + 1" in job.program:
            raise OSError(28, "No space left on device")
        return Verdict(True, "passed")

    monkeypatch.setattr("ibft.evaluation.judge.judge_python", fails)
    samples, out = write(tmp_path / "s.jsonl", [right(0), right(1), right(2)]), tmp_path / "v.jsonl"
    result = judge(problems, "--samples", samples, "-o", out)
    assert result.exit_code == 4
    assert "1 samples could not be judged (OSError: [Errno 28] No space left on device)" in result.output
    found = [(row["passed"], row["result"]) for row in rows_of(out)]
    assert found == [
        (True, "passed"),
        (False, "not judged: OSError: [Errno 28] No space left on device"),
        (True, "passed"),
    ]
    monkeypatch.undo()
    assert judge(problems, "--samples", samples, "-o", out).exit_code == 0  # goes on with the one that was not
    assert [row["result"] for row in rows_of(out)] == ["passed"] * 3


def test_check_lists_what_cannot_pass(tmp_path):
    problems = write(tmp_path / "p.jsonl", [TASKS[0], TASKS[1] | {"output": "def f(x):\n    return 0"}])
    result = judge(problems, "--check")
    assert result.exit_code == 0
    assert "reference solutions: 1 of 2 pass" in result.output
    assert "t/1: failed: AssertionError: " in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "name --samples FILE, or --check"),
        (["--samples", "none.jsonl"], 3, "none.jsonl: No such file or directory"),
        (["--check", "--jobs", "0"], 2, "--jobs: got 0, expected 1 to 1,024"),
        (["--check", "--timeout", "nan"], 2, "--timeout: got nan, expected seconds above 0, at most 86,400"),
        (["--check", "--rule", "lenient"], 2, "lenient"),
    ],
)
def test_arguments_refused(problems, arguments, code, said):
    result = judge(problems, *arguments)
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_suites_and_problems_refused(problems, tmp_path):
    result = judge(problems, "--check", suite="humanevil")
    assert (result.exit_code, "--suite: got humanevil, expected one of humaneval" in result.output) == (2, True)
    result = judge(problems, "--check", suite="humaneval")
    assert (result.exit_code, "problem 1 (t/0): expected text under prompt" in result.output) == (3, True)
    result = judge(write(tmp_path / "twice.jsonl", [TASKS[0]] * 2), "--check")
    assert (result.exit_code, "problem 2: a second one is named t/0" in result.output) == (3, True)


def test_a_folder_that_cannot_be_written(problems, tmp_path):
    samples = write(tmp_path / "s.jsonl", [right(0)])
    result = judge(problems, "--samples", samples, "-o", "/proc/none/v.jsonl")
    assert result.exit_code == 3
    assert "/proc/none/v.jsonl: " in result.output


GSM8K = {"question": "?", "answer": "1 + 1 = 2\n#### 1,002"}


@pytest.mark.parametrize(
    ("completion", "official", "strict"),
    [
        ("so\n#### 1002", True, True),
        ("#### 1,002", True, True),
        ("#### 1002.0", False, True),
        ("#### 7\n#### 1002", False, False),
        ("#### 1002\n#### 7", True, False),
        ("1002", False, False),
        ("#### ,", False, False),
        ("", False, False),
    ],
)
def test_gsm8k(tmp_path, completion, official, strict):
    problems = write(tmp_path / "p.jsonl", [GSM8K])
    samples = write(tmp_path / "s.jsonl", [{"task_id": "gsm8k/1", "completion": completion}])
    for rule, expected in (("official", official), ("strict", strict)):
        out = tmp_path / f"{rule}.jsonl"
        assert judge(problems, "--samples", samples, "--rule", rule, "-o", out, suite="gsm8k").exit_code == 0
        assert rows_of(out)[0]["passed"] == expected


def test_a_sample_cannot_name_its_own_conditions(problems, tmp_path):
    """Fields that a verdict has too: the judge's count, and a second run finds its own verdicts."""
    forged = {"suite": "mine", "rule": "mine", "timeout": 99, "problem_sha256": "0", "sandbox": "mine", "passed": True}
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(right(0) | {"completion": "x = 1"} | forged) + "\n")
    for _ in range(2):
        result = judge(problems, "--samples", str(samples), "-o", str(tmp_path / "v.jsonl"))
        assert result.exit_code == 0, result.output
    (row,) = map(json.loads, (tmp_path / "v.jsonl").read_text().splitlines())
    assert (row["suite"], row["timeout"], row["passed"]) == ("jsonl-tests", 5.0, False)


def test_a_program_cannot_say_that_it_was_not_judged(problems, tmp_path):
    program = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b"not judged: mine")
    except OSError:
        pass
os._exit(0)
"""
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(right(0) | {"completion": program}) + "\n")
    for rule in ("official", "strict"):
        out = tmp_path / f"{rule}.jsonl"
        result = judge(problems, "--samples", str(samples), "--rule", rule, "-o", str(out))
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["result"].startswith("failed: ")


def test_one_program_is_judged_once_for_each_problem(problems, tmp_path, monkeypatch):
    judged = []

    def note(sandbox, job, *_):
        judged.append(job.program)
        return Verdict("x + 1" in job.program, "as noted")

    monkeypatch.setattr("ibft.evaluation.judge.judge_python", note)
    other = {"task_id": "t/0", "completion": TASKS[1]["output"]}
    rows = [right(1, sample=0), right(0), "no sample", right(1, sample=1), other, right(1, sample=2), right(0)]
    samples, out = write(tmp_path / "s.jsonl", rows), tmp_path / "v.jsonl"
    assert judge(problems, "--samples", samples, "-o", out, "--jobs", 1).exit_code == 3  # the faulty line
    assert judged == [TASKS[1]["output"], TASKS[0]["output"], TASKS[1]["output"]]
    found = [(row["task_id"], row["line"], row["passed"]) for row in rows_of(out)]
    assert found == [
        ("t/1", 1, True), ("t/0", 2, False), ("t/1", 4, True), ("t/0", 5, True), ("t/1", 6, True), ("t/0", 7, False),
    ]  # fmt: skip
    judged.clear()
    out.write_text("".join(f"{line}\n" for line in out.read_text().splitlines()[:2]))  # stopped after two
    assert judge(problems, "--samples", samples, "-o", out, "--jobs", 1).exit_code == 3
    assert judged == [TASKS[1]["output"]]  # t/0's other program: all others have their verdict
    assert [(row["task_id"], row["line"], row["passed"]) for row in rows_of(out)] == found
