"""Dropout: one mask on every path, exact scale, nothing stored that need not be."""

import math

import pytest
import torch
from traffic import count_bytes, within

from ibft_kernels import noise_key, philox_dropout, reference

SEED = noise_key(11, 3)


def ids_for(rows: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 10_000, (rows, 3), device=device).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 8), (252, 37), (33, 300)])
def test_equals_the_reference(backend, device, dtype, rows, columns):
    x = torch.randn(rows, columns, dtype=dtype, device=device)
    ids = ids_for(rows, device)
    y = philox_dropout(x, 0.3, seed=SEED, noise_ids=ids, backend=backend)
    expected = reference.philox_dropout(x, 0.3, seed=SEED, noise_ids=ids)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(y == 0, expected == 0)


def test_the_threshold_is_exact(backend, device):
    """Many enough elements that some draw the threshold itself: keep is >=, to the last of 2^16 levels."""
    ones = torch.ones(2048, 256, device=device)
    expected = reference.philox_dropout(ones, 0.25, seed=SEED) != 0
    assert torch.equal(philox_dropout(ones, 0.25, seed=SEED, backend=backend) != 0, expected)


def test_bfloat16_rounds_the_fp32_result(backend, device):
    x = torch.randn(64, 40, device=device).bfloat16()
    truth = reference.philox_dropout(x.double(), 0.3, seed=SEED)
    y = philox_dropout(x, 0.3, seed=SEED, backend=backend)
    # half a unit in the last place; the interpreter's conversion to bf16 truncates, so there a whole one
    ulps = 1.0 if backend == "triton" and device.type == "cpu" else 0.5
    assert ((y.double() - truth).abs() <= ulps * 2.0**-7 * truth.abs()).all()


def test_the_gradient_has_the_same_mask(backend, device):
    x = torch.randn(30, 4, 24, device=device, requires_grad=True)
    y = philox_dropout(x, 0.4, seed=SEED, backend=backend)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    keep = philox_dropout(torch.ones_like(x), 0.4, seed=SEED, backend=backend)
    assert torch.equal(dx, upstream * keep)
    assert torch.equal(dx == 0, y == 0)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_drops_a_share_p_and_keeps_the_mean(p):
    ones = torch.ones(2048, 256, dtype=torch.float64)
    y = philox_dropout(ones, p, seed=SEED, backend="torch")
    threshold = round(p * 65536)
    assert y.unique().tolist() == [0.0, 65536 / (65536 - threshold)]
    dropped = (y == 0).double()
    bound = 5 * math.sqrt(p * (1 - p) / y.numel())
    assert abs(dropped.mean() - threshold / 65536) < bound
    centred = dropped - threshold / 65536
    for lag in (1, 2, 8):
        assert abs((centred[:, :-lag] * centred[:, lag:]).mean()) < 5 * p * (1 - p) / math.sqrt(y.numel())
        assert abs((centred[:-lag] * centred[lag:]).mean()) < 5 * p * (1 - p) / math.sqrt(y.numel())


def test_a_rows_mask_is_its_samples_alone(backend, device):
    x, ids = torch.ones(50, 20, device=device), ids_for(50, device)
    y = philox_dropout(x, 0.5, seed=SEED, noise_ids=ids, backend=backend)
    order = torch.randperm(50).to(device)
    assert torch.equal(philox_dropout(x, 0.5, seed=SEED, noise_ids=ids[order], backend=backend), y[order])
    assert torch.equal(philox_dropout(x[:1], 0.5, seed=SEED, noise_ids=ids[7:8], backend=backend), y[7:8])
    assert not torch.equal(philox_dropout(x, 0.5, seed=noise_key(11, 4), noise_ids=ids, backend=backend), y)


def test_default_ids_are_row_numbers(backend, device):
    x = torch.ones(3, 4, 20, device=device)
    ids = torch.zeros(3, 4, 3, dtype=torch.int32, device=device)
    ids[..., 2] = torch.arange(12, device=device).view(3, 4)
    expected = philox_dropout(x, 0.5, seed=1, noise_ids=ids, backend=backend)
    assert torch.equal(philox_dropout(x, 0.5, seed=1, backend=backend), expected)


def test_strided_input_and_gradient(backend, device):
    wide = torch.randn(20, 64, device=device)
    half = wide[:, 32:].detach().requires_grad_()
    y = philox_dropout(half, 0.5, seed=1, backend=backend)
    assert torch.equal(y, philox_dropout(half.detach().clone(), 0.5, seed=1, backend=backend))
    (dx,) = torch.autograd.grad(y.sum(), half)  # an expanded gradient: stride 0
    keep = philox_dropout(torch.ones(20, 32, device=device), 0.5, seed=1, backend=backend)
    assert torch.equal(dx, keep)
    turned = wide.t()
    assert torch.equal(
        philox_dropout(turned, 0.5, seed=1, backend=backend),
        philox_dropout(turned.contiguous(), 0.5, seed=1, backend=backend),
    )


def test_a_nan_under_a_dropped_element_shows(backend, device):
    x = torch.full((4, 32), float("nan"), device=device)
    assert philox_dropout(x, 0.5, seed=1, backend=backend).isnan().all()


def test_saved_bytes(backend, device):
    saved = []
    x = torch.randn(40, 64, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        philox_dropout(x, 0.5, seed=1, noise_ids=ids_for(40, device), backend=backend)
    by_element = [t for t in saved if t.numel() == x.numel()]
    assert sum(t.numel() * t.element_size() for t in by_element) == (x.numel() if backend == "torch" else 0)


def test_each_element_is_read_and_written_once():
    x = torch.randn(100, 300, dtype=torch.float16, requires_grad=True)
    with count_bytes() as forward:
        y = philox_dropout(x, 0.5, seed=1, noise_ids=ids_for(100, x.device), backend="triton")
    with count_bytes() as backward:
        y.backward(torch.ones_like(y))
    for traffic in (forward, backward):
        assert within(traffic.loaded, x.nbytes)
        assert traffic.stored == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adding_a_gradient_to_others(backend, device, dtype):
    """In place, into strided rows, nothing beside them touched, and rounded once: within one unit in the last place."""
    ids = ids_for(37, device)
    dy, wide = torch.randn(37, 100, device=device).to(dtype), torch.randn(37, 300, device=device).to(dtype)
    before, settings = wide.clone(), (ids, 20_000, None, 9, backend)
    _, keep = torch.ops.ibft_kernels.philox_dropout(dy, *settings)
    torch.ops.ibft_kernels.philox_dropout_add_(wide[:, 100:200], dy, keep, *settings)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = reference.philox_dropout(dy.to(exact), 20_000 / 2**16, seed=9, noise_ids=ids)
    expected = before.clone()
    expected[:, 100:200] = (before[:, 100:200].to(exact) + gradient).to(dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(wide, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 200:], before[:, 200:])


def test_adding_reads_two_and_writes_one():
    dx, dy = torch.zeros(100, 300, dtype=torch.float16), torch.ones(100, 300, dtype=torch.float16)
    nothing = torch.empty(0, dtype=torch.uint8)
    with count_bytes() as traffic:
        torch.ops.ibft_kernels.philox_dropout_add_(dx, dy, nothing, ids_for(100, dx.device), 3277, None, 1, "triton")
    assert within(traffic.loaded, 2 * dx.nbytes)
    assert traffic.stored == dx.nbytes


def test_nothing_to_drop_returns_the_input(backend, device):
    x = torch.randn(3, 4, device=device)
    for p in (0, 0.0, 1e-6):
        assert philox_dropout(x, p, seed=1, backend=backend) is x
    assert philox_dropout(x[:0], 0.5, seed=1, backend=backend).shape == (0, 4)


def test_second_derivative_is_refused(backend, device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    upstream = torch.randn(3, 8, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(philox_dropout(x, 0.5, seed=1, backend=backend), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 1.0}, "p: expected 0 <= p < 1, got 1.0"),
        ({"p": -0.1}, "p: expected 0 <= p < 1, got -0.1"),
        ({"p": float("nan")}, "p: expected 0 <= p < 1, got nan"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x: expected a floating tensor"),
        ({"x": torch.tensor(1.0)}, "x: expected a floating tensor"),
        ({"seed": None}, "seed: expected an int"),
        ({"noise_ids": torch.zeros(5, 3, dtype=torch.int32)}, "noise_ids: expected shape"),
        ({"backend": "numpy"}, "backend: expected"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.ones(4, 8), "p": 0.1, "seed": 1} | changes
    with pytest.raises(ValueError, match=message):
        philox_dropout(**arguments)
