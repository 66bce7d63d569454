"""Fixtures of the op tests: every test that takes `device` runs on the CPU, and on a GPU with `-m gpu`."""

import pytest
import torch

from ibft_kernels._workspace import release_logits_buffer


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` hands out NaN (integers: their maximum): an element that a kernel fails to write shows."""
    release_logits_buffer()  # or it would hold the last test's numbers
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
