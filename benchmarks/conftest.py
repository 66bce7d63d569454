"""`pytest benchmarks/`: each test is one provider of one comparison.

The first test of a comparison measures all of its providers, in drawn turns, so that their times can be divided by one
another; each test then hands its own to pytest-benchmark (its table, --benchmark-json, --benchmark-compare) and fails
where its provider is ours and wrong. Rows go to benchmarks/results/<device>/, or under $IBFT_RESULTS.

    pytest benchmarks                       on the CPU: what `make bench` runs
    pytest benchmarks -m gpu                on a CUDA device, all parts
    pytest benchmarks -m gpu --part ops --resume --budget 450
"""

import argparse
import gc
import os

import pytest
import torch

from benchmarks.harness.machine import keep_freed_memory
from benchmarks.harness.providers import OURS
from benchmarks.harness.session import NotMeasured, Session

PARTS = ("ops", "heads", "step", "sweeps", "ladder", "judge", "data")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def pytest_addoption(parser):
    from benchmarks.steps.random_base import SHAPES

    group = parser.getgroup("ibft-fast benchmarks")
    group.addoption("--part", choices=PARTS, help="only the comparisons of one part")
    group.addoption("--shape", choices=SHAPES, default="deepseek-coder-7b", help="model of the step on a GPU")
    group.addoption(
        "--rounds", type=count, help="timed rounds of each provider; a trial: leaves no rows unless IBFT_RESULTS is set"
    )
    group.addoption("--resume", action="store_true", help="leave out what was measured at this commit already")
    group.addoption("--budget", type=float, metavar="S", help="begin no comparison after so many seconds")


def pytest_configure(config):
    config.addinivalue_line("markers", "part(name): the part of the benchmarks that a file belongs to")
    config.addinivalue_line("markers", "patches: importing a peer patches other packages: such files come last")
    config.stash[BENCH] = Session(
        resume=config.getoption("--resume"),
        budget=config.getoption("--budget"),
        rounds=config.getoption("--rounds"),
        keep="IBFT_RESULTS" in os.environ,
    )
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]


def pytest_collection_modifyitems(config, items):
    if chosen := config.getoption("--part"):
        kept = [item for item in items if (mark := item.get_closest_marker("part")) and mark.args[0] == chosen]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    items.sort(key=lambda item: item.get_closest_marker("patches") is not None)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))
        item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[BENCH]
    for path in sorted(session.written):
        terminalreporter.write_line(f"rows: {path}")
    if session.left:
        terminalreporter.write_line(f"{len(session.left)} comparisons left: the time was up; run the same again")


def pytest_sessionstart():
    keep_freed_memory()


def pytest_collection_finish():
    gc.freeze()  # what is imported stays; peaks collect garbage twice a provider, each time over all of it


def pytest_sessionfinish():
    gc.unfreeze()  # or libraries would complain of leaks at the end


@pytest.fixture
def device(request):
    """By parameter, from `comparison.each`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def compare(request, benchmark, device):
    """`compare(comparison, provider)`: measure it, unless that is done, and judge one provider."""

    def judge(comparison, name: str) -> None:
        if obstacle := comparison.providers[name].obstacle(device):
            pytest.skip(obstacle)
        try:
            found = request.config.stash[BENCH].found(comparison, device)[name]
        except NotMeasured as reason:
            pytest.skip(str(reason))
        benchmark.group = comparison.title()
        CLOCK.replay(benchmark, found.times_ms)
        if found.result == "ok":
            return
        fault = name.startswith(OURS) and found.result in ("incorrect", "failed")
        (pytest.fail if fault else pytest.skip)(f"{found.result}: {found.note}" if found.note else found.result)

    return judge


BENCH = pytest.StashKey[Session]()


class Clock:
    """Hands times that were taken in turns to pytest-benchmark, which would take them one provider after the other."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def replay(self, benchmark, times_ms: list[float]) -> None:
        left = iter(times_ms)

        def advance() -> None:
            self.now += next(left, 0.0) / 1e3

        if times_ms:
            benchmark.pedantic(advance, rounds=len(times_ms))
        else:
            benchmark.disabled = True  # nothing was timed
            benchmark(lambda: None)


CLOCK = Clock()
