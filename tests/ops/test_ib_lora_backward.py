"""ib_lora_backward against autograd in float64: h = base + s xa B^T, and the bottleneck on h; every route, alone."""

from typing import Any

import pytest
import torch
from checks import check
from traffic import count_bytes

from ibft_kernels import ib_lora_backward, noise_key, philox_normal, reference
from ibft_kernels._launch import ARCHITECTURES, shapes_of
from ibft_kernels.ops import _ib_bottleneck_triton as kernels
from ibft_kernels.ops import ib_bottleneck as bottleneck

OPS = torch.ops.ibft_kernels
REDUCTIONS = ("mean", "batchmean", "sum", "none")
SEED = noise_key(42, 1)
NAMES = ("dhidden", "dlora", "dweight", "dbias")
EVERYTHING = {"needs_weight": True, "needs_bias": True}


@pytest.fixture(params=["torch", "fused", "product"])
def route(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(route: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public argument that takes `route`: where the fused tiles do not fit, "triton" takes the product."""
    if route == "product":
        monkeypatch.setattr(bottleneck, "fits_on_chip", lambda *_: False)
    return "torch" if route == "torch" else "triton"


def numbers(n: int, d: int, z: int, r: int, reduction: str = "mean") -> dict[str, torch.Tensor]:
    """float64: the block's (base, xa, lora_b), the encoder's (weight, bias; a quarter of logvar is clamped), what
    arrives (g, dz, dkl), and eps.
    """
    spread = torch.tensor([1.0, 3.5]).repeat_interleave(z)[:, None] / d**0.5
    make = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
    return {
        "base": make(n, d), "xa": make(n, r), "lora_b": make(d, r) / r**0.5, "weight": make(2 * z, d) * spread,
        "bias": make(2 * z), "g": make(n, d), "dz": make(n, z), "dkl": make(n) if reduction == "none" else make(()),
        "eps": make(n, z),
    }  # fmt: skip


def by_autograd(x: dict[str, torch.Tensor], scaling: float, arriving: str = "g dz dkl", **options) -> dict:
    """The gradients of <h, g> + <z, dz> + <kl, dkl>; that of base is the total, that of xa is dlora."""
    names = ("base", "xa", "weight", "bias")
    base, xa, weight, bias = leaves = [x[name].detach().clone().requires_grad_() for name in names]
    h = base + scaling * xa @ x["lora_b"].t()
    z, kl = reference.ib_bottleneck(h, weight, bias, **options)
    loss = 0.0 * (h.sum() + z.sum() + kl.sum())
    for name, output in {"g": h, "dz": z, "dkl": kl}.items():
        if name in arriving.split():
            loss = loss + (output * x[name]).sum()
    return dict(zip(NAMES, torch.autograd.grad(loss, leaves), strict=True))


def arguments(x: dict[str, torch.Tensor], scaling: float, device, dtype=torch.float32, arriving: str = "g dz dkl",
              **options) -> dict[str, Any]:  # fmt: skip
    """What the op takes, in `dtype`: mu | logvar and 1 / denominator from ib_bottleneck's forward on the same h."""
    low = {name: tensor.to(device, dtype) for name, tensor in x.items()}
    compute = torch.promote_types(dtype, torch.float32)
    hidden = (x["base"] + scaling * x["xa"] @ x["lora_b"].t()).to(device, dtype)
    mask = options.get("mask")
    forward = OPS.ib_bottleneck(
        hidden, low["weight"], low["bias"], options.get("noise_ids"), low["eps"],
        None if mask is None else mask.view(torch.uint8), None, None, 0, None, options["reduction"], "torch",
    )  # fmt: skip
    given = {"dhidden": low["g"], "dz": low["dz"], "dkl": x["dkl"].to(device, compute)}
    arrives = {"dhidden": "g", "dz": "dz", "dkl": "dkl"}
    given = {name: t if arrives[name] in arriving.split() else None for name, t in given.items()}
    saved = {"weight": low["weight"], "mulogvar": forward[3], "inverse": forward[2], "lora_b": low["lora_b"]}
    return given | saved | {"hidden": hidden, "scaling": scaling} | options


def run(inputs: dict[str, Any], **options) -> dict[str, torch.Tensor]:
    return ib_lora_backward(**inputs, **options)._asdict()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("n", "d", "z", "r"), [(1, 252, 12, 5), (77, 507, 12, 32), (77, 252, 123, 5), (33, 64, 1, 1)])
def test_equals_autograd_in_float64(backend, device, n, d, z, r, dtype, rel):
    x, scaling = numbers(n, d, z, r, "none"), 0.37
    options = {"reduction": "none", "mask": torch.rand(n) < 0.7}
    truth = by_autograd(x, scaling, eps=x["eps"], **options)
    options = options | {"mask": options["mask"].to(device), "eps": x["eps"].to(device, dtype)}
    found = run(arguments(x, scaling, device, dtype, **options), backend=backend, **EVERYTHING)
    check(found, {name: t.to(device) for name, t in truth.items()}, rel)
    assert {t.dtype for t in found.values()} == {dtype}


def test_a_real_width(backend, device):
    """D = 4096, Z = 256, R = 32: the paper's; in fp32 the tiles of Z = 256 do not fit, in 16 bits they do."""
    x = numbers(17, 4096, 256, 32)
    options = {"reduction": "batchmean", "eps": x["eps"]}
    truth = by_autograd(x, 0.5, **options)
    inputs = arguments(x, 0.5, device, **options | {"eps": x["eps"].to(device)})
    check(run(inputs, backend=backend, **EVERYTHING), {k: t.to(device) for k, t in truth.items()}, 1e-5)


@pytest.mark.parametrize("mask_kind", ["none", "partial", "empty"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_and_masks(backend, device, reduction, mask_kind):
    x = numbers(50, 40, 20, 6, reduction)
    mask = {"none": None, "partial": torch.rand(50) < 0.6, "empty": torch.zeros(50, dtype=torch.bool)}[mask_kind]
    truth = by_autograd(x, 1.0, "g dkl", reduction=reduction, mask=mask, eps=x["eps"])
    mask = None if mask is None else mask.to(device)
    inputs = arguments(x, 1.0, device, arriving="g dkl", reduction=reduction, mask=mask)
    found = run(inputs, backend=backend, **EVERYTHING)
    check(found, {k: t.to(device) for k, t in truth.items()}, 1e-5)
    if mask_kind == "empty":
        assert torch.equal(found["dhidden"], inputs["dhidden"])


@pytest.mark.parametrize("logvar_range", [(-0.7, 0.3), None])
def test_clamps(backend, device, logvar_range):
    x = numbers(33, 20, 10, 4)
    options = {"reduction": "sum", "logvar_range": logvar_range}
    truth = by_autograd(x, 0.5, eps=x["eps"], **options)
    inputs = arguments(x, 0.5, device, eps=x["eps"].to(device), **options)
    check(run(inputs, backend=backend, **EVERYTHING), {k: t.to(device) for k, t in truth.items()}, 1e-5)


@pytest.mark.parametrize("arriving", ["dz", "dkl", "dz dkl", "g", "g dz", "g dkl", ""])
def test_a_gradient_that_does_not_arrive(backend, device, arriving):
    """dz, dkl or dhidden None: as zeros, and the missing dhidden's total has hidden's dtype."""
    x = numbers(21, 36, 12, 5)
    truth = by_autograd(x, 0.25, arriving, reduction="batchmean", eps=x["eps"])
    inputs = arguments(x, 0.25, device, arriving=arriving, reduction="batchmean", eps=x["eps"].to(device))
    check(run(inputs, backend=backend, **EVERYTHING), {k: t.to(device) for k, t in truth.items()}, 1e-5)


def test_noise_is_not_needed_without_dz(backend, device):
    x = numbers(21, 36, 12, 5)
    truth = by_autograd(x, 0.25, "g dkl", reduction="sum", eps=x["eps"])
    inputs = arguments(x, 0.25, device, arriving="g dkl", reduction="sum")
    check(run(inputs, backend=backend), {k: truth[k].to(device) for k in ("dhidden", "dlora")}, 1e-5)


@pytest.mark.parametrize("with_ids", [True, False])
def test_noise_is_philox(backend, device, with_ids):
    """Recomputed from the seed, an int or a tensor, and the tokens' ids: as if the generator's numbers were given."""
    x = numbers(30, 24, 20, 4)
    ids = torch.randint(0, 1000, (30, 3)).to(torch.int32)
    if not with_ids:
        ids = torch.tensor([[0, 0, n] for n in range(30)], dtype=torch.int32)
    x["eps"] = philox_normal(SEED, ids, 20, backend="torch").double()
    truth = by_autograd(x, 0.5, eps=x["eps"], reduction="mean")
    chosen = ids.to(device) if with_ids else None
    inputs = arguments(x, 0.5, device, reduction="mean", noise_ids=chosen)
    found = run(inputs, backend=backend, seed=SEED, **EVERYTHING)
    check(found, {k: t.to(device) for k, t in truth.items()}, 1e-5)
    seed = torch.tensor([SEED - 2**64 if SEED >= 2**63 else SEED])
    again = run(inputs, backend=backend, seed=seed, **EVERYTHING)
    assert all(torch.equal(found[name], again[name]) for name in NAMES)


def test_without_lora_it_is_the_bottlenecks_backward(backend, device):
    """lora_b None: dlora None, and the rest as before."""
    x = numbers(21, 36, 12, 5)
    inputs = arguments(x, 0.25, device, reduction="sum", eps=x["eps"].to(device))
    whole = run(inputs, backend=backend, **EVERYTHING)
    plain = run(inputs | {"lora_b": None}, backend=backend, **EVERYTHING)
    assert plain["dlora"] is None
    assert whole["dlora"] is not None
    check({k: plain[k] for k in plain if k != "dlora"}, {k: whole[k].double() for k in whole if k != "dlora"}, 1e-6)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_only_what_is_asked(backend, device, needs):
    x = numbers(13, 24, 20, 5)
    inputs = arguments(x, 0.25, device, reduction="sum", eps=x["eps"].to(device))
    everything = run(inputs, backend=backend, **EVERYTHING)
    hidden = inputs.pop("hidden")
    found = run(
        inputs, hidden=hidden if needs[0] else None, backend=backend, needs_weight=needs[0], needs_bias=needs[1]
    )
    for name, need in zip(("dweight", "dbias"), needs, strict=True):
        assert (found[name] is not None) == need
        assert not need or torch.equal(found[name], everything[name])
    assert torch.equal(found["dhidden"], everything["dhidden"])
    assert torch.equal(found["dlora"], everything["dlora"])


@pytest.mark.parametrize("splits", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_tiles(device, monkeypatch, splits, dtype):
    """A GPU's tile sizes, partial blocks along every axis, and hidden's columns split between programs: of 5 column
    tiles a fourth split has none, and its part of dlora is 0.
    """
    small = {"BLOCK_N": 16, "BLOCK_Z": 64, "BLOCK_D": 16, "BLOCK_R": 64, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(kernels, "launch_shape", lambda *_: dict(small))
    monkeypatch.setattr(kernels, "_column_splits", lambda *_: splits)
    x, mask = numbers(43, 71, 37, 21), torch.rand(43) < 0.7
    inputs = arguments(x, 0.37, device, dtype, reduction="mean", mask=mask.to(device), eps=x["eps"].to(device, dtype))
    found = run(inputs, backend="triton", **EVERYTHING)
    exact = {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in inputs.items()}
    truth = dict(zip(NAMES, reference.ib_lora_backward(**exact, **EVERYTHING), strict=True))
    check(found, truth, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert {t.dtype for t in found.values()} == {dtype}


@pytest.mark.parametrize("scaling", [1.0, 16.0, 1e-3])
def test_the_scaling_is_a_number_of_the_call(backend, device, scaling):
    x = numbers(9, 40, 12, 8)
    inputs = arguments(x, 1.0, device, reduction="mean", eps=x["eps"].to(device))
    one, found = run(inputs, backend=backend), run(inputs | {"scaling": scaling}, backend=backend)
    check({"dlora": found["dlora"]}, {"dlora": scaling * one["dlora"].double()}, 1e-6)
    assert torch.equal(found["dhidden"], one["dhidden"])


# --- the buffer -----------------------------------------------------------------------------------

BUFFERS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "buffer_dtype"), BUFFERS)
def test_inplace_writes_into_that_buffer_and_nowhere_else(backend, device, dtype, buffer_dtype):
    n, d = 37, 41
    x = numbers(n, d, 12, 5)
    inputs = arguments(x, 0.37, device, dtype, reduction="mean", eps=x["eps"].to(device, dtype))
    wide = torch.randn(n + 2, d + 10, device=device).to(buffer_dtype)
    untouched, buffer = wide.clone(), wide[1 : n + 1, 3 : d + 3]
    inputs["dhidden"] = buffer.clone()
    before = {k: t.clone() for k, t in inputs.items() if isinstance(t, torch.Tensor)}
    expected = run(inputs, backend=backend, **EVERYTHING)
    assert all(torch.equal(inputs[k], t) for k, t in before.items()), "an input was written to"
    assert expected["dhidden"].data_ptr() != inputs["dhidden"].data_ptr()
    assert expected["dhidden"].dtype == buffer_dtype
    assert not torch.equal(expected["dhidden"], inputs["dhidden"])

    found = run(inputs | {"dhidden": buffer}, inplace=True, backend=backend, **EVERYTHING)
    assert found["dhidden"] is buffer
    assert all(torch.equal(inputs[k], t) for k, t in before.items()), "an input was written to"
    # a library may sum a strided buffer's products in another order
    check(found, {k: t.double() for k, t in expected.items()}, 4 * torch.finfo(dtype).eps)
    wide[1 : n + 1, 3 : d + 3] = untouched[1 : n + 1, 3 : d + 3]
    assert torch.equal(wide, untouched)


def test_strided_inputs(backend, device):
    """Rows of any stride, an expanded dz, columns that are not adjacent, a transposed B: read in place or copied."""
    n, d, z = 11, 24, 10
    x = numbers(n, d, z, 6, "none")
    options = {"reduction": "none", "eps": x["eps"].to(device)}
    x["dz"] = x["dz"][:1, :1].expand(n, z)
    plain = arguments(x, 0.5, device, **options)
    expected = run(plain, backend=backend, **EVERYTHING)
    apart = {
        "dhidden": plain["dhidden"].t().contiguous().t(),
        "hidden": torch.cat([plain["hidden"], plain["hidden"]], dim=1)[:, d:],
        "dz": plain["dz"][:1, :1].clone().expand(n, z),
        "dkl": torch.stack([plain["dkl"], plain["dkl"]], dim=1)[:, 0],
        "weight": plain["weight"].t().contiguous().t(),
        "lora_b": plain["lora_b"].t().contiguous().t(),
        "mulogvar": plain["mulogvar"].t().contiguous().t(),
    }
    found = run(plain | apart, backend=backend, **EVERYTHING)
    check(found, {k: t.double() for k, t in expected.items()}, 1e-6)


def test_what_lies_beside_a_tensor_is_not_read(backend, device):
    """Every tensor that is read in place, in the middle of NaNs."""
    n, d, z, r = 19, 41, 12, 5
    x = numbers(n, d, z, r)
    plain = arguments(x, 0.5, device, reduction="mean", eps=x["eps"].to(device))
    expected = run(plain, backend=backend, **EVERYTHING)
    amid = {}
    for name in ("dhidden", "dz", "hidden", "eps"):  # rows and columns
        rows, columns = plain[name].shape
        amid[name] = torch.full((rows + 70, columns + 300), float("nan"), device=device)[3 : rows + 3, 7 : columns + 7]
    for name in ("lora_b", "weight", "mulogvar"):  # rows: these are contiguous
        amid[name] = torch.full((len(plain[name]) + 300, plain[name].shape[1]), float("nan"), device=device)
        amid[name] = amid[name][: len(plain[name])]
    for name, place in amid.items():
        place.copy_(plain[name])
    found = run(plain | amid, backend=backend, **EVERYTHING)
    check(found, {k: t.double() for k, t in expected.items()}, 1e-6)


def test_no_rows(backend, device):
    x = numbers(0, 24, 8, 5)
    inputs = arguments(x, 0.5, device, reduction="mean")
    for inplace in (False, True):
        found = run(inputs, seed=1, inplace=inplace, backend=backend, **EVERYTHING)
        assert [found[name].shape for name in NAMES] == [(0, 24), (0, 5), (16, 24), (16,)]
        assert found["dweight"].abs().max() == found["dbias"].abs().max() == 0


def test_same_bits_twice(backend, device, monkeypatch):
    monkeypatch.setattr(kernels, "_column_splits", lambda *_: 3)
    x = numbers(70, 300, 20, 9)
    inputs = arguments(x, 0.37, device, reduction="mean")
    first, again = (run(inputs, seed=5, backend=backend, **EVERYTHING) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("route", ["torch", "fused", "product"])
def test_autocast_does_not_change_the_dtype(device, route, monkeypatch):
    monkeypatch.setattr(bottleneck, "_resolve_route", lambda *_: route)
    x = numbers(20, 32, 16, 5)
    inputs = arguments(x, 0.37, device, reduction="mean")
    expected = run(inputs, seed=1, **EVERYTHING)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = run(inputs, seed=1, **EVERYTHING)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


# --- low precision --------------------------------------------------------------------------------


def low_precision_cases() -> list:
    """tl.dot on bf16 is wrong in Triton's interpreter, so there bf16 is for the torch route; a GPU takes them all."""
    fp16, bf16 = torch.float16, torch.bfloat16
    on_cpu = [("cpu", route, fp16) for route in ("torch", "fused", "product")] + [("cpu", "torch", bf16)]
    on_gpu = [("cuda", route, dtype) for route in ("torch", "fused", "product") for dtype in (fp16, bf16)]
    return on_cpu + [pytest.param(*case, marks=pytest.mark.gpu) for case in on_gpu]


def eager(dhidden, dz, dkl, weight, mulogvar, inverse, lora_b, *, hidden, scaling, eps, **_) -> tuple:
    """The formulas in the tensors' own dtype, each rounded: plain PyTorch."""
    mu, logvar = mulogvar.chunk(2, dim=1)
    std, g = (logvar / 2).exp(), (dkl * inverse[0]).to(mu.dtype)
    pair = torch.cat([dz + g * mu, 0.5 * (dz * eps * std + g * (std * std - 1))], dim=1)
    total = dhidden + pair @ weight
    return total, scaling * (total @ lora_b), pair.t() @ hidden, pair.sum(dim=0)


@pytest.mark.parametrize("masters", [None, torch.float32])
@pytest.mark.parametrize(("n", "d", "z", "r"), [(77, 252, 12, 5), (123, 507, 123, 32)])
@pytest.mark.parametrize(("place", "route", "dtype"), low_precision_cases())
def test_low_precision_against_the_truth(place, route, dtype, n, d, z, r, masters, monkeypatch):
    """No further from float64 than plain PyTorch in that precision: on average, and at worst by one more rounding.

    Without the clamp, as in ib_bottleneck's: at a bound the gradient is all or nothing in either.
    """
    device, backend = torch.device(place), "torch" if route == "torch" else "triton"
    if route == "product":
        monkeypatch.setattr(bottleneck, "fits_on_chip", lambda *_: False)
    x = numbers(n, d, z, r)
    x["weight"][z:] /= 3.5
    x["dkl"].fill_(1.7)
    options = {"reduction": "batchmean", "logvar_range": None}
    inputs = arguments(x, 0.37, device, dtype, eps=x["eps"].to(device, dtype), **options)
    exact = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in inputs.items()}
    truth = reference.ib_lora_backward(**exact, **EVERYTHING)
    if masters is not None:
        wider = {name: inputs[name].to(masters) for name in ("weight", "lora_b")}
        found = run(inputs | wider, backend=backend, **EVERYTHING)
    else:
        found = run(inputs, backend=backend, **EVERYTHING)
    assert [found[name].dtype for name in NAMES] == [dtype, dtype, masters or dtype, masters or dtype]
    native = dict(zip(NAMES, eager(**inputs), strict=True))
    for name, expected in zip(NAMES, truth, strict=True):
        error = (found[name].double() - expected).abs()
        native_error = (native[name].double() - expected).abs()
        assert error.mean() <= native_error.mean(), name
        assert (error <= native_error.max() + torch.finfo(dtype).eps * expected.abs()).all(), name


# --- what it moves --------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_one_visit(trained):
    """The fused route reads dhidden once and stores the total and dlora; dmu | dlogvar only where dW needs them.

    Launch shapes of the interpreter: 64 rows, one split, so W and B are read once a row tile.
    """
    n, d, z, r = 128, 256, 48, 32
    x = numbers(n, d, z, r)
    inputs = arguments(x, 0.5, "cpu", torch.float16, reduction="mean", eps=x["eps"].half())
    with count_bytes() as traffic:
        run(inputs, backend="triton", needs_weight=trained)
    assert traffic.stored == 2 * n * (d + r + 2 * z * trained)
    row_tiles, rows_read = n // 64, d + 2 * z + z + z  # dhidden; mu | logvar; dz; eps
    factors = 2 * 64 * d + d * r  # W as BLOCK_Z = 64 has it, its last rows repeated; B
    assert traffic.loaded == 2 * n * rows_read + 2 * row_tiles * factors + row_tiles * 2 * 4


# --- routes and arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_the_launch_file_chooses_and_the_chip_limits(architecture, monkeypatch):
    """A shipped route that is not the library's product names the measurement that it rests on."""
    monkeypatch.setattr(kernels, "architecture_of", lambda _: architecture)
    entry = shapes_of(architecture)["ib_lora_backward"]
    assert entry["route"] == "product" or entry["measured"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        like, shape = (
            torch.empty(1, dtype=dtype),
            shapes_of(architecture)[f"ib_lora_backward_fused/{8 * dtype.itemsize}"],
        )
        latent, rank = shape["BLOCK_Z"], shape["BLOCK_R"]
        assert rank >= 32, "the paper's rank"
        assert bottleneck._resolve_route("fused", like, latent, rank) == "fused"
        assert bottleneck._resolve_route("fused", like, latent, rank + 1) == "product"
        assert bottleneck._resolve_route("fused", like, latent + 1, rank) == "product"
        assert bottleneck._resolve_route("torch", like, latent, rank + 1) == "torch"
    assert bottleneck._resolve_route("fused", torch.empty(1, dtype=torch.float64), 1, 1) == "product"


@pytest.mark.parametrize("entry", ["fused", "product"])
def test_auto_takes_the_files_route(monkeypatch, entry):
    asked = []
    inner = bottleneck._resolve_route
    monkeypatch.setattr(bottleneck, "_resolve_route", lambda route, *rest: asked.append(route) or inner(route, *rest))
    monkeypatch.setitem(shapes_of("interpreter"), "ib_lora_backward", {"route": entry})
    x = numbers(9, 12, 16, 4)
    inputs = arguments(x, 0.5, "cpu", reduction="mean")
    asked.clear()
    for name in ("auto", "triton", "torch"):
        run(inputs, seed=1, backend=name)
    assert asked == [entry, "fused", "torch"]


def test_a_rank_too_wide_for_the_chip_takes_the_product(device):
    x = numbers(9, 300, 12, 257)
    truth = by_autograd(x, 0.5, reduction="mean", eps=x["eps"])
    inputs = arguments(x, 0.5, device, reduction="mean", eps=x["eps"].to(device))
    found = run(inputs, backend="triton")
    check(found, {k: truth[k].to(device) for k in ("dhidden", "dlora")}, 1e-5)


def test_it_is_not_differentiable(device):
    x = numbers(9, 12, 8, 4)
    inputs = arguments(x, 0.5, device, reduction="mean")
    inputs["dhidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        run(inputs, seed=1)["dhidden"].sum().backward()


N5 = torch.ones(5, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mulogvar": torch.ones(5, 7)}, r"mulogvar: expected shape \[N, 2Z\] with Z >= 1, got \(5, 7\)"),
        ({"mulogvar": torch.ones(5, 6, dtype=torch.int32)}, "mulogvar: expected a floating dtype, got torch.int32"),
        ({"weight": torch.ones(8, 8)}, r"weight: expected shape \[6, D\] with D >= 1, got \(8, 8\)"),
        ({"weight": torch.ones(6, 8).half()}, "weight: expected torch.float32 or torch.float64, got torch.float16"),
        ({"dhidden": torch.ones(5, 9)}, r"dhidden: expected shape \(5, 8\), got \(5, 9\)"),
        ({"dhidden": N5.double()}, "dhidden: expected torch.float32, got torch.float64"),
        ({"dhidden": N5.to("meta")}, "dhidden: expected device cpu, got meta"),
        ({"dz": torch.ones(5, 4)}, r"dz: expected shape \(5, 3\), got \(5, 4\)"),
        ({"dz": torch.ones(5, 3).half()}, "dz: expected torch.float32, got torch.float16"),
        ({"dkl": torch.ones(5)}, r"dkl: expected shape \(\), got \(5,\)"),
        ({"dkl": torch.ones(()), "reduction": "none"}, r"dkl: expected shape \(5,\), got \(\)"),
        ({"inverse": torch.ones(2)}, r"inverse: expected shape \(1,\), got \(2,\)"),
        ({"lora_b": torch.ones(4, 8)}, r"lora_b: expected shape \[8, R\] with R >= 1, got \(4, 8\)"),
        ({"lora_b": torch.ones(8, 4).half()}, "lora_b: expected torch.float32 or torch.float64, got torch.float16"),
        ({"hidden": torch.ones(5, 7)}, r"hidden: expected shape \(5, 8\), got \(5, 7\)"),
        ({"hidden": None}, "hidden: expected the encoder's input, which the weight's gradient needs, got None"),
        ({"dhidden": None}, "dhidden: expected the buffer that inplace=True writes to, got None"),
        ({"dhidden": torch.ones(8, 5).t()}, r"dhidden: expected adjacent columns .*, got strides \(1, 5\)"),
        ({"dhidden": torch.ones(1, 8).expand(5, 8)}, r"rows that do not overlap, got strides \(0, 1\)"),
        ({"seed": None}, "seed: expected the forward's seed, or its eps: dz needs that noise, got None"),
        ({"seed": 2.0}, "seed: expected an int or a one-element int64 tensor, got float"),
        ({"mask": torch.ones(5)}, "mask: expected torch.bool, got torch.float32"),
        ({"eps": torch.ones(5, 4)}, r"eps: expected shape \(5, 3\), got \(5, 4\)"),
        ({"noise_ids": torch.zeros(4, 3, dtype=torch.int32)}, r"noise_ids: expected shape \(5, 3\), got \(4, 3\)"),
        ({"reduction": "average"}, "reduction: expected one of .* got 'average'"),
        ({"backend": "tpu"}, "backend: expected 'auto', 'triton' or 'torch', got 'tpu'"),
    ],
)
def test_a_bad_argument_is_named_and_the_buffer_left_alone(changes, message):
    tensors = {"dhidden": torch.ones(5, 8), "dz": torch.ones(5, 3), "dkl": torch.ones(()), "weight": torch.ones(6, 8)}
    tensors |= {"mulogvar": torch.ones(5, 6), "inverse": torch.ones(1), "lora_b": torch.ones(8, 4)}
    inputs = tensors | {"hidden": torch.ones(5, 8), "seed": 1, "inplace": True, "needs_weight": True} | changes
    with pytest.raises(ValueError, match=message):
        ib_lora_backward(**inputs)
    assert inputs["dhidden"] is None or inputs["dhidden"].is_meta or (inputs["dhidden"] == 1).all()
