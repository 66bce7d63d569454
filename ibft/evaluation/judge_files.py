"""`ibft-fast evaluate judge`: samples in, verdicts out. `generate` and `score` have files of their own."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ibft.console import Console
from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.judge import NOT_JUDGED, Judge, judge_file, make_judge, was_not_judged
from ibft.evaluation.samples import read_samples
from ibft.evaluation.suites import Problem, Rule, load_problems, suite_of

SHOWN = 20  # faults of a file


def run_judge(
    *, suite: str, problems: str | None, samples: str | None, out: str, rule: Rule = "strict", jobs: int | None = None,
    timeout: float | None = None, check: bool = False, allow_limits: bool = False,
) -> None:  # fmt: skip
    """Judges a file of samples; with `check` first the suite's reference solutions, which tells what the tools here
    cannot pass.

    Raises:
        ConfigError: a setting is out of range, or there is nothing to judge.
        DataError: a file cannot be read; or, once all the rest is judged, some lines of it are no samples.
        SetupError: no sandbox or no Icarus Verilog here; or some samples could not be judged, which a next run does.
    """
    kind = suite_of(suite)
    if samples is None and not check:
        raise ConfigError("evaluate judge: name --samples FILE, or --check to judge the reference solutions")
    tasks = load_problems(kind, problems)
    try:
        judge = make_judge(kind, rule, timeout=timeout, jobs=jobs, allow_limits=allow_limits)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    console = Console()
    tools = ", ".join(f"{name} {value}" for name, value in judge.tools.items()) or "nothing is run"
    console.line(f"judge: {suite}, rule {rule}, {judge.jobs} at once; {tools}")
    if check:
        check_canonical(judge, list(tasks.values()), console)
    if samples is None:
        return
    path = Path(out)
    for option, name in (("--samples", samples), ("--problems", problems)):
        given = Path(name or "").expanduser()
        if name and path.exists() and given.exists() and path.samefile(given):
            raise ConfigError(f"--out: got {out}, which is the file of {option}")
    found, faults = read_samples(samples, tasks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with console.progress("judged", len(found)) as advance:
            rows = judge_file(judge, tasks, found, path, advance)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error
    passed = sum(row["passed"] for row in rows)
    share = f" ({passed / len(rows):.1%})" if rows else ""
    console.line(f"{passed} of {len(rows)} samples pass{share}; verdicts: {out}")
    for fault in faults[:SHOWN]:
        print(f"{samples}, {fault}", file=sys.stderr)
    if faults:
        more = f", {len(faults) - SHOWN} of them not shown" if len(faults) > SHOWN else ""
        lines = "faulty line" if len(faults) == 1 else "faulty lines"
        raise DataError(f"{samples}: {len(faults)} {lines}{more}; the rest is judged")
    if lost := [row["result"] for row in rows if was_not_judged(row)]:
        reason = lost[0].removeprefix(NOT_JUDGED)
        raise SetupError(f"{len(lost)} samples could not be judged ({reason}); mend that and run the same again")


def check_canonical(judge: Judge, tasks: Sequence[Problem], console: Console) -> None:
    """Lists the reference solutions that do not pass here, and why: a sample of theirs could not pass either."""
    with_one = [task for task in tasks if isinstance(task.get(judge.suite.canonical), str)]
    failed: dict[str, str] = {}
    with console.progress("reference solutions", len(with_one)) as advance:
        verdicts = judge.all([(task, task[judge.suite.canonical]) for task in with_one])
        for done, (task, verdict) in enumerate(zip(with_one, verdicts, strict=True), start=1):
            if not verdict.passed:
                failed[task["task_id"]] = verdict.result
            advance(done)
    console.line(f"reference solutions: {len(with_one) - len(failed)} of {len(with_one)} pass")
    for task_id, result in failed.items():
        console.line(f"  {task_id}: {result}")
