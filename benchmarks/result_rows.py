"""Rows of benchmarks/results/<device>/<bench>.csv: the one writer, of the `record` fixture and the step benchmarks."""

import csv
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def write_row(bench: str, device: torch.device, times_ms: Sequence[float] | None, **columns: object) -> None:
    """Append the columns, p50, p20 and p80 of the times (blank where there are none; None: no such columns), device,
    versions, commit and date.

    Raises:
        ValueError: the file has other columns.
    """
    row = columns | {
        **({} if times_ms is None else percentiles(times_ms)),
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
    if not fresh and (header := path.read_text(encoding="utf-8").partition("\n")[0].split(",")) != [*row]:
        raise ValueError(f"{path}: got columns {', '.join(row)}, expected {', '.join(header)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*row])
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def percentiles(times_ms: Sequence[float]) -> dict[str, str]:
    times = sorted(times_ms)
    if not times:
        return {"p50_ms": "", "p20_ms": "", "p80_ms": ""}
    middle = (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2
    return {
        "p50_ms": f"{middle:.3f}",
        "p20_ms": f"{times[len(times) // 5]:.3f}",
        "p80_ms": f"{times[len(times) * 4 // 5]:.3f}",
    }


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return re.sub(r"[^\w.-]+", "-", name)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
