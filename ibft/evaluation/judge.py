"""Judge generated programs by running their tests, each in a process of its own.

A candidate program is a completion, its test, and the call of the test. It runs in a fresh, isolated `python -I -S`
(the standard library only: verdicts do not depend on what else is installed), in its own session, with an empty
environment, in a private temporary folder, under limits of CPU time, memory, file size, open files and processes. At
its end or at the timeout its whole process group is killed and its folder removed.

A program passes only if the launcher reports a secret of this very run after the last statement has returned, and
exits 0. Leaving early, with whatever exit code, is therefore no pass.

What this does NOT protect from: a program can still read files that the user can read and use the network; one that
moves into a session of its own can outlive its sample (where it may start processes at all, that is as root, which
the kernel does not hold to the limit); and one that searches the interpreter's own frames can find the secret. It is
a guard against faulty code, not against hostile code. On macOS the memory limit is not enforced by the system.
"""

import contextlib
import functools
import importlib.util
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.errors import DataError, SetupError

LAUNCHER = Path(__file__).with_name("_launcher.py")
MEMORY_BYTES = 1 << 30  # address space, interpreter included
FILE_BYTES = 1 << 24
REPORT_BYTES = 4096  # of a report: the rest is not read


@dataclass(frozen=True)
class Verdict:
    """`result` is "passed", "timed out", or what stopped the program."""

    passed: bool
    result: str


def judge_tasks(
    tasks: Sequence[Mapping[str, Any]], completions: Sequence[str], *, timeout: float = 5.0, jobs: int | None = None
) -> list[Verdict]:
    """Judge one completion a task.

    Args:
        tasks: rows with `task_id`, `entry_point` and `test`, which defines check(candidate), as in HumanEval.
        completions: whole programs that define the entry point; for tasks whose prompt is the beginning of the program
            (HumanEval) that is prompt + completion.
        timeout, jobs: see `judge`.

    Raises:
        DataError: a task lacks one of its fields.
        ValueError, SetupError: see `judge`.
    """
    if len(tasks) != len(completions):
        raise ValueError(f"completions: got {len(completions)}, expected one for each of {len(tasks)} tasks")
    for number, task in enumerate(tasks, start=1):
        if missing := [key for key in ("task_id", "entry_point", "test") if not isinstance(task.get(key), str)]:
            raise DataError(f"task {number} ({task.get('task_id')}): lacks the text fields {', '.join(missing)}")
    programs = [
        f"{completion}\n\n{task['test']}\n\ncheck({task['entry_point']})\n"
        for task, completion in zip(tasks, completions, strict=True)
    ]
    return judge(programs, timeout=timeout, jobs=jobs)


def judge(programs: Sequence[str], *, timeout: float = 5.0, jobs: int | None = None) -> list[Verdict]:
    """Run each program; it passes if it comes to its end without an exception.

    Args:
        programs: texts of whole Python programs that end in the call of their test.
        timeout: wall-clock seconds a program may take.
        jobs: programs at once, default one a core.

    Returns:
        One verdict a program, in order.

    Raises:
        ValueError: timeout or jobs out of range.
        SetupError: this machine cannot run programs under limits (`why_not_judged`).
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: got {timeout}, expected a positive number of seconds")
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected 1 or more")
    if reason := why_not_judged():
        raise SetupError(f"generated programs cannot be judged here: {reason}")
    with ThreadPoolExecutor(jobs) as pool:  # threads suffice: each only waits for its process
        return list(pool.map(functools.partial(_run, timeout=timeout), programs))


@functools.cache
def why_not_judged() -> str | None:
    """Why programs cannot be run under limits on this machine, or None where they can."""
    if os.name != "posix" or importlib.util.find_spec("resource") is None:
        return f"{sys.platform} has no process limits (resource)"
    if not sys.executable:
        return "the path of the Python interpreter is unknown"
    try:
        verdict = _run("", timeout=60.0)
    except OSError as error:
        return f"no process can be started: {error}"
    return None if verdict.passed else f"an empty program does not pass: {verdict.result}"


def _run(program: str, *, timeout: float) -> Verdict:
    """Run one program from start to clean-up."""
    nonce = secrets.token_hex(16)
    try:
        text = program.encode()
    except UnicodeEncodeError as error:  # lone surrogates: no Python file can hold them
        return Verdict(False, f"failed: not UTF-8 text: {error.reason}")
    # The CPU limit is a second line behind the wall clock: it also ends what escapes from the process group.
    header = f"{nonce} {math.ceil(timeout) + 1} {MEMORY_BYTES} {FILE_BYTES}\n".encode()
    with tempfile.TemporaryDirectory(prefix="ibft-judge-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            report = _talk(process, header + text, time.monotonic() + timeout)
        finally:
            # Before wait(): until the leader is reaped, nobody else can get its group's number. A leader that is
            # already exiting keeps its status.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what it died too early to read
                    stream.close()  # type: ignore[union-attr]
    if report is None or process.returncode == -signal.SIGXCPU:
        return Verdict(False, "timed out")
    if process.returncode < 0:
        return Verdict(False, f"killed by signal {-process.returncode}")
    if process.returncode == 0 and report == nonce:
        return Verdict(True, "passed")
    return Verdict(False, report or f"left before its test had returned (exit {process.returncode})")


def _talk(process: subprocess.Popen[bytes], message: bytes, deadline: float) -> str | None:
    """Send `message`, and return what comes back up to the end of the stream; None past the deadline."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died at its start; its exit status says how
        process.stdin.write(message)
        process.stdin.close()
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(received) < REPORT_BYTES:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                return None
            if not (chunk := os.read(process.stdout.fileno(), REPORT_BYTES)):
                break
            received += chunk
    return received.decode(errors="replace")
