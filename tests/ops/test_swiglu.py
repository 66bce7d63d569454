"""SwiGLU's two steps against autograd in float64: values, gradients in place, and memory that must stay untouched."""

import pytest
import torch
from checks import check
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import count_bytes

from ibft_kernels import reference, swiglu_backward_, swiglu_forward
from ibft_kernels.ops import swiglu

Tensors = dict[str, torch.Tensor]


def tensors(rows: int, columns: int, device: torch.device, dtype=torch.float32) -> Tensors:
    """Gates from the tails too; dh is no unit gradient."""
    made = {name: torch.randn(rows, columns, dtype=torch.float64) for name in ("dh", "gate", "up")}
    made["gate"] *= 4
    return {name: x.to(device, dtype) for name, x in made.items()}


def run(forward, backward_, t: Tensors, **options) -> Tensors:
    """Forward's h, and what backward leaves: h again and the two gradients."""
    dh, gate, up = (t[name].clone() for name in ("dh", "gate", "up"))
    h = forward(gate, up, **options)
    assert backward_(dh, gate, up, **options) is None
    return {"forward": h, "h": dh, "dgate": gate, "dup": up}


def ours(t: Tensors, backend: str) -> Tensors:
    return run(swiglu_forward, swiglu_backward_, t, backend=backend)


def check_same(found: Tensors, expected: Tensors, backend: str, names=("h", "dgate", "dup")) -> None:
    """To the bit; on the torch path, whose exp has other last bits at a row's end, to some units of the last place."""
    for name in names:
        if backend == "triton":
            assert torch.equal(found[name], expected[name]), name
        else:
            units = 2 if found[name].dtype.itemsize == 2 else 8
            check({name: found[name]}, {name: expected[name].double()}, units * torch.finfo(found[name].dtype).eps)


def truth(t: Tensors) -> Tensors:
    doubled = {name: x.double() for name, x in t.items()}
    return run(reference.swiglu_forward, reference.swiglu_backward_, doubled)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("columns", [1, 64, 123, 252, 507])
@pytest.mark.parametrize("rows", [1, 70])
def test_equals_float64_reference(backend, device, rows, columns, dtype, rel):
    t = tensors(rows, columns, device, dtype)
    found = ours(t, backend)
    check(found, truth(t), rel)
    assert {x.dtype for x in found.values()} == {dtype}


def test_the_reference_is_autograd():
    """The formulas once more, by hand: the truth above is not the code under test in other words."""
    t = tensors(20, 30, torch.device("cpu"), torch.float64)
    sigma = torch.sigmoid(t["gate"])
    expected = {
        "h": t["gate"] * sigma * t["up"],
        "dgate": t["dh"] * t["up"] * sigma * (1 + t["gate"] * (1 - sigma)),
        "dup": t["dh"] * t["gate"] * sigma,
    }
    check(truth(t), expected, 1e-14)


def native(t: Tensors) -> Tensors:
    """transformers' MLP between its products, under autograd in the tensors' own dtype."""
    gate, up = (t[name].clone().requires_grad_() for name in ("gate", "up"))
    h = torch.nn.functional.silu(gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), t["dh"])
    return {"forward": h.detach(), "h": h.detach(), "dgate": dgate, "dup": dup}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [123, 252, 507])
def test_low_precision_against_the_truth(backend, device, columns, dtype):
    """No further from float64 than autograd in that precision; a gradient rounds once, h twice."""
    t = tensors(70, columns, device, dtype)
    found, plain = ours(t, backend), native(t)
    # half a unit in the last place; the interpreter's conversion to bf16 truncates, so there a whole one
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the step of subnormal numbers
    for name, expected in truth(t).items():
        assert found[name].dtype == dtype
        error, native_error = ((x[name].double() - expected).abs() for x in (found, plain))
        roundings = 2.01 if name in ("forward", "h") else 1.0
        largest_up = 1 + t["up"].abs().max()
        assert (error <= roundings * rounding * expected.abs() + 1e-6 * expected.abs() + tiny * largest_up).all(), name
        # exp differs in its last bit, which now and then decides a rounding
        slack = (1e-3 + truncates * roundings) * rounding * expected.abs().mean()
        assert error.mean() <= native_error.mean() + slack, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_h_is_what_transformers_computes(backend, device, dtype):
    """silu rounds before the product: in fp16 another number than the product rounded once, in one element of five."""
    t = tensors(64, 128, device, dtype)
    found, expected = ours(t, backend), native(t)["h"]
    once = (torch.nn.functional.silu(t["gate"].float()) * t["up"].float()).to(dtype)
    check_same({"h": found["forward"]}, found, backend, names=["h"])
    if dtype == torch.float16:
        assert (found["h"] == expected).float().mean() > 0.999
        assert (found["h"] == once).float().mean() < 0.9


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_gates(backend, device):
    gate = torch.tensor([[-1e4, -100.0, -90.0, -20.0, -1.2784645, 0.0, -0.0, 20.0, 90.0, 100.0, 1e4]], device=device)
    t = {"gate": gate, "dh": torch.full_like(gate, 1.7), "up": torch.full_like(gate, -0.6)}
    found, expected = ours(t, backend), truth(t)
    for name in expected:
        assert found[name].isfinite().all(), name
        error = (found[name].double() - expected[name]).abs()
        # absolute where exp overflows in fp32, and at the root of silu'
        assert (error <= 1e-6 * expected[name].abs() + 1e-7).all(), name


def test_nan_is_not_hidden(backend, device):
    for name in ("dh", "gate", "up"):
        t = tensors(2, 20, device)
        t[name][1, 3] = float("nan")
        found = ours(t, backend)
        touched = {"dh": {"dgate", "dup"}, "gate": {"forward", "h", "dgate", "dup"}, "up": {"forward", "h", "dgate"}}
        for result, x in found.items():
            assert bool(x[1, 3].isnan()) == (result in touched[name]), (name, result)
            assert x.isnan().sum() == x[1, 3].isnan()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_halves_of_one_buffer_in_place(backend, device, dtype):
    """gate and up side by side, dh a part of another buffer; what lies around them stays."""
    t = tensors(33, 50, device, dtype)
    expected = ours(t, backend)
    both, other = (torch.full((33, width), 7.0, dtype=dtype, device=device) for width in (104, 61))
    both[:, :50], both[:, 52:102], other[:, 3:53] = t["gate"], t["up"], t["dh"]
    gate, up, dh = both[:, :50], both[:, 52:102], other[:, 3:53]
    check_same({"h": swiglu_forward(gate, up, backend=backend)}, expected, backend, names=["h"])
    swiglu_backward_(dh, gate, up, backend=backend)
    check_same({"h": dh, "dgate": gate, "dup": up}, expected, backend)
    assert (both[:, [50, 51, 102, 103]] == 7).all()
    assert (other[:, [*range(3), *range(53, 61)]] == 7).all()


def test_adjacent_halves_and_thirds(backend, device):
    t = tensors(9, 20, device)
    expected = ours(t, backend)
    for order in (("gate", "up", "dh"), ("dh", "up", "gate")):
        thirds = dict(zip(order, torch.cat([t[name] for name in order], dim=1).chunk(3, dim=1), strict=True))
        swiglu_backward_(**thirds, backend=backend)
        stacked = torch.cat([t[name] for name in order])  # one below the other
        below = dict(zip(order, stacked.chunk(3), strict=True))
        swiglu_backward_(**below, backend=backend)
        for found in (thirds, below):
            check_same({"h": found["dh"], "dgate": found["gate"], "dup": found["up"]}, expected, backend)


def test_any_strides_forward(backend, device):
    gate, up = torch.randn(2, 16, 30, device=device).transpose(1, 2)
    expected = swiglu_forward(gate.contiguous(), up.contiguous(), backend=backend)
    check_same({"h": swiglu_forward(gate, up, backend=backend)}, {"h": expected}, backend, names=["h"])
    spread = swiglu_forward(gate[:, :1].expand(30, 16), up, backend=backend)
    repeated = swiglu_forward(gate[:, :1].repeat(1, 16), up, backend=backend)
    check_same({"h": spread}, {"h": repeated}, backend, names=["h"])


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)])
def test_no_elements(backend, device, shape):
    t = {name: torch.empty(*shape, device=device) for name in ("dh", "gate", "up")}
    assert {x.shape for x in ours(t, backend).values()} == {shape}


def test_each_element_is_read_and_written_once():
    t = tensors(100, 300, torch.device("cpu"), torch.float16)
    with count_bytes() as forward:
        h = swiglu_forward(t["gate"], t["up"], backend="triton")
    with count_bytes() as backward:
        swiglu_backward_(**t, backend="triton")
    assert (forward.loaded, forward.stored) == (2 * h.nbytes, h.nbytes)
    assert (backward.loaded, backward.stored) == (3 * h.nbytes, 3 * h.nbytes)


class _Allocated(TorchDispatchMode):
    """Bytes of every new tensor, together."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
            known = {x.untyped_storage().data_ptr() for x in given}
            self.bytes += 0 if out.untyped_storage().data_ptr() in known else out.nbytes
        return out


@pytest.mark.parametrize(("dtype", "buffers"), [(torch.float32, 2), (torch.float16, 4), (torch.float64, 2)])
def test_the_torch_path_works_in_chunks(monkeypatch, dtype, buffers):
    """The same values as in one piece, within the scratch that the docstring tells of."""
    t = tensors(123, 50, torch.device("cpu"), dtype)
    expected = ours(t, "torch")
    for chunk in (1, 7 * 50 + 3):  # a row at least; seven rows
        monkeypatch.setattr(swiglu, "CPU_CHUNK", chunk)
        check_same(ours(t, "torch"), expected, "torch")
    with _Allocated() as allocated:
        swiglu._backward_torch_(*t.values())
    assert allocated.bytes == buffers * 7 * 50 * max(4, dtype.itemsize)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: the last rows of such a tensor are those of a small one."""
    rows, columns = 2**17 + 8, 2**14
    t = {name: torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for name in ("dh", "gate", "up")}
    tail = {name: x[-8:].clone() for name, x in t.items()}
    assert torch.equal(swiglu_forward(t["gate"], t["up"])[-8:], swiglu_forward(tail["gate"], tail["up"]))
    swiglu_backward_(**t)
    swiglu_backward_(**tail)
    assert all(torch.equal(t[name][-8:], tail[name]) for name in t)


# --- arguments ------------------------------------------------------------------------------------


def overlapping(kind: str) -> Tensors:
    """[6, 8] each, on one buffer."""
    buffer = torch.full((400,), 7.0)
    whole, apart = buffer[:48].view(6, 8), buffer[200:248].view(6, 8)
    wide = buffer[:120].view(6, 20)
    return {
        "gate is up": {"dh": apart, "gate": whole, "up": whole},
        "dh is up": {"dh": whole, "gate": apart, "up": whole},
        "shifted by a row": {"dh": buffer[40:88].view(6, 8), "gate": whole, "up": apart},
        "shifted by a column": {"dh": apart, "gate": wide[:, :8], "up": wide[:, 7:15]},
        "other strides": {"dh": apart, "gate": wide[:, 3:11], "up": buffer.as_strided((6, 8), (16, 1), 16)},
        "into the next row": {"dh": apart, "gate": wide[:, :8], "up": buffer.as_strided((6, 8), (20, 1), 13)},
        "in one row": {"dh": apart[:1], "gate": buffer.as_strided((1, 8), (0, 1)), "up": buffer[4:12][None]},
        "rows overlap": {"dh": buffer[100:].as_strided((6, 8), (7, 1)), "gate": whole, "up": apart},
        "one row for all": {"dh": buffer[100:108].expand(6, 8), "gate": whole, "up": apart},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gate is up", "up: expected memory apart from gate's"),
        ("dh is up", "up: expected memory apart from dh's"),
        ("shifted by a row", "gate: expected memory apart from dh's"),
        ("shifted by a column", "up: expected memory apart from gate's"),
        ("other strides", "up: expected memory apart from gate's"),
        ("into the next row", "up: expected memory apart from gate's"),
        ("in one row", "up: expected memory apart from gate's"),
        ("rows overlap", "dh: expected rows that do not overlap"),
        ("one row for all", "dh: expected rows that do not overlap"),
    ],
)
def test_shared_memory_is_refused_before_anything_is_written(backend, kind, message):
    t = overlapping(kind)
    with pytest.raises(ValueError, match=message):
        swiglu_backward_(**t, backend=backend)
    assert all((x == 7).all() for x in t.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.full((48,), 7.0)}, r"gate: expected a floating tensor \[N, I\], got torch.float32 of shape"),
        ({"gate": torch.full((6, 8), 7)}, "gate: expected a floating tensor"),
        ({"up": torch.full((6, 7), 7.0)}, r"up: expected torch.float32 of shape \(6, 8\) on cpu, as gate, got"),
        ({"up": torch.full((6, 8), 7.0).half()}, "up: expected torch.float32"),
        ({"up": torch.ones(6, 8, device="meta")}, "up: expected .* on cpu, as gate, got .* on meta"),
        ({"dh": torch.full((5, 8), 7.0)}, r"dh: expected torch.float32 of shape \(6, 8\)"),
        ({"dh": torch.full((8, 6), 7.0).t()}, r"dh: expected adjacent columns, got strides \(1, 6\)"),
        ({"up": torch.full((6, 16), 7.0)[:, ::2]}, r"up: expected adjacent columns, got strides \(16, 2\)"),
        ({"backend": "numpy"}, "backend: expected"),
    ],
)
def test_bad_arguments_are_named(backend, changes, message):
    arguments = {name: torch.full((6, 8), 7.0) for name in ("dh", "gate", "up")} | {"backend": backend} | changes
    with pytest.raises(ValueError, match=message):
        swiglu_backward_(**arguments)
    assert all((x == 7).all() for x in arguments.values() if isinstance(x, torch.Tensor) and x.device.type != "meta")
    if "strides" not in message and "dh" not in changes:
        del arguments["dh"]
        with pytest.raises(ValueError, match=message):
            swiglu_forward(**arguments)


def test_neither_has_a_gradient(backend, device):
    t = {name: x.requires_grad_() for name, x in tensors(3, 8, device).items()}
    h = swiglu_forward(t["gate"], t["up"], backend=backend)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        h.sum().backward()
