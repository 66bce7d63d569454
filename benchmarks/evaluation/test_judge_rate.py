"""Samples judged a second, one a core at once: right and wrong solutions of the bundled tasks in turn, by each rule."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

from benchmarks.harness.comparison import Found, each
from benchmarks.harness.providers import Provider
from benchmarks.harness.result_rows import WHERE, percentiles
from benchmarks.harness.timing import take_turns
from ibft.evaluation.judge import Judge, make_judge, why_not_judged
from ibft.evaluation.suites import SUITES, load_problems
from ibft.tiny import task_file

pytestmark = pytest.mark.part("judge")

SUITE = SUITES["jsonl-tests"]
SAMPLES, ROUNDS = 32, 7
CASES = {"cpu": [SUITE.name]}
PROVIDERS = {
    f"ours, {rule}": Provider(run=lambda _: (), obstacle_=lambda _: why_not_judged()) for rule in ("official", "strict")
}


@dataclass(frozen=True)
class JudgeRate:
    """Of the harness's kind of comparison; a round is SAMPLES samples."""

    suite: str
    providers: Mapping[str, Provider]

    bench = "judge"
    one_thread = False
    columns = (
        "op", "provider", "suite", "sandbox", "jobs", "result", "p20_ms", "p50_ms", "p80_ms", "rounds", "samples_per_s",
        *WHERE,
    )  # fmt: skip

    def key(self, device: torch.device) -> tuple[object, ...]:
        return (self.bench, self.suite, device)

    def title(self) -> str:
        return f"judge: {SAMPLES} samples of {self.suite}"

    def judge(self, name: str) -> Judge:
        return make_judge(SUITE, name.removeprefix("ours, "))

    def row(self, name: str) -> dict[str, object]:
        judge = self.judge(name)
        return {
            "op": "judge", "provider": name, "suite": self.suite, "sandbox": judge.tools["sandbox"], "jobs": judge.jobs,
        }  # fmt: skip

    def rates(self, found: Found, device: torch.device) -> dict[str, object]:
        times = percentiles(found.times_ms)
        return {"samples_per_s": f"{1e3 * SAMPLES / float(times['p50_ms']):.1f}"} if times else {}

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, Found]:
        problems = [*load_problems(SUITE, str(task_file("test"))).values()][:SAMPLES]
        pairs = [(problem, problem["output"] if i % 2 else "") for i, problem in enumerate(problems)]
        expected = [bool(i % 2) for i in range(SAMPLES)]
        found = {name: Found("ok") for name in names}
        judges = {name: self.judge(name) for name in names}

        def turn(name: str) -> float | None:
            start = time.perf_counter()
            passed = [verdict.passed for verdict in judges[name].all(pairs)]
            if passed != expected:
                found[name] = Found("incorrect", f"{sum(passed)} of {SAMPLES} pass, expected {SAMPLES // 2}")
                return None
            return 1e3 * (time.perf_counter() - start)

        turns = {name: lambda i, name=name: turn(name) for name in names}
        right = take_turns(turns, 1)  # the gate, and a warm-up
        for name, times in take_turns({name: turns[name] for name in right}, rounds or ROUNDS).items():
            found[name].times_ms = times
        return found


@each(CASES, PROVIDERS)
def test_judge(compare, device, provider, case):
    compare(JudgeRate(case, PROVIDERS), provider)
