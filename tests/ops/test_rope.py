"""The rotary embedding against transformers' own and its float64 reference: values, gradients, strides, bytes moved."""

import pytest
import torch
from checks import check
from traffic import count_bytes

from ibft_kernels import _launch, reference, rotate
from ibft_kernels.ops import rope as module

NAMES = ("q", "k", "dq", "dk")
Tensors = dict[str, torch.Tensor]


def table(tokens: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, d] of transformers' layout: each frequency twice."""
    positions = torch.arange(tokens) % 7 + 3
    angles = positions[:, None] / 10_000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def tensors(
    tokens: int, query_heads: int, key_heads: int, d: int, *, device, dtype=torch.float64, table_dtype=None, free=False
) -> Tensors:
    """q and k, the gradients that arrive, and the table; with `free`, halves of cos and sin that are not equal."""
    heads = {"q": query_heads, "k": key_heads, "dq": query_heads, "dk": key_heads}
    made = {name: torch.randn(tokens, n, d, dtype=torch.float64) for name, n in heads.items()}
    made = {name: x.to(device, dtype) for name, x in made.items()}
    cos, sin = torch.randn(2, tokens, d, dtype=torch.float64) if free else table(tokens, d)
    return made | {name: x.to(device, table_dtype or dtype) for name, x in (("cos", cos), ("sin", sin))}


def run(op, t: Tensors, **options) -> Tensors:
    q, k = (t[name].detach().requires_grad_() for name in ("q", "k"))
    outputs = op(q, k, t["cos"], t["sin"], **options)
    dq, dk = torch.autograd.grad(outputs, (q, k), (t["dq"], t["dk"]))
    return dict(zip(NAMES, (*(x.detach() for x in outputs), dq, dk), strict=True))


def doubled(t: Tensors) -> Tensors:
    return {name: x.double() for name, x in t.items()}


def transformers_rotate(q, k, cos, sin):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    return tuple(x[0] for x in found)


def slices(tokens: int, query_heads: int, key_heads: int, d: int, **kind) -> tuple[torch.Tensor, ...]:
    """q and k as slices of one projection's output, and that output."""
    buffer = torch.randn(tokens, (query_heads + 2 * key_heads) * d, **kind).requires_grad_()
    q, k, _ = buffer.split([query_heads * d, key_heads * d, key_heads * d], 1)
    return q.unflatten(1, (query_heads, d)), k.unflatten(1, (key_heads, d)), buffer


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 6, 16, 24, 32, 80, 128, 256])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(6, 2), (3, 3), (4, 1)])
def test_values_and_gradients_are_those_of_transformers(backend, device, d, query_heads, key_heads):
    q, k, buffer = slices(19, query_heads, key_heads, d, dtype=torch.float64, device=device)
    cos, sin = (x.to(device) for x in table(19, d))
    before = buffer.detach().clone()
    found, expected = rotate(q, k, cos, sin, backend=backend), transformers_rotate(q, k, cos, sin)
    upstream = [torch.randn_like(x) for x in expected]
    kept = [x.clone() for x in upstream]
    (found_grad,) = torch.autograd.grad(found, buffer, upstream)
    (expected_grad,) = torch.autograd.grad(expected, buffer, kept)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(found_grad, expected_grad, rtol=0, atol=1e-14)
    assert torch.equal(buffer, before), "an input was overwritten"
    assert all(map(torch.equal, upstream, kept)), "an incoming gradient was overwritten"


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-15), (torch.float32, 3e-7)])
@pytest.mark.parametrize("d", [24, 80, 128])
def test_equals_float64_reference(backend, device, d, dtype, rel):
    """Halves of cos and sin need not be equal: the rule in full, which transformers' layout alone does not show."""
    t = tensors(70, 5, 2, d, device=device, dtype=dtype, free=True)
    found = run(rotate, t, backend=backend)
    check(found, run(reference.rotate, doubled(t)), rel)
    assert {x.dtype for x in found.values()} == {dtype}


def test_the_reference_is_transformers():
    t = tensors(9, 4, 2, 24, device="cpu", free=True)
    check(run(reference.rotate, t), run(transformers_rotate, t), 1e-15)


def test_the_gradient_is_the_derivative(backend):
    t = tensors(3, 2, 1, 4, device="cpu", free=True)
    leaves = t["q"].requires_grad_(), t["k"].requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, t["cos"], t["sin"], backend=backend), leaves, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [None, torch.float32])
@pytest.mark.parametrize("d", [24, 64])
def test_low_precision_against_the_truth(backend, device, d, dtype, table_dtype):
    """No further from float64 than transformers' in that precision. Also with an fp32 table, as under autocast: q and
    k keep their dtype there, where transformers promotes them. The Triton path rounds once.
    """
    t = tensors(64, 6, 2, d, device=device, dtype=dtype, table_dtype=table_dtype)
    found = run(rotate, t, backend=backend)
    native = run(lambda *x: tuple(y.to(dtype) for y in transformers_rotate(*x)), t)
    # half a unit in the last place; the interpreter's conversion to bf16 truncates, so there a whole one
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    for name, expected in run(reference.rotate, doubled(t)).items():
        assert found[name].dtype == dtype
        error, native_error = ((x[name].double() - expected).abs() for x in (found, native))
        scale = expected.abs().mean()
        # the sums differ in their last bits, which now and then decides a rounding
        assert error.mean() <= native_error.mean() + (truncates * 2 + 1e-3) * rounding * scale, name
        assert error.max() <= native_error.max() + rounding * expected.abs().max(), name
        if backend == "triton" or table_dtype == torch.float32:
            assert (error <= rounding * expected.abs() + 1e-6).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_float64_table_is_used_in_full(backend, device, dtype):
    t = tensors(16, 2, 1, 24, device=device, dtype=dtype, table_dtype=torch.float64)
    found, exact = run(rotate, t, backend=backend), run(reference.rotate, t)
    assert all(torch.equal(found[name], exact[name]) for name in NAMES)


def test_q_and_k_of_two_dtypes(backend, device):
    t = tensors(16, 2, 1, 24, device=device, dtype=torch.float32)
    t |= {name: t[name].double() for name in ("k", "dk")}
    found = run(rotate, t, backend=backend)
    assert [found[name].dtype for name in NAMES] == [torch.float32, torch.float64] * 2
    check(found, run(reference.rotate, doubled(t)), 3e-7)
    check({"k": found["k"]}, {"k": run(reference.rotate, doubled(t))["k"]}, 1e-15)


def test_nan_stays_in_its_pair(backend, device):
    t = tensors(5, 3, 2, 24, device=device)
    t["q"][2, 1, 7] = t["dk"][3, 0, 20] = float("nan")
    found = run(rotate, t, backend=backend)
    for name, place in {"q": (2, 1), "dk": (3, 0)}.items():
        where = found[name].isnan()
        assert where.sum() == 2
        assert where[place].nonzero().flatten().tolist() == ([7, 19] if name == "q" else [8, 20])
    assert found["k"].isfinite().all()
    assert found["dq"].isfinite().all()


# --- shapes and strides ---------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "key_heads"), [(0, 2), (1, 1), (5, 0)])
def test_few_tokens_and_heads(backend, device, tokens, key_heads):
    t = tensors(tokens, 3, key_heads, 16, device=device)
    check(run(rotate, t, backend=backend), run(reference.rotate, t), 1e-15)


def test_views_are_read_in_place(backend, device, monkeypatch):
    """Heads first, rows and heads of wider tensors with strides of their own, and every other row of a table."""
    base = tensors(19, 5, 3, 24, device=device, free=True)

    def with_strides(x: torch.Tensor, i: int) -> torch.Tensor:
        tokens, heads, d = x.shape
        wide = torch.full((tokens, heads + i, d + 2 * i + 3), float("nan"), dtype=x.dtype, device=device)
        wide[:, i:, i : d + i] = x
        return wide[:, i:, i : d + i]

    strided = base | {name: with_strides(base[name], i) for i, name in enumerate(NAMES)}
    heads_first = base | {name: base[name].transpose(0, 1).contiguous().transpose(0, 1) for name in NAMES}
    for i, name in enumerate(("cos", "sin")):
        strided[name] = with_strides(base[name][:, None], i + 1)[:, 0]
        heads_first[name] = base[name].repeat_interleave(2 + i, 0)[:: 2 + i]
    expected = run(rotate, base, backend=backend)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    for t in (strided, heads_first):
        found = run(rotate, t, backend=backend)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
        assert all(found[name].stride() == expected[name].stride() for name in NAMES), "new and contiguous"


def test_other_views_are_copied(backend, device):
    """Columns that are not adjacent; a gradient of stride 0, as a sum's; one row of the table for all tokens."""
    t = tensors(19, 5, 3, 24, device=device, free=True)
    turned = {name: t[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "dk")}
    turned["dq"] = torch.tensor(0.3, dtype=torch.float64, device=device).expand(19, 5, 24)
    turned["cos"], turned["sin"] = t["cos"].T.contiguous().T, t["sin"][:1].expand(19, 24)
    check(run(rotate, t | turned, backend=backend), run(reference.rotate, t | turned), 1e-15)


@pytest.mark.parametrize("tile", [16, 512, 1 << 16])
def test_tiles(device, monkeypatch, tile):
    """One head of one token a program, or all tokens in one, with heads that no tile holds evenly."""
    t = tensors(9, 7, 3, 24, device=device)
    shape = {"TILE": tile, "num_warps": 4, "num_stages": 1}
    monkeypatch.setitem(_launch.chosen, (_launch.architecture_of(device), "rotate"), shape)
    check(run(rotate, t, backend="triton"), run(reference.rotate, t), 1e-15)


@pytest.mark.parametrize(
    ("tile", "fewest", "half", "expected"),
    [
        (1024, 8, 64, (2, 8, 64)), (1024, 1, 40, (16, 1, 64)), (1024, 32, 64, (1, 16, 64)), (1024, 3, 12, (16, 4, 16)),
        (1024, 4, 1, (256, 4, 1)), (64, 8, 128, (1, 1, 128)),
    ],
)  # fmt: skip
def test_head_blocks(tile, fewest, half, expected):
    assert module.head_blocks(tile, fewest, half) == dict(zip(("BLOCK_N", "BLOCK_H", "BLOCK_D"), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("heads_first", [False, True])
def test_more_than_two_to_the_31_elements(heads_first):
    """Offsets are 64-bit, those of heads too: the last tokens of such a tensor are those of a small one."""
    tokens, heads, d = 2**19 + 8, 32, 128
    shape = (heads, tokens, d) if heads_first else (tokens, heads, d)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    q = q.transpose(0, 1) if heads_first else q
    cos, sin = torch.randn(2, tokens, d, device="cuda", dtype=torch.bfloat16)
    for x, y in zip((q, q[:, :1]), rotate(q, q[:, :1], cos, sin), strict=True):
        assert torch.equal(y[-8:], rotate(x[-8:], x[-8:], cos[-8:], sin[-8:])[0])


# --- which gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("arriving", ["q", "k", "both"])
@pytest.mark.parametrize("wanted", ["q", "k", "both"])
def test_partial_gradients(backend, device, wanted, arriving):
    t = tensors(6, 4, 2, 24, device=device, free=True)
    leaves = {name: t[name].clone().requires_grad_(wanted in (name, "both")) for name in ("q", "k")}
    outputs = dict(zip(leaves, rotate(*leaves.values(), t["cos"], t["sin"], backend=backend), strict=True))
    chosen = [name for name in outputs if arriving in (name, "both")]
    torch.autograd.backward([outputs[name] for name in chosen], [t[f"d{name}"] for name in chosen])
    expected = run(reference.rotate, t)
    for name, leaf in leaves.items():
        if name in chosen and leaf.requires_grad:
            check({name: leaf.grad}, {name: expected[f"d{name}"]}, 1e-15)
        else:
            assert leaf.grad is None


def launches(monkeypatch) -> list[int]:
    """The tensors of every launch from now on."""
    kernel, seen = module.rotate_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append(sum(x is not None for x in arguments[:4]) // 2)
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(module, "rotate_kernel", Spy())
    return seen


def test_one_launch_forward_and_one_back(device, monkeypatch):
    t = tensors(6, 4, 2, 24, device=device)
    seen = launches(monkeypatch)
    run(rotate, t, backend="triton")
    assert seen == [2, 2]
    outputs = rotate(t["q"].requires_grad_(), t["k"], t["cos"], t["sin"], backend="triton")
    torch.autograd.backward(outputs, (t["dq"], t["dk"]))
    assert seen == [2, 2, 2, 1], "a frozen k has no gradient"


def test_backward_twice(backend, device):
    t = tensors(5, 3, 2, 16, device=device)
    q = t["q"].requires_grad_()
    outputs = rotate(q, t["k"], t["cos"], t["sin"], backend=backend)
    first, second = (torch.autograd.grad(outputs[0], q, t["dq"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivative_is_refused(backend, device):
    t = tensors(3, 2, 1, 16, device=device)
    y, _ = rotate(t["q"].requires_grad_(), t["k"], t["cos"], t["sin"], backend=backend)
    (dq,) = torch.autograd.grad(y, t["q"], t["dq"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


# --- memory ---------------------------------------------------------------------------------------


def test_saves_cos_and_sin_alone(backend, device):
    q, k, _ = slices(9, 6, 2, 16, device=device)
    cos, sin = (x.to(device, torch.float32) for x in table(9, 16))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rotate(q, k, cos, sin, backend=backend)
    assert sorted(x.data_ptr() for x in saved) == sorted((cos.data_ptr(), sin.data_ptr()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("d", [24, 64])
def test_each_element_is_read_and_written_once(monkeypatch, d, dtype):
    """Those of cos and sin too, whatever the number of heads: exactly, with several tiles of tokens and of heads."""
    t = tensors(70, 14, 2, d, device=torch.device("cpu"), dtype=dtype)
    shape = {"TILE": 1024, "num_warps": 4, "num_stages": 1}
    monkeypatch.setitem(_launch.chosen, ("interpreter", "rotate"), shape)
    q, k, _ = slices(70, 14, 2, d, dtype=dtype)
    moved, tables = q.nbytes + k.nbytes, t["cos"].nbytes + t["sin"].nbytes
    with count_bytes() as forward:
        outputs = rotate(q, k, t["cos"], t["sin"], backend="triton")
    with count_bytes() as backward:
        torch.autograd.backward(outputs, (t["dq"], t["dk"]))
    for traffic in (forward, backward):
        assert traffic.loaded == moved + tables
        assert traffic.stored == moved


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "cos", "message"),
    [
        ((5, 2, 7), (5, 1, 7), (5, 7), "got d = 7, expected d even"),
        ((5, 2, 0), (5, 1, 0), (5, 0), "got d = 0, expected d even and at least 2"),
        ((5, 2, 8), (4, 1, 8), (5, 8), r"q, k: got \(5, 2, 8\) and \(4, 1, 8\), expected"),
        ((5, 2, 8), (5, 1, 6), (5, 8), "q, k: got .* expected"),
        ((1, 5, 2, 8), (1, 5, 1, 8), (5, 8), "q, k: got .* expected"),
        ((5, 2, 8), (5, 1, 8), (5, 4), "partial rotary"),
        ((5, 2, 8), (5, 1, 8), (1, 8), r"expected \[N, d\] = \(5, 8\)"),
    ],
)
def test_refuses_shapes(q, k, cos, message):
    with pytest.raises(ValueError, match=message):
        rotate(torch.randn(q), torch.randn(k), torch.randn(cos), torch.randn(cos))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(5, 2, 8, dtype=torch.int64)}, "q: got torch.int64 on cpu, expected a floating tensor on cpu"),
        ({"k": torch.ones(5, 1, 8, device="meta")}, "k: got torch.float32 on meta, expected a floating tensor on cpu"),
        ({"cos": torch.ones(5, 8, dtype=torch.int32)}, "cos: got torch.int32"),
        ({"sin": torch.ones(5, 8, device="meta")}, "sin: got .* on meta"),
        ({"sin": torch.ones(5, 8).half()}, "cos, sin: got torch.float32 and torch.float16, expected one dtype"),
        ({"sin": torch.ones(5, 4)}, r"cos, sin: got \(5, 8\) and \(5, 4\)"),
        ({"cos": torch.ones(5, 8, requires_grad=True)}, "cos, sin: expected constants, got a tensor that requires"),
        ({"backend": "numpy"}, "backend: expected"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"q": torch.ones(5, 2, 8), "k": torch.ones(5, 1, 8), "cos": torch.ones(5, 8), "sin": torch.ones(5, 8)}
    with pytest.raises(ValueError, match=message):
        rotate(**arguments | changes)
