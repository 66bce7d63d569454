"""RMSNorm under a frozen weight against its float64 reference: values, gradients, what it saves and what it moves."""

import pytest
import torch
from checks import check
from traffic import count_bytes, within

from ibft_kernels import _launch, add_rms_norm, reference, rms_norm
from ibft_kernels.ops import rms_norm as module

EPS = 1e-5
NAMES = ("x", "residual", "weight", "dy", "dh")
Tensors = dict[str, torch.Tensor]


def tensors(*shape: int, device: torch.device, dtype=torch.float32, weight_dtype=None) -> Tensors:
    """Inputs and the gradients that arrive; rows of different sizes, so that no two share an rstd."""
    made = {name: torch.randn(*shape, dtype=torch.float64) for name in NAMES}
    made["x"] *= torch.rand(*shape[:-1], 1, dtype=torch.float64) * 3
    made["weight"] = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    made = {name: x.to(device, dtype) for name, x in made.items()}
    made["weight"] = made["weight"].to(weight_dtype or dtype)
    made["dy"] = made["dy"].to(torch.promote_types(dtype, made["weight"].dtype))
    return made


def leaves(t: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    made = {name: x.detach().to(dtype or x.dtype) for name, x in t.items()}
    return made | {name: made[name].requires_grad_() for name in ("x", "residual")}


def alone(op, t: Tensors, **options) -> Tensors:
    t = leaves(t)
    y = op(t["x"], t["weight"], EPS, **options)
    (dx,) = torch.autograd.grad(y, t["x"], t["dy"])
    return {"y": y.detach(), "dx": dx}


def added(op, t: Tensors, **options) -> Tensors:
    t = leaves(t)
    outputs = op(t["x"], t["residual"], t["weight"], EPS, **options)
    dx, dresidual = torch.autograd.grad(outputs, (t["x"], t["residual"]), (t["dy"], t["dh"]))
    y, h = (x.detach() for x in outputs)
    return {"y": y, "h": h, "dx": dx, "dresidual": dresidual}


def doubled(t: Tensors) -> Tensors:
    return {name: x.double() for name, x in t.items()}


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("columns", [32, 123, 252, 507])
@pytest.mark.parametrize("rows", [1, 70])
def test_equals_float64_reference(backend, device, rows, columns, dtype, rel):
    t = tensors(rows, columns, device=device, dtype=dtype)
    found = alone(rms_norm, t, backend=backend)
    check(found, alone(reference.rms_norm, doubled(t)), rel)
    both = added(add_rms_norm, t, backend=backend)
    check(both, added(reference.add_rms_norm, doubled(t)), rel)
    assert {x.dtype for x in (*found.values(), *both.values())} == {dtype}


def test_one_column(backend, device):
    """y is the sign times the weight, and what is left of the gradient after cancelling is eps / x^2 of it."""
    t = tensors(70, 1, device=device, dtype=torch.float64)
    found, expected = alone(rms_norm, t, backend=backend), alone(reference.rms_norm, t)
    check({"y": found["y"]}, {"y": expected["y"]}, 1e-13)
    largest = (t["dy"] * t["weight"] / t["x"]).abs()
    assert ((found["dx"] - expected["dx"]).abs() <= 1e-13 * largest).all()


def llama(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """transformers' LlamaRMSNorm.forward."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def add_llama(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    h = residual + x
    return llama(h, weight, eps), h


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [123, 252, 507])
def test_low_precision_against_the_truth(backend, device, columns, dtype):
    """No further from float64 than transformers' norm in that precision, and each gradient of one norm rounds once."""
    t = tensors(70, columns, device=device, dtype=dtype)
    # half a unit in the last place; the interpreter's conversion to bf16 truncates, so there a whole one
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    for run, op, native in ((alone, rms_norm, llama), (added, add_rms_norm, add_llama)):
        found, plain = run(op, t, backend=backend), run(native, t)
        for name, expected in run(reference.rms_norm if run is alone else reference.add_rms_norm, doubled(t)).items():
            assert found[name].dtype == dtype
            error, native_error = ((x[name].double() - expected).abs() for x in (found, plain))
            scale = expected.abs().mean()
            # the fp32 sums differ in their last bits, which now and then decides a rounding
            assert error.mean() <= native_error.mean() + (truncates * 2 + 1e-3) * rounding * scale, (run, name)
            assert error.max() <= native_error.max() + torch.finfo(dtype).eps * expected.abs().max(), (run, name)
            if run is alone:
                roundings = 2.01 if name == "y" else 1  # y: n, then the product
                assert (error <= roundings * rounding * expected.abs() + 3e-6 * (1 + scale)).all(), name


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
)
def test_a_weight_of_another_dtype(backend, device, dtype, weight_dtype):
    t = tensors(33, 40, device=device, dtype=dtype, weight_dtype=weight_dtype)
    for run, op, twin in ((alone, rms_norm, reference.rms_norm), (added, add_rms_norm, reference.add_rms_norm)):
        found, expected = run(op, t, backend=backend), run(twin, t)
        assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in expected.items()}
        # where x is 16 bits wide, autograd rounds w dy to that too
        check(found, doubled(expected), max(torch.finfo(dtype).eps, 2e-6))
        if weight_dtype == torch.float32:
            assert (found["y"] == expected["y"]).double().mean() > 0.999, "n is rounded before the product"


def test_the_normalised_value_rounds_before_the_weight(backend, device):
    """In fp16 that is another number than the product rounded once, in one element of five."""
    t = tensors(64, 128, device=device, dtype=torch.float16)
    y = rms_norm(t["x"], t["weight"], EPS, backend=backend)
    once = reference.rms_norm(t["x"].float(), t["weight"].float(), EPS).half()
    assert (y == llama(t["x"], t["weight"], EPS)).float().mean() > 0.999
    assert (y == once).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_y_is_the_norm_of_the_h_that_goes_on(backend, device, dtype):
    """To the bit: what the layers above read is what was normalised, and what was normalised is the rounded sum."""
    t = tensors(64, 128, device=device, dtype=dtype)
    y, h = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend)
    assert torch.equal(h, t["x"] + t["residual"])
    assert torch.equal(y, rms_norm(h, t["weight"], EPS, backend=backend))


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # rows beyond the last, with eps 0
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 0.3])
def test_eps(backend, device, eps):
    """In double precision all the way, where it matters: beside squares of its own size."""
    x = torch.randn(9, 24, dtype=torch.float64, device=device) * 1e-3
    weight = torch.randn(24, dtype=torch.float64, device=device)
    y = rms_norm(x, weight, eps, backend=backend)
    check({"y": y}, {"y": reference.rms_norm(x, weight, eps)}, 1e-13)


def test_a_row_of_zeros(backend, device):
    t = tensors(3, 40, device=device) | {"x": torch.zeros(3, 40, device=device)}
    found = alone(rms_norm, t, backend=backend)
    assert (found["y"] == 0).all()
    check(found, alone(reference.rms_norm, doubled(t)), 2e-6)


def test_nan_stays_in_its_row(backend, device):
    t = tensors(4, 40, device=device)
    t["x"][2, 7] = float("nan")
    for name, found in alone(rms_norm, t, backend=backend).items():
        assert found[2].isnan().all(), name
        assert found[[0, 1, 3]].isfinite().all(), name


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3, 64), (2, 3, 5, 32), (0, 16), (3, 0, 16)])
def test_leading_dimensions(backend, device, shape):
    t = tensors(*shape, device=device, dtype=torch.float64)
    found = added(add_rms_norm, t, backend=backend)
    check(found, added(reference.add_rms_norm, t), 1e-13)
    check(alone(rms_norm, t, backend=backend), alone(reference.rms_norm, t), 1e-13)


def test_strided_rows_are_read_in_place(backend, device, monkeypatch):
    """Halves of wider tensors, each with a stride of its own; heads turned about; gradients of stride 0."""
    base = tensors(19, 60, device=device, dtype=torch.float64)
    t = dict(base)
    for i, name in enumerate(("x", "residual", "dy", "dh")):
        wide = torch.full((19, 70 + 9 * i), float("nan"), dtype=torch.float64, device=device)
        wide[:, i : 60 + i] = base[name]
        t[name] = wide[:, i : 60 + i]
    assert module.as_rows(t["x"]).data_ptr() == t["x"].data_ptr()
    for run, op in ((alone, rms_norm), (added, add_rms_norm)):
        found, expected = run(op, t, backend=backend), run(op, base, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    t["dy"] = torch.tensor(0.3, dtype=torch.float64, device=device).expand(19, 60)
    t["dh"] = torch.arange(60, dtype=torch.float64, device=device).expand(19, 60)
    check(added(add_rms_norm, t, backend=backend), added(reference.add_rms_norm, t), 1e-13)
    turned = {name: x if name == "weight" else x.reshape(19, 4, 15).transpose(0, 1) for name, x in base.items()}
    turned["weight"] = base["weight"][::4]
    check(added(add_rms_norm, turned, backend=backend), added(reference.add_rms_norm, turned), 1e-13)


def test_rows_wider_than_a_tile(device, monkeypatch):
    """A program a row, with more warps; and two rows a program."""
    t = tensors(5, 507, device=device)
    expected = added(reference.add_rms_norm, doubled(t))
    for tile in (16, 1024):
        shape = {"TILE": tile, "num_warps": 4, "num_stages": 1}
        monkeypatch.setitem(_launch.chosen, (_launch.architecture_of(device), "rms_norm"), shape)
        check(added(add_rms_norm, t, backend="triton"), expected, 2e-6)


@pytest.mark.parametrize(
    ("tile", "warps", "columns", "expected"),
    [
        (2048, 4, 64, (32, 64, 4)), (2048, 4, 2048, (1, 2048, 4)), (2048, 4, 4000, (1, 4096, 8)),
        (2048, 4, module.WIDEST, (1, 16384, 32)), (512, 8, module.WIDEST, (1, 16384, 32)), (2048, 4, 1, (128, 16, 4)),
    ],
)  # fmt: skip
def test_row_blocks(tile, warps, columns, expected):
    blocks = module.row_blocks({"TILE": tile, "num_warps": warps}, columns)
    assert blocks == dict(zip(("BLOCK_N", "BLOCK_C", "num_warps"), expected, strict=True))


@pytest.mark.parametrize("columns", [module.WIDEST, module.WIDEST + 1])
def test_the_widest_rows(backend, device, columns):
    t = tensors(2, columns, device=device)
    if backend == "triton" and columns > module.WIDEST:
        with pytest.raises(RuntimeError, match="cannot run here: rows of 16385 columns, 16384 at most"):
            rms_norm(t["x"], t["weight"], EPS, backend=backend)
        backend = "auto"
    check(added(add_rms_norm, t, backend=backend), added(reference.add_rms_norm, doubled(t)), 2e-6)


def test_the_torch_path_works_in_chunks(monkeypatch):
    for dtype in (torch.float32, torch.float16):
        t = tensors(37, 50, device=torch.device("cpu"), dtype=dtype)
        expected = added(add_rms_norm, t, backend="torch")
        for chunk in (1, 7 * 50):
            monkeypatch.setattr(module, "CPU_CHUNK", chunk)
            found = added(add_rms_norm, t, backend="torch")
            check(found, doubled(expected), 2 * torch.finfo(dtype).eps)
        monkeypatch.undo()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: the last rows of such a tensor are those of a small one."""
    rows, columns = 2**19 + 8, 4096
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    y = rms_norm(x, weight, EPS)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    tail = x.detach()[-8:].clone().requires_grad_()
    y_tail = rms_norm(tail, weight, EPS)
    assert torch.equal(y[-8:], y_tail)
    assert torch.equal(dx[-8:], torch.autograd.grad(y_tail, tail, y_tail.detach())[0])


# --- which gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("arriving", ["y", "h", "both"])
@pytest.mark.parametrize("wanted", ["x", "residual", "both"])
def test_partial_gradients(backend, device, wanted, arriving):
    t = tensors(19, 40, device=device, dtype=torch.float64)
    results = []
    for op, options in ((add_rms_norm, {"backend": backend}), (reference.add_rms_norm, {})):
        x, residual = (t[name].clone().requires_grad_(wanted in (name, "both")) for name in ("x", "residual"))
        y, h = op(x, residual, t["weight"], EPS, **options)
        pairs = {"y": (y, t["dy"]), "h": (h, t["dh"])}
        outputs, upstream = zip(*[pair for name, pair in pairs.items() if arriving in (name, "both")], strict=True)
        inputs = [leaf for leaf in (x, residual) if leaf.requires_grad]
        results.append(dict(enumerate(torch.autograd.grad(outputs, inputs, upstream))))
    check(*results, 1e-13)


def test_a_gradient_at_h_alone_runs_nothing(backend, device, monkeypatch):
    t = leaves(tensors(5, 16, device=device))
    _, h = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend)
    monkeypatch.setattr(module, "_backward_op", None)
    dx, dresidual = torch.autograd.grad(h, (t["x"], t["residual"]), t["dh"])
    assert torch.equal(dx, t["dh"])
    assert torch.equal(dresidual, t["dh"])


def test_two_leaves_do_not_share_their_gradient(backend, device):
    """The op hands one tensor to both; what autograd accumulates into a leaf is the leaf's own."""
    t = leaves(tensors(5, 16, device=device))
    for outputs in ([0], [1], [0, 1]):
        t["x"].grad = t["residual"].grad = None
        pair = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend)
        torch.autograd.backward([pair[i] for i in outputs], [t[("dy", "dh")[i]] for i in outputs])
        assert t["x"].grad.data_ptr() != t["residual"].grad.data_ptr()
        assert torch.equal(t["x"].grad, t["residual"].grad)


def test_backward_twice(backend, device):
    t = leaves(tensors(5, 16, device=device))
    outputs = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend)
    runs = [torch.autograd.grad(outputs, t["x"], (t["dy"], t["dh"]), retain_graph=True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(t["dh"], t["dh"].clone())


def test_the_arriving_gradients_are_not_written(backend, device):
    t = tensors(5, 16, device=device)
    before = {name: x.clone() for name, x in t.items()}
    added(add_rms_norm, t, backend=backend)
    alone(rms_norm, t, backend=backend)
    assert all(torch.equal(t[name], before[name]) for name in NAMES)


def test_second_derivative_is_refused(backend, device):
    t = leaves(tensors(3, 16, device=device))
    upstream = torch.randn(3, 16, device=device, requires_grad=True)
    y = rms_norm(t["x"], t["weight"], EPS, backend=backend)
    (dx,) = torch.autograd.grad(y, t["x"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saved_bytes(backend, device, dtype):
    """x or h in its own dtype, in the memory it has; one fp32 number a row; the weight."""
    t = leaves(tensors(40, 64, device=device, dtype=dtype))
    for with_residual in (False, True):
        saved = []
        keep = saved.append
        with torch.autograd.graph.saved_tensors_hooks(lambda s, keep=keep: keep(s) or s, lambda s: s):
            if with_residual:
                _, held = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend=backend)
            else:
                held = t["x"]
                rms_norm(held, t["weight"], EPS, backend=backend)
        new = [s for s in saved if s.data_ptr() not in (held.data_ptr(), t["weight"].data_ptr())]
        assert sum(s.nbytes for s in saved) == held.nbytes + t["weight"].nbytes + 40 * 4
        assert [(s.dtype, s.shape) for s in new] == [(torch.float32, (40,))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_each_element_is_read_and_written_once(dtype):
    """The weight, once a program, and rstd, once a row, fit in the slack."""
    t = leaves(tensors(300, 120, device=torch.device("cpu"), dtype=dtype))
    size, rstd = t["x"].nbytes, 300 * 4
    with count_bytes() as forward:
        y = rms_norm(t["x"], t["weight"], EPS, backend="triton")
    with count_bytes() as backward:
        y.backward(t["dy"])
    assert within(forward.loaded, size)
    assert within(backward.loaded, 2 * size)
    assert forward.stored == size + rstd
    assert backward.stored == size
    with count_bytes() as forward:
        pair = add_rms_norm(t["x"], t["residual"], t["weight"], EPS, backend="triton")
    with count_bytes() as backward:
        torch.autograd.backward(pair, (t["dy"], t["dh"]))
    assert within(forward.loaded, 2 * size)
    assert within(backward.loaded, 3 * size)
    assert forward.stored == 2 * size + rstd
    assert backward.stored == size


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x: expected a floating tensor"),
        ({"x": torch.tensor(1.0)}, "x: expected a floating tensor"),
        ({"x": torch.ones(4, 0)}, r"x: expected a floating tensor \[..., C\], C >= 1, got .* \(4, 0\)"),
        ({"weight": torch.ones(7)}, r"weight: expected .* of shape \(8,\) on cpu, got torch.float32 of shape \(7,\)"),
        ({"weight": torch.ones(1, 8)}, "weight: expected"),
        ({"weight": torch.ones(8, dtype=torch.int32)}, "weight: expected a floating tensor"),
        ({"weight": torch.ones(8, device="meta")}, "weight: expected .* on cpu, got .* on meta"),
        ({"weight": torch.ones(8, requires_grad=True)}, "weight: expected a frozen tensor, got one that requires"),
        ({"eps": -1e-6}, "eps: expected 0 or more, got -1e-06"),
        ({"eps": float("nan")}, "eps: expected 0 or more, got nan"),
        ({"residual": torch.ones(8)}, r"residual: expected .* of shape \(4, 8\)"),
        ({"residual": torch.ones(4, 8).half()}, "residual: expected torch.float32 .*, got torch.float16"),
        ({"residual": torch.ones(4, 8, device="meta")}, "residual: expected .* on cpu, got .* on meta"),
        ({"backend": "numpy"}, "backend: expected"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": torch.ones(4, 8), "residual": torch.ones(4, 8), "weight": torch.ones(8), "eps": EPS} | changes
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments)
    if "residual" not in changes:
        del arguments["residual"]
        with pytest.raises(ValueError, match=message):
            rms_norm(**arguments)
