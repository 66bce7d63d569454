"""Below ib_bottleneck: its registered ops, which of them write into a given buffer, and which route a call takes."""

import pytest
import torch
from bottleneck_problem import problem

from ibft_kernels import _launch, ib_bottleneck
from ibft_kernels._launch import ARCHITECTURES, shapes_of
from ibft_kernels.ops import _ib_bottleneck_triton as kernels
from ibft_kernels.ops import ib_bottleneck as module

OPS = torch.ops.ibft_kernels


@pytest.fixture(params=["torch", "fused", "product"])
def route(request: pytest.FixtureRequest) -> str:
    return request.param


def settings(route: str, **changes) -> list:
    """The registered ops' arguments after `mask`, up to the route."""
    values = {"seed_tensor": None, "seed": 7, "range": [-4.0, 4.0], "reduction": "batchmean", "route": route} | changes
    return list(values.values())


# --- the buffer-writing op ------------------------------------------------------------------------


def test_an_fp32_buffer_receives_an_unrounded_product(route, device):
    """Of fp16 factors: what is added to the buffer is the fp32 product, not one rounded to fp16 first."""
    hidden, weight, bias = (t.detach() for t in problem(40, 64, 16, device, torch.float16, torch.float32).values())
    noise = None, None, None
    _, _, inverse, mulogvar, eps = OPS.ib_bottleneck(hidden, weight, bias, *noise, None, *settings(route))
    dz = torch.randn(40, 16, device=device).half()
    noise = None, eps if route == "torch" else None, None
    inputs = dz, None, None, weight, mulogvar, inverse, *noise
    pair = OPS.ib_bottleneck_backward(
        dz, None, hidden, weight, mulogvar, inverse, *noise, *settings(route), *(True,) * 3
    )
    buffer = torch.zeros(40, 64, device=device)
    OPS.ib_bottleneck_backward_(buffer, *inputs, *settings(route), False, False)
    assert not torch.equal(buffer, buffer.half().float()), "rounded to fp16 on the way"
    assert (buffer - pair[0].float()).abs().max() <= torch.finfo(torch.float16).eps * buffer.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": None}, "hidden: expected the encoder's input, which the weight's gradient needs, got None"),
        ({"hidden": torch.ones(5, 7)}, r"hidden: expected shape \(5, 8\) with adjacent columns, got \(5, 7\)"),
        ({"dz": torch.ones(4, 3)}, r"dz: expected shape \(5, 3\) with adjacent columns, got \(4, 3\)"),
        ({"dz": torch.ones(5, 3).half()}, "dz: expected torch.float32 on cpu, got torch.float16 on cpu"),
        ({"mulogvar": torch.ones(5, 4)}, r"mulogvar: expected shape \(5, 6\)"),
    ],
)
def test_a_bad_tensor_leaves_the_buffer_alone(route, changes, message):
    tensors = {"dz": torch.ones(5, 3), "hidden": torch.ones(5, 8), "mulogvar": torch.ones(5, 6)} | changes
    buffer, eps = torch.zeros(5, 8), torch.ones(5, 3)
    saved = tensors["hidden"], torch.ones(6, 8), tensors["mulogvar"], torch.ones(1), None, eps, None
    with pytest.raises(ValueError, match=message):
        OPS.ib_bottleneck_backward_(buffer, tensors["dz"], None, *saved, *settings(route), True, True)
    assert (buffer == 0).all()


@pytest.mark.parametrize("arriving", ["z", "kl", "both"])
@pytest.mark.parametrize(
    ("dtype", "buffer_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)],
)
def test_adds_into_a_strided_buffer_and_touches_nothing_else(route, device, dtype, buffer_dtype, arriving):
    n, d, z = 37, 41, 12
    hidden, weight, bias = (t.detach() for t in problem(n, d, z, device, dtype, torch.float32).values())
    noise = None, None, torch.ones(n, dtype=torch.uint8, device=device)
    _, _, inverse, mulogvar, eps = OPS.ib_bottleneck(hidden, weight, bias, *noise, None, *settings(route))
    dz = None if arriving == "kl" else torch.randn(n, z, device=device).to(dtype)
    dkl = None if arriving == "z" else torch.tensor(1.7, device=device)
    noise = None, eps if route == "torch" else None, noise[2]
    inputs = dz, dkl, hidden, weight, mulogvar, inverse, *noise
    before = [None if t is None else t.clone() for t in inputs]
    dhidden, *expected = OPS.ib_bottleneck_backward(*inputs, *settings(route), True, True, True)

    wide = torch.randn(n + 2, d + 10, device=device).to(buffer_dtype)
    untouched, buffer = wide.clone(), wide[1 : n + 1, 3 : d + 3]
    truth = buffer.double() + dhidden.double()
    found = OPS.ib_bottleneck_backward_(buffer, *inputs, *settings(route), True, True)
    # the buffer is rounded once; the functional dhidden was rounded to hidden's dtype before this test added it
    bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((buffer.double() - truth).abs() <= bound * (truth.abs() + dhidden.double().abs() + 1e-2)).all()
    assert (dhidden != 0).any()
    wide[1 : n + 1, 3 : d + 3] = untouched[1 : n + 1, 3 : d + 3]
    assert torch.equal(wide, untouched)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(b is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.ones(5, 9), r"dhidden: expected shape \(5, 8\) with adjacent columns, got \(5, 9\)"),
        (
            torch.ones(8, 5).t(),
            r"dhidden: expected shape \(5, 8\) with adjacent columns, got \(5, 8\), strides \(1, 5\)",
        ),
        (
            torch.ones(5, 8).double(),
            "dhidden: expected torch.float32, or torch.float32 for a 16-bit one, got torch.float64",
        ),
        (
            torch.ones(5, 8).half(),
            "dhidden: expected torch.float32, or torch.float32 for a 16-bit one, got torch.float16",
        ),
    ],
)
def test_a_bad_buffer_is_named_and_left_alone(route, buffer, message):
    before = buffer.clone()
    inputs = torch.ones(5, 4), None, torch.ones(5, 8), torch.ones(8, 8), torch.ones(5, 8), torch.ones(1)
    with pytest.raises(ValueError, match=message):
        OPS.ib_bottleneck_backward_(buffer, *inputs, None, torch.ones(5, 4), None, *settings(route), True, True)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_is_computed(route, device, needs):
    hidden, weight, _ = (t.detach() for t in problem(13, 24, 20, device).values())
    saved = weight, torch.randn(13, 40, device=device), torch.ones(1, device=device)
    dz, eps = torch.randn(2, 13, 20, device=device)
    arguments = dz, None, hidden if needs[1] else None, *saved, None, eps, None, *settings(route)
    grads = OPS.ib_bottleneck_backward(*arguments, *needs)
    assert [g.shape for g in grads] == [
        s if need else (0,) for s, need in zip([(13, 24), (40, 24), (40,)], needs, strict=True)
    ]


# --- routes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [f"sm_{a}" for a in ARCHITECTURES])
def test_the_launch_file_chooses_and_the_chip_limits(architecture, monkeypatch):
    """A shipped route that is not the library's product names the measurement that it rests on."""
    for place in (_launch, kernels):
        monkeypatch.setattr(place, "architecture_of", lambda _: architecture)
    entry = shapes_of(architecture)["ib_bottleneck"]
    assert entry["route"] == "product" or entry["measured"]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        hidden = torch.empty(1, dtype=dtype)
        widest = shapes_of(architecture)[f"ib_bottleneck_backward/{8 * dtype.itemsize}"]["BLOCK_Z"]
        assert module._resolve_route("fused", hidden, widest) == "fused"
        assert module._resolve_route("fused", hidden, widest + 1) == "product"
        assert module._resolve_route("torch", hidden, widest) == "torch"
    assert module._resolve_route("fused", torch.empty(1, dtype=torch.float64), 1) == "product"


@pytest.mark.parametrize("entry", ["fused", "product"])
def test_auto_takes_the_files_route(monkeypatch, entry):
    asked = []
    inner = module._resolve_route
    monkeypatch.setattr(module, "_resolve_route", lambda route, *rest: asked.append(route) or inner(route, *rest))
    monkeypatch.setitem(shapes_of("interpreter"), "ib_bottleneck", {"route": entry})
    inputs = problem(9, 12, 16, "cpu")
    ib_bottleneck(**inputs, seed=1)
    ib_bottleneck(**inputs, seed=1, backend="triton")
    assert asked == [entry, "fused"]


@pytest.mark.parametrize("grad", [True, False])
def test_a_search_of_the_route_at_first_use(monkeypatch, grad):
    """IBFT_AUTOTUNE=1 as a GPU has it, on the kernels in the interpreter: both routes run, forward and backward."""
    from ibft_kernels import tune

    runs = []
    monkeypatch.setattr(_launch, "chosen", {})
    monkeypatch.setattr(tune, "chosen", _launch.chosen)
    for place in (_launch, tune):
        monkeypatch.setattr(place, "architecture_of", lambda _: "sm_90")
    interpreter = shapes_of("interpreter")
    monkeypatch.setattr(_launch, "shapes_of", lambda _: interpreter)
    monkeypatch.setattr(tune, "_encoder", lambda *_: (None, torch.randn(8, 16), torch.randn(8, 16), 1))
    monkeypatch.setattr(tune, "_time_ms", lambda run: run() or runs.append(1) or float(len(runs)))
    monkeypatch.setattr(tune, "KERNELS", {"ib_bottleneck": tune.KERNELS["ib_bottleneck"]} | _only_stored(tune))
    monkeypatch.setenv("IBFT_AUTOTUNE", "1")
    with torch.set_grad_enabled(grad):
        z, _ = ib_bottleneck(**problem(9, 12, 16, "cpu"), seed=1)
    assert z.shape == (9, 16)
    assert set(_launch.chosen["sm_90", "ib_bottleneck"]) == {"route"}


def _only_stored(tune) -> dict:
    """Every other entry with no candidate but the file's own, and nothing to run."""
    idle = tune.Work(lambda: None)
    return {key: (lambda *_: idle, []) for key in tune.KERNELS if key != "ib_bottleneck"}


@pytest.mark.parametrize(("row_tiles", "expected"), [(1, 8), (2, 5), (9, 1), (10, 1), (1000, 1)])
def test_columns_are_split_until_the_device_is_filled(monkeypatch, row_tiles, expected):
    properties = type("Properties", (), {"multi_processor_count": 9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert kernels._column_splits(row_tiles, 8, torch.device("cuda")) == expected
