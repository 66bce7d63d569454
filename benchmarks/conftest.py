"""Rows: each benchmark that passes its correctness gate adds one line to benchmarks/results/<device>/<bench>.csv."""

import csv
import platform
import re
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param)


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return re.sub(r"[^\w.-]+", "-", name)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


@pytest.fixture
def record(benchmark, device):
    """Call with the bench's name and its columns after timing; adds times, device, versions, commit and date.

    `scale` multiplies the times, where one round did a whole number of the things that the row is about.
    """

    def write(bench: str, *, scale: float = 1.0, **columns) -> None:
        stats = benchmark.stats.stats
        times = sorted(1e3 * scale * seconds for seconds in stats.data)
        row = columns | {
            "p50_ms": f"{1e3 * scale * stats.median:.3f}",
            "p20_ms": f"{times[len(times) // 5]:.3f}",
            "p80_ms": f"{times[len(times) * 4 // 5]:.3f}",
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else "",
            "torch": torch.__version__,
            "triton": version("triton"),
            "commit": commit(),
            "date": datetime.now().strftime("%Y-%m-%d"),
        }
        path = RESULTS / device_name(device) / f"{bench}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    return write
