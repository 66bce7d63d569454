"""Whole training steps as one size grows (`step_sweep`), ours against the loop of `plain_loop` on the same rows."""

import pytest

from benchmarks.harness.comparison import each
from benchmarks.steps.step_comparison import SIDES
from benchmarks.steps.step_sweep import CASES, comparison

pytestmark = pytest.mark.part("sweeps")


@each({"cpu": ["base"], "cuda": ["base"]}, dict.fromkeys(SIDES))
def test_base_point(compare, device, case, provider):
    compare(comparison(device.type), provider)


@each(CASES, dict.fromkeys(SIDES[:2]))
def test_sweep(compare, device, case, provider):
    compare(comparison(device.type, *case), provider)
