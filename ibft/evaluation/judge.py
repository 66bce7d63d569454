"""Judges samples: who judges which suite, many at once, and a file of verdicts that a stop leaves usable.

samples -> one process or two each, in the sandbox -> verdicts, in the order of the samples
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ibft.errors import DataError, SetupError
from ibft.evaluation.answer_judge import judge_answer
from ibft.evaluation.python_judge import Verdict, job_of, judge_python
from ibft.evaluation.samples import Sample
from ibft.evaluation.sandbox import Sandbox, find_tier
from ibft.evaluation.suites import SUITES, Problem, Rule, Suite, package_folders
from ibft.evaluation.verilog_judge import VerilogJudge, icarus_version

Progress = Callable[[int, int], None]  # (samples done, samples in all)
JudgeOne = Callable[[Problem, str], Verdict]
LONGEST, MOST_JOBS = 86_400, 1024
NOT_JUDGED = "not judged: "  # before what the machine lacked: no fault of the sample's


@dataclass(frozen=True)
class Judge:
    """Of one suite by one rule. `tools`: what its verdicts depend on, and is written beside them."""

    suite: Suite
    rule: Rule
    one: JudgeOne
    tools: Mapping[str, str]
    timeout: float
    jobs: int

    def safely(self, problem: Problem, completion: str) -> Verdict:
        """One sample that cannot be judged (no process can be started, the disk is full) is no end of all others."""
        try:
            return self.one(problem, completion)
        except Exception as error:
            return Verdict(False, f"{NOT_JUDGED}{type(error).__name__}: {error}"[:300])

    def all(self, pairs: Sequence[tuple[Problem, str]]) -> Iterator[Verdict]:
        """In order, as they are ready. Left early, what has not begun is not begun."""
        pool = ThreadPoolExecutor(self.jobs)  # threads suffice: each only waits for its processes
        try:
            yield from pool.map(lambda pair: self.safely(*pair), pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def make_judge(
    suite: Suite, rule: Rule, *, timeout: float | None = None, jobs: int | None = None, allow_limits: bool = False
) -> Judge:
    """timeout: seconds a sample, default the suite's. jobs: samples at once, default one a core.

    Raises:
        ValueError: timeout or jobs out of range.
        SetupError: no sandbox here (`find_tier`), or no Icarus Verilog where it is needed.
    """
    timeout = suite.timeout if timeout is None else timeout
    if not 0 < timeout <= LONGEST:
        raise ValueError(f"timeout: got {timeout:g}, expected seconds above 0, at most {LONGEST:,}")
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    if not 1 <= jobs <= MOST_JOBS:
        raise ValueError(f"jobs: got {jobs}, expected 1 to {MOST_JOBS:,}")
    if suite.name == "gsm8k":
        return Judge(suite, rule, partial(judge_answer, rule=rule), {}, timeout, jobs)
    icarus = icarus_version() if suite.name.startswith("verilogeval") else ""
    if icarus is None:
        raise SetupError(
            "VerilogEval needs Icarus Verilog (Debian: apt-get install iverilog; macOS: brew install icarus-verilog)"
        )
    package_folders(suite)  # refuses before any sample is judged
    sandbox = Sandbox(find_tier(allow_limits=allow_limits))
    tools = {"sandbox": sandbox.tier} | ({"icarus": icarus} if icarus else {})
    tools |= {name: importlib.metadata.version(name) for name in suite.packages}
    if icarus:
        return Judge(suite, rule, partial(VerilogJudge(sandbox, timeout).judge, rule=rule), tools, timeout, jobs)

    def one(problem: Problem, completion: str) -> Verdict:
        return judge_python(sandbox, job_of(suite.name, problem, completion), rule, timeout)

    return Judge(suite, rule, one, tools, timeout, jobs)


def judge_tasks(
    tasks: Sequence[Mapping[str, Any]], completions: Sequence[str], *, timeout: float = 5.0, jobs: int | None = None,
    allow_limits: bool = False,
) -> list[Verdict]:  # fmt: skip
    """One completion of each task of the suite jsonl-tests, by the strict rule: what a training run asks.

    Args:
        tasks: rows with `task_id`, `entry_point` and `test`, which defines check(candidate), as in HumanEval.
        completions: whole programs that define the entry point.
        timeout, jobs, allow_limits: see `make_judge`.

    Raises:
        DataError: a task lacks one of its fields.
        ValueError: not one completion a task.
        SetupError: no sandbox here.
    """
    if len(tasks) != len(completions):
        raise ValueError(f"completions: got {len(completions)}, expected one for each of {len(tasks)} tasks")
    for number, task in enumerate(tasks, start=1):
        if missing := [key for key in ("task_id", "entry_point", "test") if not isinstance(task.get(key), str)]:
            raise DataError(f"task {number} ({task.get('task_id')}): lacks the text fields {', '.join(missing)}")
    judge = make_judge(SUITES["jsonl-tests"], "strict", timeout=timeout, jobs=jobs, allow_limits=allow_limits)
    return list(judge.all([(dict(task), completion) for task, completion in zip(tasks, completions, strict=True)]))


def why_not_judged(*, allow_limits: bool = False) -> str | None:
    """Why programs cannot be judged safely on this machine, or None where they can."""
    try:
        find_tier(allow_limits=allow_limits)
    except SetupError as error:
        return str(error)
    return None


def judge_file(
    judge: Judge,
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    out: Path,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Writes a verdict a sample to `out`, in order, each as soon as it and those before it are known; goes on after
    those that are there. A program that a problem has been given before has the verdict it had: models repeat
    themselves, at low temperatures most of the time.

    Raises:
        DataError: `out` holds verdicts of other samples, or by another rule.
    """
    heads = [head_of(judge, problems[sample.task_id], sample) for sample in samples]
    rows = kept_verdicts(heads, out)
    left = samples[len(rows) :]
    known = {
        (sample.task_id, sample.completion): Verdict(row["passed"], row["result"])
        for sample, row in reversed([*zip(samples, rows, strict=False)])  # the first of several
        if not sample.fault
    }
    programs = dict.fromkeys((sample.task_id, sample.completion) for sample in left if not sample.fault)
    verdicts = judge.all([(problems[program[0]], program[1]) for program in programs if program not in known])
    with out.open("a", encoding="utf-8") as file:
        for sample, head in zip(left, heads[len(rows) :], strict=True):
            program = sample.task_id, sample.completion
            if not sample.fault and program not in known:
                known[program] = next(verdicts)
            verdict = Verdict(False, sample.fault) if sample.fault else known[program]
            rest = {name: value for name, value in sample.rest.items() if name not in head}
            row = head | rest | {"passed": verdict.passed, "result": verdict.result}
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(samples))
    return rows


def head_of(judge: Judge, problem: Problem, sample: Sample) -> dict[str, Any]:
    """Of a verdict: all that it depends on."""
    text = json.dumps(problem, sort_keys=True).encode()
    return {
        "task_id": sample.task_id, "line": sample.line, "sha256": sample.sha256,
        "problem_sha256": hashlib.sha256(text).hexdigest()[:16],
        "suite": judge.suite.name, "rule": judge.rule, "timeout": judge.timeout, **judge.tools,
    }  # fmt: skip


def kept_verdicts(heads: Sequence[Mapping[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Those of an earlier run, which must be those of the first samples, up to the first that could not be judged. What
    follows, and half a last line, is cut off the file once all of it is known to be verdicts of these."""
    if not out.exists():
        return []
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    other = f"{out} holds something else than verdicts on these samples, or by another rule"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        head = heads[number] if number < len(heads) else {"line": None}
        if not isinstance(row, dict) or any(row.get(name) != value for name, value in head.items()):
            raise DataError(f"{other} (line {number + 1}); name another file with --out")
        rows.append(row)
    half = text[len(whole) :]
    if half and (len(rows) == len(heads) or not half.startswith(b'{"task_id": '[: len(half)])):
        raise DataError(f"{other} (its end); name another file with --out")
    judged = next((i for i, row in enumerate(rows) if was_not_judged(row)), len(rows))
    kept = b"".join(whole.splitlines(keepends=True)[:judged])
    if len(kept) < len(text):
        with out.open("r+b") as file:
            file.truncate(len(kept))
    return rows[:judged]


def was_not_judged(row: Mapping[str, Any]) -> bool:
    return str(row.get("result")).startswith(NOT_JUDGED)
