"""Rows: each benchmark that passes its correctness gate adds one line to benchmarks/results/<device>/<bench>.csv."""

import pytest
import torch
from result_rows import write_row


def pytest_addoption(parser):
    from random_base import SHAPES

    group = parser.getgroup("step benchmarks")
    group.addoption("--shape", choices=SHAPES, default="deepseek-coder-7b", help="model of test_step_gpu.py")
    group.addoption("--rounds", type=int, default=12, help="timed steps of each provider (default: 12)")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def record(benchmark, device):
    """Call with the bench's name and its columns after timing; adds times, device, versions, commit and date.

    `scale` multiplies the times, where one round did a whole number of the things that the row is about.
    """

    def write(bench: str, *, scale: float = 1.0, **columns) -> None:
        write_row(bench, device, [1e3 * scale * seconds for seconds in benchmark.stats.stats.data], **columns)

    return write
