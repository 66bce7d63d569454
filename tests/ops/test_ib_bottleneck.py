"""ib_bottleneck against its float64 reference: three routes, every gradient, noise, what is stored and repeated."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bottleneck_problem import NAMES, problem
from checks import check
from hypothesis import example, given
from hypothesis import strategies as st
from traffic import count_bytes

from ibft_kernels import ib_bottleneck, ib_bottleneck_latent, noise_key, philox_normal, reference
from ibft_kernels.ops import _ib_bottleneck_triton as kernels
from ibft_kernels.ops import ib_bottleneck as module

REDUCTIONS = ("mean", "batchmean", "sum", "none")
SEED = noise_key(42, 1)
OPS = torch.ops.ibft_kernels


@pytest.fixture(params=["torch", "fused", "product"])
def route(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(route: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public argument that takes `route`: where the fused tiles do not fit, "triton" takes the product."""
    if route == "product":
        monkeypatch.setattr(module, "fits_on_chip", lambda *_: False)
    return "torch" if route == "torch" else "triton"


def doubled(inputs: dict[str, Any], through: torch.dtype | None = None) -> dict[str, Any]:
    """The same values in float64, as the products see them: rounded to `through`."""
    return {
        k: None if t is None else t.detach().to(through or t.dtype).double().requires_grad_() for k, t in inputs.items()
    }


def values_and_gradients(op, inputs: dict[str, Any], dz=None, dkl=None, **options) -> dict[str, torch.Tensor]:
    """z, kl and the gradients of <z, dz> + <kl, dkl>; an upstream gradient of None does not reach the op at all."""
    z, kl = op(**inputs, **options)
    pairs = [(z, dz), (kl, dkl)]
    outputs, upstream = zip(*[(o, g.to(o.dtype)) for o, g in pairs if g is not None], strict=True)
    wanted = {k: t for k, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    return {"z": z.detach(), "kl": kl.detach()} | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("d", "z"), [(123, 7), (64, 16), (100, 128)])
@pytest.mark.parametrize("n", [1, 252, 507])
def test_equals_float64_reference(backend, device, n, d, z, dtype, rel):
    inputs = problem(n, d, z, device, dtype)
    eps, dz = torch.randn(2, n, z, dtype=dtype, device=device)
    dkl = torch.randn(n, dtype=dtype, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, eps=eps, reduction="none", backend=backend)
    truth = values_and_gradients(
        reference.ib_bottleneck, doubled(inputs), dz.double(), dkl.double(), eps=eps.double(), reduction="none"
    )
    check(found, truth, rel)
    assert {t.dtype for t in found.values()} == {dtype}


def test_a_real_width(backend, device):
    """D = 4096, Z = 256: the paper's; in fp32 the tiles of Z = 256 do not fit, in 16 bits they do."""
    inputs = problem(33, 4096, 256, device)
    eps, dz = torch.randn(2, 33, 256, device=device)
    options = {"eps": eps, "reduction": "batchmean"}
    dkl = torch.tensor(1.7, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, backend=backend, **options)
    check(found, values_and_gradients(reference.ib_bottleneck, doubled(inputs), dz, dkl, **options), 1e-5)


@pytest.mark.parametrize("normalizer", [None, 13.5, torch.tensor(77)])
@pytest.mark.parametrize("mask_kind", ["none", "partial", "empty"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_masks_and_normalizers(backend, device, reduction, mask_kind, normalizer):
    inputs = problem(107, 40, 70, device)  # 70: two tiles of the latent, and a token counts once
    if normalizer is not None and reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"normalizer: reduction '{reduction}' divides by nothing"):
            ib_bottleneck(**inputs, reduction=reduction, normalizer=normalizer)
        return
    mask = {"none": None, "partial": torch.rand(107) < 0.6, "empty": torch.zeros(107, dtype=torch.bool)}[mask_kind]
    options = {"mask": None if mask is None else mask.to(device), "reduction": reduction, "normalizer": normalizer}
    dkl = torch.full((107,) if reduction == "none" else (), 1.7, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, None, dkl, seed=SEED, backend=backend, **options)
    truth = values_and_gradients(reference.ib_bottleneck, doubled(inputs), None, dkl, seed=SEED, **options)
    check(found, truth, 1e-5)
    if mask_kind == "empty":
        assert all(found[name].abs().max() == 0 for name in ("kl", "dhidden", "dweight", "dbias"))


@pytest.mark.parametrize("logvar_range", [(-4.0, 4.0), (-0.7, 0.3), (2.0, 3.0), None])
def test_clamps(backend, device, logvar_range):
    """(2, 3): a padding column's clamped logvar is not 0, and yet it may add to nothing."""
    inputs = problem(33, 20, 10, device)
    eps, dz = torch.randn(2, 33, 10, device=device)
    options = {"eps": eps, "reduction": "sum", "logvar_range": logvar_range}
    dkl = torch.tensor(1.7, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, backend=backend, **options)
    check(found, values_and_gradients(reference.ib_bottleneck, doubled(inputs), dz, dkl, **options), 1e-5)


@pytest.mark.parametrize("arriving", ["z", "kl", "both"])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden weight", "hidden bias", "weight bias"])
def test_partial_gradients(backend, device, wanted, arriving):
    inputs = problem(19, 24, 12, device)
    for name in NAMES:
        inputs[name].requires_grad_(name in wanted.split())
    eps, dz = torch.randn(2, 19, 12, device=device)
    upstream = (None if arriving == "kl" else dz, None if arriving == "z" else torch.tensor(1.7, device=device))
    options = {"eps": eps, "reduction": "batchmean"}
    found = values_and_gradients(ib_bottleneck, inputs, *upstream, backend=backend, **options)
    truth = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    check(found, values_and_gradients(reference.ib_bottleneck, truth, *upstream, **options), 1e-5)
    assert set(found) == {"z", "kl"} | {f"d{name}" for name in wanted.split()}


def test_a_gradient_that_does_not_arrive_is_not_read(backend, device, monkeypatch):
    arrived, inner = [], module._gradients
    monkeypatch.setattr(module, "_gradients", lambda *a, **k: arrived.append((a[1], a[2])) or inner(*a, **k))
    for which in (0, 1):
        ib_bottleneck(**problem(3, 8, 4, device), seed=1, backend=backend)[which].sum().backward()
    assert [tuple(g is None for g in pair) for pair in arrived] == [(False, True), (True, False)]


def test_no_bias(backend, device):
    inputs = problem(21, 24, 12, device) | {"bias": None}
    eps, dz = torch.randn(2, 21, 12, device=device)
    dkl = torch.tensor(1.7, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, eps=eps, backend=backend)
    check(found, values_and_gradients(reference.ib_bottleneck, doubled(inputs), dz, dkl, eps=eps), 1e-5)


@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=2),
    d=st.integers(1, 40),
    z=st.integers(1, 40),
    reduction=st.sampled_from(REDUCTIONS),
    masked=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(shape=[1], d=27, z=1, reduction="none", masked=True, seed=20689030)  # z of 0.0015 from summands near 1
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_any_shape(name, shape, d, z, reduction, masked, seed):
    torch.manual_seed(seed)
    inputs = problem(1, d, z, "cpu")
    inputs["hidden"] = torch.randn(*shape, d, requires_grad=True)
    eps, dz = torch.randn(2, *shape, z)
    # no clamp: a logvar within rounding of a bound has two right gradients
    options = {"eps": eps, "reduction": reduction, "logvar_range": None}
    options["mask"] = torch.rand(shape) < 0.5 if masked else None
    dkl = torch.randn(shape if reduction == "none" else ())
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, backend=name, **options)
    truth = values_and_gradients(reference.ib_bottleneck, doubled(inputs), dz, dkl, **options)
    # z is a sum that can cancel, and of a single z nothing else tells the size: its error is that of what it sums up,
    # and of the sum in the exponent
    h, weight, bias = (inputs[name].detach().double() for name in ("hidden", "weight", "bias"))
    sizes = h.abs() @ weight.abs().T + bias.abs()
    noise = (0.5 * (h @ weight[z:].T + bias[z:])).exp() * eps.abs()
    bound = 2e-6 * (sizes[..., :z] + noise * (1 + sizes[..., z:] / 2))
    assert ((found.pop("z").double() - truth.pop("z")).abs() <= bound).all()
    check(found, truth, 2e-5)


@pytest.mark.parametrize("splits", [1, 3, 5])
def test_small_tiles(device, monkeypatch, splits):
    """A GPU's tile sizes, partial blocks along every axis, and hidden's columns split between programs."""
    small = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    shapes = {"forward": {"BLOCK_Z": 16, "BLOCK_K": 32}, "backward": {"BLOCK_Z": 64, "BLOCK_D": 16}}
    launch = {f"ib_bottleneck_{k}": small | v for k, v in shapes.items()} | {"ib_kl_reduce": {"BLOCK": 4}}
    monkeypatch.setattr(kernels, "launch_shape", lambda kernel, *_: launch[kernel])
    monkeypatch.setattr(kernels, "_column_splits", lambda *_: splits)
    inputs = problem(43, 71, 37, device)
    eps, dz = torch.randn(2, 43, 37, device=device)
    mask, dkl = (torch.rand(43) < 0.7).to(device), torch.randn(43, device=device)
    for reduction in ("none", "mean"):
        options = {"eps": eps, "reduction": reduction, "mask": mask}
        upstream = dz, dkl if reduction == "none" else dkl[0]
        found = values_and_gradients(ib_bottleneck, inputs, *upstream, backend="triton", **options)
        check(found, values_and_gradients(reference.ib_bottleneck, doubled(inputs), *upstream, **options), 1e-5)


def test_noise_of_every_latent_tile(device, monkeypatch):
    """Tiles of 16 over a latent of 37: each draws its own columns' noise, the ones that backward draws."""
    small = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    shapes = {"forward": {"BLOCK_Z": 16, "BLOCK_K": 32}, "backward": {"BLOCK_Z": 64, "BLOCK_D": 16}}
    launch = {f"ib_bottleneck_{k}": small | v for k, v in shapes.items()} | {"ib_kl_reduce": {"BLOCK": 4}}
    monkeypatch.setattr(kernels, "launch_shape", lambda kernel, *_: launch[kernel])
    inputs = problem(43, 71, 37, device)
    drawn = philox_normal(5, torch.tensor([[0, 0, n] for n in range(43)], dtype=torch.int32, device=device), 37)
    dz = torch.ones(43, 37, device=device)
    found = values_and_gradients(ib_bottleneck, inputs, dz, None, seed=5, backend="triton")
    given = values_and_gradients(ib_bottleneck, inputs, dz, None, eps=drawn, backend="triton")
    check(found, {name: value.double() for name, value in given.items()}, 1e-5)


@pytest.mark.parametrize("route", ["torch", "product", "fused"])
def test_autocast_does_not_change_the_dtype(device, route, monkeypatch):
    """Inside an autocast region too, the tensors' dtype decides."""
    monkeypatch.setattr(module, "_resolve_route", lambda *_: route)
    inputs = problem(20, 32, 16, device)
    dz, dkl = torch.randn(20, 16, device=device), torch.tensor(1.7, device=device)
    expected = values_and_gradients(ib_bottleneck, inputs, dz, dkl, seed=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, seed=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- low precision --------------------------------------------------------------------------------


def low_precision_cases() -> list:
    """tl.dot on bf16 is wrong in Triton's interpreter, so there bf16 is for the torch route; a GPU takes them all."""
    fp16, bf16 = torch.float16, torch.bfloat16
    on_cpu = [("cpu", route, fp16) for route in ("torch", "fused", "product")] + [("cpu", "torch", bf16)]
    on_gpu = [("cuda", route, dtype) for route in ("torch", "fused", "product") for dtype in (fp16, bf16)]
    return on_cpu + [pytest.param(*case, marks=pytest.mark.gpu) for case in on_gpu]


@pytest.mark.parametrize("masters", [None, torch.float32])
@pytest.mark.parametrize(("n", "d", "z"), [(252, 123, 7), (123, 256, 64), (507, 64, 256)])
@pytest.mark.parametrize(("place", "route", "dtype"), low_precision_cases())
def test_low_precision_against_the_truth(place, route, dtype, n, d, z, masters, monkeypatch):
    """No further from float64 than plain PyTorch in that precision: on average, and at worst by one more rounding.

    Without the clamp: where rounding takes a logvar across a bound, its gradient is all or nothing in either.
    """
    device, backend = torch.device(place), "torch" if route == "torch" else "triton"
    if route == "product":
        monkeypatch.setattr(module, "fits_on_chip", lambda *_: False)
    inputs = problem(n, d, z, device, dtype, masters, spread=1.0)
    eps, dz = torch.randn(n, z, device=device), torch.randn(n, z, device=device).to(dtype)
    dkl = torch.tensor(1.7, device=device)
    options = {"reduction": "batchmean", "normalizer": 30.0, "logvar_range": None}
    found = values_and_gradients(ib_bottleneck, inputs, dz, dkl, eps=eps, backend=backend, **options)
    exact = doubled(inputs, through=dtype)
    truth = values_and_gradients(reference.ib_bottleneck, exact, dz.double(), dkl, eps=eps.double(), **options)

    def plain(hidden, weight, bias):
        mu, logvar = F.linear(hidden, weight, bias).chunk(2, dim=-1)
        std = (logvar / 2).exp()
        return mu + std * eps.to(dtype), 0.5 * (std**2 + mu**2 - 1 - logvar).sum() / 30.0

    low = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    native = values_and_gradients(plain, low, dz, dkl)
    parameters = masters or dtype
    assert [found[k].dtype for k in truth] == [dtype, torch.float32, dtype, parameters, parameters]
    for name, expected in truth.items():
        error = (found[name].double() - expected).abs()
        native_error = (native[name].double() - expected).abs()
        # kl is one number, so native may be nearer by luck: a thirty-second of a unit in the last place
        luck = torch.finfo(dtype).eps / 32 * expected.abs() if name == "kl" else 0.0
        assert error.mean() <= native_error.mean() + luck, name
        assert (error <= native_error.max() + torch.finfo(dtype).eps * expected.abs()).all(), name


def test_the_fused_kl_comes_from_the_accumulator(device):
    """Not from mu and logvar as rounded for backward: those are a thousand times coarser."""
    inputs = problem(64, 96, 32, device, torch.float16)
    _, kl = ib_bottleneck(**inputs, seed=1, reduction="none", backend="triton")
    _, truth = reference.ib_bottleneck(**doubled(inputs), seed=1, reduction="none")
    torch.testing.assert_close(kl.double(), truth, rtol=5e-6, atol=0)


def test_gradients_of_masters_are_never_rounded_to_hiddens_dtype(backend, device):
    """Through z alone dmu is dz, exact in fp16, so mu's half of dW and db has fp32's own error and no other."""
    n, d, z = 600, 48, 16
    inputs = problem(n, d, z, device, torch.float16, torch.float32)
    dz = torch.randn(n, z, device=device).half()
    found = values_and_gradients(ib_bottleneck, inputs, dz, seed=1, backend=backend)
    truth = {"dweight": dz.double().t() @ inputs["hidden"].detach().double(), "dbias": dz.double().sum(dim=0)}
    check({k: found[k][:z] for k in truth}, truth, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fused_and_product_agree(device, dtype, monkeypatch):
    inputs = problem(90, 80, 48, device, dtype)
    dz, dkl = torch.randn(90, 48, device=device), torch.tensor(1.7, device=device)
    options = {"seed": SEED, "reduction": "batchmean", "backend": "triton"}
    fused = values_and_gradients(ib_bottleneck, inputs, dz, dkl, **options)
    monkeypatch.setattr(module, "fits_on_chip", lambda *_: False)
    product = values_and_gradients(ib_bottleneck, inputs, dz, dkl, **options)
    check(
        fused,
        {k: t.double() for k, t in product.items()},
        4 * torch.finfo(dtype).eps if dtype == torch.float16 else 1e-5,
    )


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_philox_normal_forward_and_backward(backend, device):
    """W = b = 0: z is the noise itself, and with dz = 1 and no KL a lone row's db is (1, noise / 2)."""
    inputs = {k: torch.zeros_like(t, requires_grad=True) for k, t in problem(30, 16, 20, device).items()}
    ids = torch.randint(0, 1000, (30, 3), device=device).to(torch.int32)
    noise = philox_normal(SEED, ids, 20, backend="torch")
    z, _ = ib_bottleneck(**inputs, seed=SEED, noise_ids=ids, backend=backend)
    torch.testing.assert_close(z, noise, rtol=0, atol=1e-6)
    lone, _ = ib_bottleneck(inputs["hidden"][4:5], inputs["weight"], inputs["bias"], seed=SEED, noise_ids=ids[4:5],
                            backend=backend)  # fmt: skip
    (dbias,) = torch.autograd.grad(lone.sum(), inputs["bias"])
    assert torch.equal(dbias, torch.cat([torch.ones_like(lone), lone / 2], dim=1)[0])


def test_a_token_is_independent_of_its_neighbours(backend, device):
    inputs = problem(80, 48, 20, device)
    ids = torch.randint(0, 1000, (80, 3), device=device).to(torch.int32)
    options = {"seed": SEED, "reduction": "none", "backend": backend}
    z, kl = ib_bottleneck(**inputs, noise_ids=ids, **options)
    rows = torch.randperm(80)[:17].to(device)
    part = ib_bottleneck(inputs["hidden"][rows], inputs["weight"], inputs["bias"], noise_ids=ids[rows], **options)
    torch.testing.assert_close(part, (z[rows], kl[rows]), rtol=1e-5, atol=1e-5)


def test_seed_int_or_tensor(backend, device):
    inputs = problem(9, 12, 16, device)
    key, dz = noise_key(1, 0x90000000), torch.ones(9, 16, device=device)
    expected = values_and_gradients(ib_bottleneck, inputs, dz, seed=key, backend=backend)
    for place in {device, torch.device("cpu")}:
        seed = torch.tensor([key - 2**64], device=place)
        found = values_and_gradients(ib_bottleneck, inputs, dz, seed=seed, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_seed_draws_from_torchs_generator(backend, device):
    inputs = problem(9, 12, 16, device)
    torch.manual_seed(3)
    first, second = (ib_bottleneck(**inputs, backend=backend)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ib_bottleneck(**inputs, backend=backend)[0], first)
    assert not torch.equal(first, second)


# --- what it reads, stores and repeats ------------------------------------------------------------


def test_backward_keeps_its_tiles_on_chip():
    """A frozen encoder's fused backward stores dhidden and nothing else; a trained one's, dmu | dlogvar as well."""
    n, d, z = 100, 64, 48
    inputs = problem(n, d, z, "cpu", torch.float16)
    for trained in (False, True):
        inputs["weight"].requires_grad_(trained)
        inputs["bias"].requires_grad_(False)
        latent, kl = ib_bottleneck(**inputs, seed=1, backend="triton")
        with count_bytes() as traffic:
            torch.autograd.backward((latent, kl), (torch.ones_like(latent), torch.ones_like(kl)))
        assert traffic.stored == 2 * n * (d + 2 * z * trained)


@pytest.mark.parametrize("trained", [True, False])
def test_saves_hidden_and_one_pair(device, trained):
    """Triton stores no noise: beside inputs there is mu | logvar. A frozen encoder does not keep hidden either."""
    saved, inputs = [], problem(40, 48, 16, device)
    for name in ("weight", "bias"):
        inputs[name].requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        latent = ib_bottleneck_latent(**inputs, seed=1, backend="triton")
    known = {inputs["weight"].data_ptr(), latent.mu.data_ptr()} | ({inputs["hidden"].data_ptr()} if trained else set())
    assert {t.data_ptr() for t in saved if t.numel() > 1} == known


def test_same_bits_twice(backend, device):
    inputs = problem(200, 64, 48, device)
    mask = (torch.rand(200) < 0.5).to(device)
    z, kl = ib_bottleneck(**inputs, seed=3, mask=mask, backend=backend)
    loss = z.square().sum() + kl
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(inputs.values()))
    z2, kl2 = ib_bottleneck(**inputs, seed=3, mask=mask, backend=backend)
    assert torch.equal(z, z2)
    assert torch.equal(kl, kl2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_any_strides_and_an_expanded_gradient(backend, device):
    wide = torch.randn(6, 5, 60, device=device)
    weight, bias = (t.detach() for t in problem(1, 24, 10, device).values() if t.shape[0] == 20)
    dz = torch.tensor(0.3, device=device).expand(6, 5, 10)
    dkl = torch.tensor(0.7, device=device).expand(6, 5)
    eps = torch.randn(10, 6, 5, device=device).permute(1, 2, 0)
    for hidden in (wide[..., 8:32], wide.transpose(0, 2)[8:32].transpose(0, 2), wide[::2, :, 8:32].expand(3, 5, 24)):
        n = hidden.shape[0]
        inputs = {"hidden": hidden.detach().requires_grad_(), "weight": weight.t().contiguous().t(), "bias": bias}
        options = {"eps": eps[:n], "reduction": "none"}
        found = values_and_gradients(ib_bottleneck, inputs, dz[:n], dkl[:n], backend=backend, **options)
        truth = {k: t.detach().double().requires_grad_(k == "hidden") for k, t in inputs.items()}
        check(found, values_and_gradients(reference.ib_bottleneck, truth, dz[:n], dkl[:n], **options), 1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(backend, device, reduction):
    inputs = problem(0, 24, 8, device)
    z, kl = ib_bottleneck(**inputs, seed=1, reduction=reduction, backend=backend)
    (z.sum() + kl.sum()).backward()
    assert z.shape == (0, 8)
    assert inputs["hidden"].grad.shape == (0, 24)
    assert kl.sum() == inputs["weight"].grad.abs().max() == inputs["bias"].grad.abs().max() == 0


def test_latent_shows_the_encoders_output(backend, device):
    """For logging: detached, logvar before the clamp; the other two fields are ib_bottleneck's."""
    inputs = problem(12, 24, 10, device)
    hidden = inputs.pop("hidden").view(3, 4, 24)
    latent = ib_bottleneck_latent(hidden, **inputs, seed=SEED, backend=backend)
    z, kl = ib_bottleneck(hidden, **inputs, seed=SEED, backend=backend)
    mu, logvar = F.linear(hidden, **inputs).chunk(2, dim=-1)
    torch.testing.assert_close((latent.mu, latent.logvar), (mu.detach(), logvar.detach()), rtol=1e-5, atol=1e-5)
    assert logvar.abs().max() > 4
    assert not latent.mu.requires_grad
    assert not latent.logvar.requires_grad
    assert torch.equal(latent.z, z)
    assert torch.equal(latent.kl, kl)
    assert z.shape == (3, 4, 10)


def test_nan_is_not_hidden(backend, device):
    inputs = {k: t.detach() for k, t in problem(4, 24, 8, device).items()}
    inputs["hidden"][1, 2] = float("nan")
    z, kl = ib_bottleneck(**inputs, seed=1, reduction="none", backend=backend)
    assert z.isnan().all(dim=1).tolist() == kl.isnan().tolist() == [False, True, False, False]
    assert z.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_kl_may_be_changed_in_place(backend, device):
    inputs = problem(5, 24, 8, device)
    _, kl = ib_bottleneck(**inputs, seed=1, backend=backend)
    kl *= 2.0
    kl.backward()
    assert inputs["weight"].grad.isfinite().all()


def test_second_derivative_is_refused(backend, device):
    inputs = problem(4, 24, 8, device)
    upstream = torch.ones(4, 8, device=device, requires_grad=True)
    z, _ = ib_bottleneck(**inputs, seed=1, backend=backend)
    (dhidden,) = torch.autograd.grad(z, inputs["hidden"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dhidden.sum().backward()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.tensor(1.0)}, r"hidden: expected shape \[..., D\] with D >= 1, got \(\)"),
        ({"hidden": torch.ones(4, 0)}, r"hidden: expected shape \[..., D\] with D >= 1, got \(4, 0\)"),
        ({"hidden": torch.ones(4, 6, dtype=torch.int32)}, "hidden: expected a floating dtype, got torch.int32"),
        ({"hidden": torch.ones(4, 5)}, r"weight: expected shape \[2Z, 5\] with Z >= 1, got \(16, 6\)"),
        ({"weight": torch.ones(15, 6)}, r"weight: expected shape \[2Z, 6\] with Z >= 1, got \(15, 6\)"),
        ({"weight": torch.ones(0, 6)}, r"weight: expected shape \[2Z, 6\] with Z >= 1, got \(0, 6\)"),
        ({"weight": torch.ones(2, 16, 6)}, r"weight: expected shape \[2Z, 6\] with Z >= 1, got \(2, 16, 6\)"),
        (
            {"weight": torch.ones(16, 6).half()},
            "weight: expected hidden's dtype torch.float32 or a wider one, got .*16",
        ),
        (
            {"hidden": torch.ones(4, 6).bfloat16(), "weight": torch.ones(16, 6).half()},
            "weight: expected hidden's dtype torch.bfloat16 or a wider one, got torch.float16",
        ),
        ({"weight": torch.ones(16, 6, device="meta")}, "weight: expected device cpu, got meta"),
        ({"bias": torch.ones(8)}, r"bias: expected shape \(16,\), got \(8,\)"),
        ({"bias": torch.ones(16).double()}, "bias: expected weight's dtype torch.float32, got torch.float64"),
        ({"bias": torch.ones(16, device="meta")}, "bias: expected device cpu, got meta"),
        ({"eps": torch.ones(4, 6)}, r"eps: expected shape \(4, 8\), got \(4, 6\)"),
        ({"mask": torch.ones(4)}, "mask: expected torch.bool, got torch.float32"),
        ({"noise_ids": torch.zeros(3, 4, dtype=torch.int32)}, r"noise_ids: expected shape \(4, 3\), got \(3, 4\)"),
        ({"seed": 2.0}, "seed: expected an int or a one-element int64 tensor, got float"),
        ({"logvar_range": (4.0, -4.0)}, r"logvar_range: expected \(lo, hi\) with lo <= hi, or None, got"),
        ({"reduction": "average"}, "reduction: expected one of .* got 'average'"),
        ({"normalizer": -1}, "normalizer: expected a finite number >= 0, got -1"),
        ({"backend": "tpu"}, "backend: expected 'auto', 'triton' or 'torch', got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"hidden": torch.ones(4, 6), "weight": torch.ones(16, 6), "bias": torch.ones(16)} | changes
    with pytest.raises(ValueError, match=message):
        ib_bottleneck(**arguments)
