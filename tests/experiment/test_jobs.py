"""Jobs: done once, gone on with, refused where they are others', ended with their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ibft.console import Console
from ibft.errors import ConfigError, IBFTError, NonFiniteError, SetupError
from ibft.experiment.jobs import Job, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def note(folder, *, number, here):
    """A line a call, so that a test can count them."""
    with (Path(here["marks"]) / folder.name).open("a") as file:
        file.write("ran\n")
    print(f"number {number}")
    return {"number": number, "pid": os.getpid()}


def fail(folder, *, here):
    raise NonFiniteError("the loss is nan")


def break_down(folder, *, here):
    raise ZeroDivisionError("a bug")


def die(folder, *, here):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_long(folder, *, here):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def run(*jobs, workers=2):
    return run_jobs(jobs, workers=workers, threads=1, console=Console(), what="jobs")


def noting(tmp_path, name, number):
    (tmp_path / "marks").mkdir(exist_ok=True)
    return Job(name, tmp_path / name, note, {"number": number}, {"marks": str(tmp_path / "marks")})


def test_each_runs_once_in_a_process_of_its_own(tmp_path):
    jobs = [noting(tmp_path, f"job-{i}", i) for i in range(3)]
    results = run(*jobs)
    assert [result["number"] for result in results] == [0, 1, 2]
    assert len({result["pid"] for result in results} | {os.getpid()}) == 4
    assert run(*jobs) == results  # from their files
    assert all(path.read_text() == "ran\n" for path in (tmp_path / "marks").iterdir())
    assert (tmp_path / "job-1" / "log.txt").read_text() == "number 1\n"


def test_only_what_is_missing_runs(tmp_path):
    jobs = [noting(tmp_path, f"job-{i}", i) for i in range(3)]
    run(jobs[0])
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / ".done.json.new").write_text('{"key": ')  # as a kill leaves it
    run(*jobs)
    assert [(tmp_path / "marks" / job.folder.name).read_text() for job in jobs] == ["ran\n"] * 3


def test_another_job_s_result_is_refused_before_any_runs(tmp_path):
    run(noting(tmp_path, "job-0", 0))
    with pytest.raises(ConfigError, match="other settings"):
        run(noting(tmp_path, "job-9", 9), noting(tmp_path, "job-0", 1))
    assert not (tmp_path / "job-9").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"key": 1}', "{"])
def test_a_broken_result_is_refused(tmp_path, content):
    job = noting(tmp_path, "job", 0)
    job.folder.mkdir()
    (job.folder / "done.json").write_text(content)
    with pytest.raises(ConfigError, match="no result of a job"):
        run(job)


def test_where_it_lies_is_no_part_of_it(tmp_path):
    first = noting(tmp_path, "job", 0)
    run(first)
    moved = Job("job", first.folder, note, {"number": 0}, {"marks": "elsewhere"})
    assert run(moved)[0]["number"] == 0


def test_an_error_keeps_its_exit_code_and_names_the_job(tmp_path):
    with pytest.raises(IBFTError, match="seed 3: the loss is nan") as caught:
        run(Job("seed 3", tmp_path / "job", fail, {}))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("function", "said"), [(break_down, "exit code 1"), (die, "exit code -9")])
def test_a_process_that_breaks_is_told_with_its_log(tmp_path, function, said):
    with pytest.raises(SetupError, match=f"job: its process ended with {said}; see .*log.txt"):
        run(Job("job", tmp_path / "job", function, {}))
    assert ("ZeroDivisionError: a bug" in (tmp_path / "job" / "log.txt").read_text()) == (function is break_down)
    assert json.loads(json.dumps(run(noting(tmp_path, "other", 1))))[0]["number"] == 1  # the next is not hurt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_they_end_with_their_parent(tmp_path, number):
    code = (
        "from pathlib import Path\nimport ibft.experiment.jobs as jobs\nfrom tests.experiment.test_jobs import *\n"
        "jobs.PRELOADED = []\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        f"run(Job('long', Path({str(tmp_path)!r}) / 'job', wait_long, {{}}))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    written = tmp_path / "job" / "pid"
    deadline = time.monotonic() + 120
    while not (written.exists() and written.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) != 0
    pid = int(written.read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1][:4]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
