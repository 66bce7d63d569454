"""Whole training steps on real instruction data (`real_data`), in real tokens a second: what packing is worth where
lengths vary. Ours and the baseline on the same packed rows, both padded, and padded as the released code does.
"""

import pytest

from benchmarks.harness.comparison import each
from benchmarks.steps.real_data import FILE, PROVIDERS, comparison

pytestmark = [
    pytest.mark.part("step"),
    pytest.mark.skipif(not FILE.is_file(), reason=f"needs {FILE.name} (see IBFT_DATA)"),
]


@each({"cpu": ["codealpaca"], "cuda": ["codealpaca"]}, dict.fromkeys(PROVIDERS))
def test_real_data(request, compare, device, case, provider):
    compare(comparison(device, request.config.getoption("--shape")), provider)
