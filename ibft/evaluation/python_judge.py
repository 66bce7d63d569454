"""Verdicts on Python programs.

official  program and test in one process, as the suites' own harnesses run them: it passes if it comes to its end
          without an exception. Leaving early, with whatever exit code, is no pass. Such a program can still replace
          what the test relies on, return an object that equals everything, or look for the secret in the interpreter.
strict    program and test in two processes, each in a room of its own: the test calls the program and is given plain
          data, so only it can find that it holds (`inside/tester.py`). What cannot cross fails: objects of classes that
          the program defines, and functions that the test passes.
"""

import ast
import builtins
import contextlib
import json
import math
import os
import secrets
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ibft.evaluation.sandbox import Ended, Limits, Sandbox, talk
from ibft.evaluation.suites import SUITES, Problem, Rule, package_folders


@dataclass(frozen=True)
class Verdict:
    """`result` is "passed", "timed out", or what stopped the program."""

    passed: bool
    result: str


@dataclass(frozen=True)
class Job:
    """A program and its test: `before` is what the test relies on, `call` is the statement that runs it, `names` are
    those of the program that it uses. packages: what both may import, by name, and the folder that holds it."""

    program: str
    before: str
    test: str
    call: str
    names: Sequence[str]
    packages: Mapping[str, str] = field(default_factory=dict)

    def whole(self) -> str:
        return "\n\n".join(part for part in (self.program, self.test, self.call) if part) + "\n"


def job_of(suite: str, problem: Problem, completion: str) -> Job:
    """Of the suites whose solutions are Python. Raises SetupError where a package that the suite needs is missing."""
    packages = package_folders(SUITES[suite])
    if suite in ("mbpp", "mbpp-plus"):
        before = "\n".join([*(problem.get("test_imports") or []), problem.get("test_setup_code") or ""])
        asserts = "\n".join(problem["test_list"])
        # of MBPP+ too: its test calls what the asserts call, and is too long to look through for each sample
        names = free_names(before, asserts, defined(problem.get("code")))
        test = problem["test"] if suite == "mbpp-plus" else f"{before}\n{asserts}"
        return Job(completion, before, test, "", names, packages)
    name = problem["entry_point"]
    if suite in ("humaneval", "humaneval-plus"):
        prompt = problem["prompt"]
        return Job(prompt + completion, prompt, problem["test"], f"check({name})", [name], packages)
    return Job(completion, problem.get("before") or "", problem["test"], f"check({name})", [name], packages)


def defined(code: object) -> set[str]:
    """Names of the functions and classes at the top of a reference solution."""
    try:
        nodes = ast.parse(code if isinstance(code, str) else "").body
    except (SyntaxError, ValueError):
        return set()
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def free_names(before: str, test: str, asked: Collection[str] = ()) -> list[str]:
    """What the test takes from the program: names that it reads, and that neither it nor `before` nor Python defines.

    asked: names that the problem asks for, those of Python's own among them; no other of those is the program's, or it
    could replace what the test relies on. Tests that are no Python have none: they fail when they are run.
    """
    try:
        nodes = [node for text in (before, test) for node in ast.walk(ast.parse(text))]
    except (SyntaxError, ValueError):
        return []
    bound = set(dir(builtins)) - set(asked)
    read: dict[str, None] = {}
    for node in nodes:
        if isinstance(node, ast.Name):
            bound.add(node.id) if isinstance(node.ctx, ast.Store) else read.setdefault(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return [name for name in read if name not in bound]


def judge_python(sandbox: Sandbox, job: Job, rule: Rule, timeout: float) -> Verdict:
    """timeout: wall-clock seconds."""
    try:
        job.whole().encode()
    except UnicodeEncodeError as error:  # lone surrogates: no Python file can hold them
        return Verdict(False, f"failed: not UTF-8 text: {error.reason}")
    # The CPU limit is a second line behind the wall clock.
    limits = Limits(cpu_seconds=math.ceil(timeout) + 1)
    # a wheel keeps the libraries of `name` beside it
    found = [f"{folder}/{name}{part}" for name, folder in job.packages.items() for part in ("", ".libs")]
    sandbox = replace(sandbox, readable=(*sandbox.readable, *found))
    return (in_two if rule == "strict" else in_one)(sandbox, job, limits, timeout)


def in_one(sandbox: Sandbox, job: Job, limits: Limits, timeout: float) -> Verdict:
    secret = secrets.token_hex(16)
    first = f"{secret} {json.dumps(dict(job.packages))}" if job.packages else secret
    message = f"{first}\n{job.whole()}".encode()
    ended = sandbox.run(["whole.py"], limits, timeout=timeout, stdin=message, output_bytes=4096)
    if fault := ended_badly(ended):
        return Verdict(False, fault)
    report = ended.stdout.decode(errors="replace")
    if ended.returncode == 0 and report == secret:
        return Verdict(True, "passed")
    if not report:
        return Verdict(False, f"left before its test had returned (exit {ended.returncode})")
    return Verdict(False, f"failed: {report.removeprefix('failed: ')}")  # the program may have written it


def ended_badly(ended: Ended) -> str:
    if ended.killed:
        return ended.killed
    return f"killed by signal {-ended.returncode}" if ended.returncode < 0 else ""


def in_two(sandbox: Sandbox, job: Job, limits: Limits, timeout: float) -> Verdict:
    """The candidate's process answers the calls of the tester's over two pipes; only the tester's word counts."""
    began = time.monotonic()
    message = json.dumps(asdict(job)).encode()
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        calls, to_candidate = os.pipe()
        from_candidate, answers = os.pipe()
        try:
            stack.enter_context(sandbox.started(["candidate.py"], limits, stdin=calls, stdout=answers))
            fds = (to_candidate, from_candidate)
            command = ["tester.py", *map(str, fds)]
            tester = stack.enter_context(
                sandbox.started(command, limits, pass_fds=fds, stdin=pipe, stdout=pipe, stderr=pipe)
            )
        finally:  # held here, an end of the other side would go unseen
            for fd in (calls, to_candidate, from_candidate, answers):
                os.close(fd)
        ended = talk(tester, message, timeout - (time.monotonic() - began), 4096)
    if fault := ended_badly(ended):
        return Verdict(False, fault)
    try:
        found: dict[str, Any] = json.loads(ended.stdout)
        return Verdict(found["passed"] is True, str(found["result"]))
    except (ValueError, KeyError, TypeError):
        return Verdict(False, f"the test ended without a verdict (exit {ended.returncode})")
