"""Whole QLoRA steps on a GPU, random base of a published shape (`--shape`), one sample a step, bf16, checkpointed.

Each case is `step_case.py` in a process of its own, so that peaks are its own and the allocator's cache starts empty.
A card of 8, 24 or 48 GiB is a cap on what the allocator may take; running out of it is a row, not a failure. The gate,
ours against the baseline on the same bytes, comes before any of them.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from result_rows import write_row
from step_case import GIB, PROVIDERS

SCRIPT = Path(__file__).with_name("step_case.py")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def shape(request):
    """Of `--shape`, once it has passed the gate."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    chosen = request.config.getoption("--shape")
    run_case(chosen, "gate")
    return chosen


def run_case(shape: str, provider: str, *options: str) -> dict:
    """What `step_case.py` printed on its last line. Raises AssertionError with its standard error where it failed."""
    command = [sys.executable, str(SCRIPT), "--shape", shape, "--provider", provider, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("card_gib", [None, 8, 24, 48], ids=lambda gib: "whole-card" if gib is None else f"{gib}-GiB")
@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step_gpu(request, capsys, shape, provider, length, card_gib):
    device = torch.device("cuda")
    if card_gib is not None and card_gib * GIB > torch.cuda.get_device_properties(device).total_memory:
        pytest.skip(f"this card has less than {card_gib} GiB")
    if provider.startswith("unsloth") and find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    options = ["--length", str(length), "--rounds", str(request.config.getoption("--rounds"))]
    if card_gib is not None:
        options += ["--card-gib", str(card_gib)]
    case = run_case(shape, provider, *options)
    columns, times = case["columns"], case["times_ms"]
    write_row("step", device, times, **columns)
    with capsys.disabled():
        print(
            f"\n{shape} {provider}, T {length}, {card_gib or 'whole'} GiB: {columns['result']}, "
            f"{columns['tokens_per_s'] or '-'} tokens/s, {columns['tflop_per_s'] or '-'} of "
            f"{columns['ceiling_tflop_per_s'] or '-'} TFLOP/s, peak {columns['peak_reserved_mib']} MiB reserved"
        )
