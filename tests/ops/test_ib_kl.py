"""ib_kl_loss against its float64 reference: values, every gradient, noise, masks, and what it may not do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traffic import count_bytes, within

from ibft_kernels import _launch, ib_kl_loss, noise_key, philox_normal, reference
from ibft_kernels.ops import _ib_kl_triton, ib_kl
from ibft_kernels.ops._rows import as_rows

REDUCTIONS = ("mean", "batchmean", "sum", "none")
SEED = noise_key(42, 1)


def halves(n: int, z: int, device, dtype=torch.float64) -> list[torch.Tensor]:
    """mu and logvar as an encoder product gives them: halves of one [N, 2Z] tensor; a quarter of logvar is clamped."""
    both = torch.randn(n, 2 * z, dtype=torch.float64) * torch.tensor([1.0, 3.5]).repeat_interleave(z)
    return [half.detach().requires_grad_() for half in both.to(device, dtype).chunk(2, dim=-1)]


def values_and_gradients(op, mu, logvar, dz=None, dkl=None, **options) -> dict[str, torch.Tensor]:
    """z, kl and the gradients of <z, dz> + <kl, dkl>; an upstream gradient of None does not reach the op at all."""
    z, kl = op(mu, logvar, **options)
    pairs = [(z, dz), (kl, dkl)]
    outputs, upstream = zip(*[(o, g.to(o.dtype)) for o, g in pairs if g is not None], strict=True)
    dmu, dlogvar = torch.autograd.grad(outputs, (mu, logvar), upstream, allow_unused=True)
    return {"z": z.detach(), "kl": kl.detach(), "dmu": dmu, "dlogvar": dlogvar}


def doubled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def check(found: dict, truth: dict, rel: float) -> None:
    """Elementwise: |found - truth| <= rel (|truth| + the tensor's root mean square)."""
    for name, expected in truth.items():
        assert found[name].shape == expected.shape, name
        scale = expected.abs() + expected.square().mean().sqrt()
        worst = ((found[name].double() - expected).abs() - rel * scale).max() if expected.numel() else -1
        assert worst <= 0, f"{name}: {worst} beyond {rel}"


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("z", [7, 16, 64, 256])
@pytest.mark.parametrize("n", [1, 252, 507])
def test_equals_float64_reference(backend, device, n, z, dtype, rel):
    mu, logvar = halves(n, z, device, dtype)
    eps, dz = torch.randn(2, n, z, dtype=dtype, device=device)
    dkl = torch.randn(n, dtype=dtype, device=device)
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, eps=eps, reduction="none", backend=backend)
    truth = values_and_gradients(
        reference.ib_kl_loss, *doubled(mu, logvar), dz.double(), dkl.double(), eps=eps.double(), reduction="none"
    )
    check(found, truth, rel)
    assert {t.dtype for t in found.values()} == {dtype}


@pytest.mark.parametrize("normalizer", [None, 13.5, 100, torch.tensor(77)])
@pytest.mark.parametrize("mask_kind", ["none", "partial", "empty"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_masks_and_normalizers(backend, device, reduction, mask_kind, normalizer):
    if normalizer is not None and reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"normalizer: reduction '{reduction}' divides by nothing"):
            ib_kl_loss(*halves(2, 4, device), reduction=reduction, normalizer=normalizer)
        return
    mu, logvar = halves(407, 20, device)
    mask = {"none": None, "partial": torch.rand(407) < 0.6, "empty": torch.zeros(407, dtype=torch.bool)}[mask_kind]
    options = {"mask": None if mask is None else mask.to(device), "reduction": reduction, "normalizer": normalizer}
    dkl = torch.full((407,) if reduction == "none" else (), 1.7, dtype=torch.float64, device=device)
    found = values_and_gradients(ib_kl_loss, mu, logvar, None, dkl, seed=SEED, backend=backend, **options)
    truth = values_and_gradients(reference.ib_kl_loss, *doubled(mu, logvar), None, dkl, seed=SEED, **options)
    del found["z"], truth["z"]  # noise differs in the seventh digit; it has its own tests
    check(found, truth, 1e-13)
    if mask_kind == "empty":
        assert found["kl"].abs().max() == 0
        assert found["dmu"].abs().max() == found["dlogvar"].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_normalizer_of_zero_gives_zero(backend, device, reduction):
    mu, logvar = halves(5, 8, device)
    _, kl = ib_kl_loss(mu, logvar, seed=1, normalizer=0, reduction=reduction, backend=backend)
    kl.backward()
    assert kl == 0
    assert mu.grad.abs().max() == logvar.grad.abs().max() == 0


def test_two_normalised_halves_make_the_whole(backend, device):
    """What accumulation relies on: micro-batches that divide by the step's count add up to the step."""
    mu, logvar = halves(60, 16, device)
    mask = (torch.rand(60) < 0.5).to(device)
    _, whole = ib_kl_loss(mu, logvar, seed=1, mask=mask, reduction="batchmean", backend=backend)
    parts = [
        ib_kl_loss(
            mu[s], logvar[s], seed=1, mask=mask[s], reduction="batchmean", normalizer=mask.sum(), backend=backend
        )
        for s in (slice(0, 13), slice(13, 60))
    ]
    torch.testing.assert_close(sum(kl for _, kl in parts), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("logvar_range", [(-4.0, 4.0), (-0.7, 0.3), (2.0, 3.0), None])
def test_clamps(backend, device, logvar_range):
    mu, logvar = halves(33, 10, device)
    eps, dz = torch.randn(2, 33, 10, dtype=torch.float64, device=device)
    dkl = torch.tensor(1.7, device=device)
    options = {"eps": eps, "reduction": "sum", "logvar_range": logvar_range}
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, backend=backend, **options)
    check(found, values_and_gradients(reference.ib_kl_loss, *doubled(mu, logvar), dz, dkl, **options), 1e-14)


def test_clamp_gradient_passes_at_the_bounds_and_stops_beyond(backend, device):
    bounds = torch.tensor([-4.0, 4.0], device=device)
    beyond = torch.nextafter(bounds, 2 * bounds)
    logvar = torch.cat([bounds, beyond])[None].requires_grad_()
    _, kl = ib_kl_loss(torch.zeros_like(logvar), logvar, seed=1, reduction="sum", backend=backend)
    (dlogvar,) = torch.autograd.grad(kl, logvar)
    expected = torch.cat([0.5 * (bounds.exp() - 1), torch.zeros(2, device=device)])[None]
    torch.testing.assert_close(dlogvar, expected, rtol=1e-6, atol=0)
    assert (dlogvar[0, 2:] == 0).all()


@pytest.mark.parametrize("arriving", ["z", "kl", "both"])
@pytest.mark.parametrize("wanted", ["mu", "logvar", "both"])
def test_partial_gradients(backend, device, wanted, arriving):
    mu, logvar = halves(19, 12, device)
    mu.requires_grad_(wanted != "logvar")
    logvar.requires_grad_(wanted != "mu")
    inputs = [t for t in (mu, logvar) if t.requires_grad]
    eps, dz = torch.randn(2, 19, 12, dtype=torch.float64, device=device)
    results = []
    for op, extra in ((ib_kl_loss, {"backend": backend}), (reference.ib_kl_loss, {})):
        z, kl = op(mu, logvar, eps=eps, reduction="batchmean", **extra)
        loss = {"z": (z * dz).sum(), "kl": 1.7 * kl, "both": (z * dz).sum() + 1.7 * kl}[arriving]
        results.append(dict(enumerate(torch.autograd.grad(loss, inputs))))
    check(results[0], results[1], 1e-13)


def test_a_gradient_that_does_not_arrive_is_not_read(device, monkeypatch):
    arrived = []
    inner = ib_kl.backward_triton
    monkeypatch.setattr(ib_kl, "backward_triton", lambda *a: arrived.append((a[5], a[6])) or inner(*a))
    for which in (0, 1):
        ib_kl_loss(*halves(3, 8, device), seed=1, backend="triton")[which].sum().backward()
    assert [tuple(g is None for g in pair) for pair in arrived] == [(False, True), (True, False)]


@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=2),
    z=st.integers(1, 40),
    reduction=st.sampled_from(REDUCTIONS),
    masked=st.booleans(),
    bounds=st.sampled_from([None, (-4.0, 4.0), (-0.7, 0.3)]),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_any_shape(name, shape, z, reduction, masked, bounds, seed):
    torch.manual_seed(seed)
    mu, logvar, eps, dz = torch.randn(4, *shape, z, dtype=torch.float64)
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    options = {"eps": eps, "reduction": reduction, "logvar_range": bounds}
    options["mask"] = torch.rand(shape) < 0.5 if masked else None
    dkl = torch.randn(shape if reduction == "none" else (), dtype=torch.float64)
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, backend=name, **options)
    check(found, values_and_gradients(reference.ib_kl_loss, *doubled(mu, logvar), dz, dkl, **options), 1e-13)


def test_rows_wider_than_a_tile_and_many_programs(device, monkeypatch):
    """The GPU's tile sizes, and a column loop that ends in a partial block."""
    monkeypatch.setitem(_launch.chosen, (_launch.architecture_of(device), "ib_kl"), {"TILE": 1 << 10})
    mu, logvar = halves(21, 600, device)
    eps, dz = torch.randn(2, 21, 600, dtype=torch.float64, device=device)
    options = {"eps": eps, "mask": (torch.rand(21) < 0.7).to(device), "reduction": "mean"}
    dkl = torch.tensor(1e4, device=device)
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, backend="triton", **options)
    check(found, values_and_gradients(reference.ib_kl_loss, *doubled(mu, logvar), dz, dkl, **options), 1e-13)


def test_more_partials_than_one_block(device, monkeypatch):
    monkeypatch.setitem(_launch.chosen, (_launch.architecture_of(device), "ib_kl"), {"TILE": 16})
    mu, logvar = halves(1030, 1, device)
    if device.type == "cpu":  # 1030 interpreted programs: launch the second stage alone
        partials = torch.arange(1030, dtype=torch.float64)
        kl, inverse = torch.empty((), dtype=torch.float64), torch.empty(1, dtype=torch.float64)
        counts = torch.ones(1030, dtype=torch.int32)
        _ib_kl_triton.ib_kl_reduce_kernel[(1,)](
            partials, counts, None, kl, inverse, 1030, 1030, 4,
            COMPUTE=_ib_kl_triton.tl.float64, DIVIDE_BY_COUNT=True, DIVIDE_BY_Z=True, BLOCK=1024,
        )  # fmt: skip
        torch.testing.assert_close(kl, partials.sum() / 4120, rtol=1e-15, atol=0)
        return
    _, kl = ib_kl_loss(mu, logvar, seed=1, backend="triton")
    torch.testing.assert_close(kl, reference.ib_kl_loss(mu, logvar, seed=1)[1], rtol=1e-13, atol=0)


# --- low precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("z", [7, 64])
@pytest.mark.parametrize("n", [123, 252])
def test_low_precision_against_the_truth(backend, device, n, z, dtype):
    """No further from float64 than plain PyTorch in that precision, beyond one rounding of the output."""
    mu, logvar = halves(n, z, device, dtype)
    eps = torch.randn(n, z, device=device)
    dz = torch.randn(n, z, device=device).to(dtype)
    dkl = torch.tensor(1.7, device=device)
    options = {"reduction": "batchmean", "normalizer": 3.0}
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, eps=eps, backend=backend, **options)
    truth = values_and_gradients(
        reference.ib_kl_loss, *doubled(mu, logvar), dz.double(), dkl.double(), eps=eps.double(), **options
    )

    std = (logvar.clamp(-4, 4) / 2).exp()
    native_kl = 0.5 * (std**2 + mu**2 - 1 - logvar.clamp(-4, 4)).sum() / 3.0
    native_z = mu + std * eps.to(dtype)
    native_grads = torch.autograd.grad((native_z, native_kl), (mu, logvar), (dz, dkl.to(dtype)))
    native = {"z": native_z, "kl": native_kl, "dmu": native_grads[0], "dlogvar": native_grads[1]}
    # half a unit in the last place; the interpreter's conversion to bf16 truncates, so there a whole one
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    assert found["kl"].dtype == torch.float32
    torch.testing.assert_close(found["kl"].double(), truth["kl"], rtol=1e-6, atol=0)
    for name in ("z", "dmu", "dlogvar"):
        assert found[name].dtype == dtype
        expected, error = truth[name], (found[name].double() - truth[name]).abs()
        native_error = (native[name].detach().double() - expected).abs()
        assert (error <= rounding * expected.abs() + 2e-6 * (1 + expected.abs())).all(), name
        assert error.mean() <= native_error.mean() + truncates * rounding * expected.abs().mean(), name


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_philox_normal(backend, device):
    mu, logvar = halves(30, 20, device, torch.float32)
    ids = torch.randint(0, 1000, (30, 3), device=device).to(torch.int32)
    z, _ = ib_kl_loss(mu, logvar, seed=SEED, noise_ids=ids, backend=backend)
    eps = philox_normal(SEED, ids, 20, backend=backend)
    torch.testing.assert_close(z, mu + (logvar.clamp(-4, 4) / 2).exp() * eps, rtol=1e-6, atol=1e-6)


def test_backward_recomputes_the_same_noise(backend, device):
    """With logvar = 0 and no KL, dlogvar = dz eps / 2 to the bit."""
    mu = torch.zeros(17, 24, device=device)
    logvar = torch.zeros(17, 24, device=device, requires_grad=True)
    z, _ = ib_kl_loss(mu, logvar, seed=SEED, backend=backend)
    (dlogvar,) = torch.autograd.grad(z.sum(), logvar)
    assert torch.equal(dlogvar, 0.5 * z)


def test_noise_ids_default_to_the_row_number(backend, device):
    mu, logvar = halves(12, 16, device)
    ids = torch.zeros(3, 4, 3, dtype=torch.int32, device=device)
    ids[..., 2] = torch.arange(12).view(3, 4)
    z, _ = ib_kl_loss(mu.view(3, 4, 16), logvar.view(3, 4, 16), seed=5, backend=backend)
    same, _ = ib_kl_loss(mu.view(3, 4, 16), logvar.view(3, 4, 16), seed=5, noise_ids=ids, backend=backend)
    assert torch.equal(z, same)
    assert z.shape == (3, 4, 16)


def test_a_token_is_independent_of_its_neighbours(backend, device):
    mu, logvar = halves(40, 16, device)
    ids = torch.randint(0, 1000, (40, 3), device=device).to(torch.int32)
    z, kl = ib_kl_loss(mu, logvar, seed=5, noise_ids=ids, reduction="none", backend=backend)
    order = torch.randperm(40).to(device)
    for rows in (order, order[:7]):
        part, part_kl = ib_kl_loss(
            mu[rows], logvar[rows], seed=5, noise_ids=ids[rows], reduction="none", backend=backend
        )
        assert torch.equal(part, z[rows])
        assert torch.equal(part_kl, kl[rows])


def test_seed_int_or_tensor(backend, device):
    mu, logvar = halves(9, 16, device)
    key = noise_key(1, 0x90000000)
    expected = values_and_gradients(ib_kl_loss, mu, logvar, torch.ones_like(mu), seed=key, backend=backend)
    for place in {device, torch.device("cpu")}:
        seed = torch.tensor([key - 2**64], device=place)
        found = values_and_gradients(ib_kl_loss, mu, logvar, torch.ones_like(mu), seed=seed, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_seed_draws_from_torchs_generator(backend, device):
    mu, logvar = halves(9, 16, device)
    torch.manual_seed(3)
    first, second = (ib_kl_loss(mu, logvar, backend=backend)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ib_kl_loss(mu, logvar, backend=backend)[0], first)
    assert not torch.equal(first, second)


def test_given_noise_draws_nothing(backend, device):
    mu, logvar = halves(9, 16, device)
    state = torch.get_rng_state()
    ib_kl_loss(mu, logvar, eps=torch.zeros_like(mu), backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


# --- what it reads, stores and repeats ------------------------------------------------------------


def test_same_bits_twice(backend, device):
    mu, logvar = halves(300, 64, device, torch.float32)
    mask = (torch.rand(300) < 0.5).to(device)
    dz, dkl = torch.randn(300, 64, device=device), torch.tensor(1.7, device=device)
    runs = [values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, seed=3, mask=mask, backend=backend) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_halves_are_read_in_place(backend, device):
    for shape in [(50, 32), (5, 10, 32)]:
        both = torch.randn(*shape, device=device)
        for half in both.chunk(2, dim=-1):
            assert as_rows(half).data_ptr() == half.data_ptr()
        strided = ib_kl_loss(*both.chunk(2, dim=-1), seed=2, backend=backend)
        copied = ib_kl_loss(*(half.contiguous() for half in both.chunk(2, dim=-1)), seed=2, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(strided, copied, strict=True))


def test_any_strides_and_an_expanded_gradient(backend, device):
    mu, logvar = (torch.randn(16, 30, dtype=torch.float64, device=device).t().requires_grad_() for _ in range(2))
    eps = torch.randn(16, 30, dtype=torch.float64, device=device).t()
    dz = torch.tensor(0.3, dtype=torch.float64, device=device).expand(30, 16)
    dkl = torch.tensor(0.7, dtype=torch.float64, device=device).expand(30)
    options = {"eps": eps, "reduction": "none"}
    found = values_and_gradients(ib_kl_loss, mu, logvar, dz, dkl, backend=backend, **options)
    check(found, values_and_gradients(reference.ib_kl_loss, *doubled(mu, logvar), dz, dkl, **options), 1e-14)


def test_the_triton_path_stores_no_noise(device):
    saved = []
    mu, logvar = halves(40, 16, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ib_kl_loss(mu, logvar, seed=1, backend="triton")
    assert {t.data_ptr() for t in saved if t.numel() >= mu.numel()} == {mu.data_ptr(), logvar.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_each_element_is_read_and_written_once(dtype):
    """Forward 3 N Z, backward 5 N Z; the mask, the ids and the partial sums fit in the slack."""
    n, width = 100, 300
    mu, logvar = halves(n, width, "cpu", dtype)
    ids = torch.randint(0, 1000, (n, 3), dtype=torch.int32)
    with count_bytes() as forward:
        z, kl = ib_kl_loss(mu, logvar, seed=1, noise_ids=ids, mask=torch.rand(n) < 0.5, backend="triton")
    with count_bytes() as backward:
        torch.autograd.backward((z, kl), (torch.ones_like(z), torch.ones_like(kl)))
    assert within(forward.loaded, 2 * z.nbytes)
    assert within(forward.stored, z.nbytes)
    assert within(backward.loaded, 3 * z.nbytes)
    assert within(backward.stored, 2 * z.nbytes)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(backend, device, reduction):
    mu, logvar = halves(0, 8, device)
    z, kl = ib_kl_loss(mu, logvar, seed=1, reduction=reduction, backend=backend)
    (z.sum() + kl.sum()).backward()
    assert z.shape == mu.grad.shape == logvar.grad.shape == (0, 8)
    assert kl.sum() == 0


def test_kl_may_be_changed_in_place(backend, device):
    mu, logvar = halves(5, 8, device)
    _, kl = ib_kl_loss(mu, logvar, seed=1, backend=backend)
    kl *= 2.0
    kl.backward()
    assert mu.grad.isfinite().all()


def test_nan_is_not_hidden(backend, device):
    mu, logvar = (torch.zeros(4, 8, device=device) for _ in range(2))
    logvar[1, 2] = float("nan")
    z, kl = ib_kl_loss(mu, logvar, seed=1, reduction="none", backend=backend)
    assert z.isnan().nonzero().tolist() == [[1, 2]]
    assert kl.isnan().tolist() == [False, True, False, False]


def test_second_derivative_is_refused(backend, device):
    mu, logvar = halves(4, 8, device)
    upstream = torch.ones(4, 8, dtype=torch.float64, device=device, requires_grad=True)
    z, _ = ib_kl_loss(mu, logvar, seed=1, backend=backend)
    (dmu,) = torch.autograd.grad(z, mu, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dmu.sum().backward()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": torch.tensor(1.0)}, r"mu: expected shape \[..., Z\] with Z >= 1, got \(\)"),
        ({"mu": torch.ones(4, 0)}, r"mu: expected shape \[..., Z\] with Z >= 1, got \(4, 0\)"),
        ({"mu": torch.ones(4, 8, dtype=torch.int32)}, "mu: expected a floating dtype, got torch.int32"),
        ({"logvar": torch.ones(4, 7)}, r"logvar: expected shape \(4, 8\), got \(4, 7\)"),
        ({"logvar": torch.ones(4, 8).double()}, "logvar: expected mu's dtype torch.float32, got torch.float64"),
        ({"logvar": torch.ones(4, 8, device="meta")}, "logvar: expected device cpu, got meta"),
        ({"eps": torch.ones(8)}, r"eps: expected shape \(4, 8\), got \(8,\)"),
        ({"eps": torch.ones(4, 8, dtype=torch.int64)}, "eps: expected a floating dtype, got torch.int64"),
        ({"mask": torch.ones(4)}, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, r"mask: expected shape \(4,\), got \(4, 8\)"),
        ({"noise_ids": torch.zeros(4, 3)}, "noise_ids: expected torch.int32, got torch.float32"),
        ({"noise_ids": torch.zeros(3, 4, dtype=torch.int32)}, r"noise_ids: expected shape \(4, 3\), got \(3, 4\)"),
        (
            {"noise_ids": torch.zeros(4, 3, dtype=torch.int32, device="meta")},
            "noise_ids: expected device cpu, got meta",
        ),
        ({"seed": 2.0}, "seed: expected an int or a one-element int64 tensor, got float"),
        ({"seed": -(2**63) - 1}, "seed: expected a 64-bit integer"),
        (
            {"seed": torch.zeros(1, dtype=torch.int64, device="meta")},
            "seed: expected a tensor on the CPU or cpu, got meta",
        ),
        ({"logvar_range": (4.0, -4.0)}, r"logvar_range: expected \(lo, hi\) with lo <= hi, or None, got"),
        ({"logvar_range": (float("nan"), 1.0)}, r"logvar_range: expected \(lo, hi\)"),
        ({"reduction": "average"}, "reduction: expected one of .* got 'average'"),
        ({"normalizer": -1}, "normalizer: expected a finite number >= 0, got -1"),
        ({"normalizer": float("inf")}, "normalizer: expected a finite number >= 0, got inf"),
        ({"normalizer": torch.ones(2)}, "normalizer: expected a one-element tensor"),
        ({"backend": "tpu"}, "backend: expected 'auto', 'triton' or 'torch', got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"mu": torch.ones(4, 8), "logvar": torch.ones(4, 8)} | changes
    with pytest.raises(ValueError, match=message):
        ib_kl_loss(**arguments)
