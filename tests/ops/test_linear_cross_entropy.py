"""linear_cross_entropy against its reference: values, every gradient, chunks, labels, and what it may not hold."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import check, distance
from hypothesis import given
from hypothesis import strategies as st
from traffic import count_bytes

from ibft_kernels import linear_cross_entropy, reference
from ibft_kernels._workspace import logits_buffer, release_logits_buffer
from ibft_kernels.ops.linear_cross_entropy import chunk_rows


def case(n, d, v, device, dtype=torch.float64, *, labelled=0.6, bias=True) -> dict[str, torch.Tensor]:
    """hidden, weight, bias that want gradients, and labels of which about a share `labelled` count."""
    made = {"hidden": torch.randn(n, d), "weight": torch.randn(v, d) * d**-0.5, "bias": torch.randn(v)}
    if not bias:
        del made["bias"]
    made = {name: t.to(device, dtype).requires_grad_() for name, t in made.items()}
    labels = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) >= labelled, -100)
    return made | {"labels": labels.to(device)}


def results(op, tensors, upstream=1.7, wanted=("hidden", "weight", "bias"), **options) -> dict[str, torch.Tensor]:
    """The loss and the gradients of upstream * loss; upstream may be a tensor for reduction "none"."""
    tensors = dict(tensors)
    hidden, weight, labels = (tensors.pop(name) for name in ("hidden", "weight", "labels"))
    loss = op(hidden, weight, labels, **tensors, **options)
    inputs = {"hidden": hidden, "weight": weight, **tensors}
    inputs = {name: inputs[name] for name in wanted if name in inputs}
    grads = torch.autograd.grad((loss * upstream).sum(), list(inputs.values()))
    return {"loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


def exact(tensors) -> dict[str, torch.Tensor]:
    """The same values in float64, as new leaves."""
    return {n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize(
    ("n", "d", "v"), [(1, 16, 7), (252, 123, 507), (507, 64, 507), (31, 7, 32003), (9, 4096, 507), (64, 256, 1024)]
)
def test_equals_the_float64_reference(backend, device, n, d, v, dtype, rel):
    tensors = case(n, d, v, device, dtype, labelled=1.0 if n == 1 else 0.6)
    found = results(linear_cross_entropy, tensors, backend=backend, chunk_bytes=100 * v * dtype.itemsize)
    truth = results(reference.linear_cross_entropy, exact(tensors))
    if dtype == torch.float32:  # 32,003 terms in fp32: how far off plain PyTorch is depends on the machine's BLAS
        rel = max(rel, distance(results(reference.linear_cross_entropy, tensors), truth))
    check(found, truth, rel)
    assert found["loss"].dtype == found["weight"].dtype == found["hidden"].dtype == dtype


@pytest.mark.parametrize("normalizer", [None, 13.5, 0, torch.tensor(77)])
@pytest.mark.parametrize("kind", ["some", "none", "all"])
def test_normalizers_and_labels(backend, device, kind, normalizer):
    tensors = case(40, 8, 30, device, labelled={"some": 0.5, "none": 0.0, "all": 1.0}[kind])
    found = results(linear_cross_entropy, tensors, backend=backend, normalizer=normalizer)
    truth = results(reference.linear_cross_entropy, exact(tensors), normalizer=normalizer)
    check(found, truth, 1e-13)
    if kind == "none" or normalizer == 0:
        assert all((t == 0).all() for t in found.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given_rows", [False, True])
def test_reductions_and_rows(backend, device, reduction, given_rows):
    tensors = case(50, 8, 30, device)
    labels = tensors["labels"].clone()
    if given_rows:
        rows = (labels != -100).nonzero().squeeze(1)
        tensors |= {"labels": labels[rows]}
        tensors["labels"][3] = -100  # a caller's row may still be one to ignore
        options = {"rows": rows}
    else:
        tensors["labels"], options = labels.view(5, 10), {}
        tensors["hidden"] = tensors["hidden"].detach().view(5, 10, 8).requires_grad_()
    upstream, wanted = 1.7, ("hidden", "weight", "bias")
    if reduction == "none":
        tensors["weight"].requires_grad_(False)
        tensors["bias"].requires_grad_(False)
        upstream, wanted = torch.randn(tensors["labels"].shape, device=device).double(), ("hidden",)
    found = results(linear_cross_entropy, tensors, upstream, wanted, reduction=reduction, backend=backend, **options)
    truth = results(reference.linear_cross_entropy, exact(tensors), upstream, wanted, reduction=reduction, **options)
    check(found, truth, 1e-13)
    assert found["loss"].shape == (tensors["labels"].shape if reduction == "none" else ())


@pytest.mark.parametrize("given_rows", [False, True])
def test_another_ignore_index(backend, device, given_rows):
    tensors = case(50, 8, 30, device)
    tensors["labels"][tensors["labels"] == -100] = 7
    options = {"rows": torch.arange(50, device=device)} if given_rows else {}
    found = results(linear_cross_entropy, tensors, ignore_index=7, backend=backend, **options)
    check(found, results(reference.linear_cross_entropy, exact(tensors), ignore_index=7, **options), 1e-13)


def test_the_default_budget(monkeypatch):
    from ibft_kernels.ops import linear_cross_entropy as module

    sizes = []
    inner = module.logits_buffer
    monkeypatch.setattr(
        module, "logits_buffer", lambda n, dtype, d: sizes.append(n * dtype.itemsize) or inner(n, dtype, d)
    )
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        linear_cross_entropy(
            torch.ones(4000, 2), torch.ones(8192, 2), torch.zeros(4000, dtype=torch.int64), backend="torch"
        )
    assert (60 << 20) <= sizes[0] <= (64 << 20)


def test_offsets_beyond_int32(device):
    """Three rows, 2^30 elements apart: the last begins at 2^31. Only the pages that hold them are ever touched."""
    torch.use_deterministic_algorithms(False)  # poisoning would touch all
    from ibft_kernels.ops._cross_entropy_triton import cross_entropy_triton_

    wide = torch.empty((1 << 31) + 64, dtype=torch.float16, device=device).as_strided((3, 32), (1 << 30, 1))
    logits = torch.randn(3, 32, device=device).half()
    wide.copy_(logits)
    labels, loss = torch.tensor([1, 2, 3], device=device), torch.empty(3, device=device)
    cross_entropy_triton_(wide, None, labels, loss, -100, False)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none"))


def test_the_chunking_changes_rounding_only(backend, device):
    tensors = case(300, 16, 50, device)
    whole = results(linear_cross_entropy, tensors, backend=backend)
    for chunk_bytes in (1, 7 * 50 * 8, 64 * 50 * 8, 100 * 50 * 8):
        check(results(linear_cross_entropy, tensors, backend=backend, chunk_bytes=chunk_bytes), whole, 1e-13)


@given(
    n=st.integers(0, 40), d=st.integers(1, 20), v=st.integers(1, 60), labelled=st.sampled_from([0.0, 0.5, 1.0]),
    rows_in_chunk=st.integers(1, 50), bias=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_any_shape(name, n, d, v, labelled, rows_in_chunk, bias, seed):
    torch.manual_seed(seed)
    tensors = case(n, d, v, "cpu", labelled=labelled, bias=bias)
    found = results(linear_cross_entropy, tensors, backend=name, chunk_bytes=8 * v * rows_in_chunk)
    check(found, results(reference.linear_cross_entropy, exact(tensors)), 1e-12)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_asked_for_are_made(backend, device, wanted, monkeypatch):
    from ibft_kernels.ops import linear_cross_entropy as module

    tensors = case(30, 8, 20, device)
    for name in ("hidden", "weight", "bias"):
        tensors[name].requires_grad_(name == wanted)
    made = []
    inner = module._Head
    monkeypatch.setattr(module, "_Head", lambda *a: made.append(a) or inner(*a))
    found = results(linear_cross_entropy, tensors, wanted=(wanted,), backend=backend)
    check(found, results(reference.linear_cross_entropy, exact(tensors), wanted=(wanted,)), 1e-13)
    ((*_, dhidden, dweight, dbias),) = made
    assert [t.numel() > 0 for t in (dhidden, dweight, dbias)] == [n == wanted for n in ("hidden", "weight", "bias")]


def test_without_gradients_only_the_loss_is_made(backend, device, monkeypatch):
    from ibft_kernels.ops import linear_cross_entropy as module

    tensors = case(30, 8, 20, device)
    expected = linear_cross_entropy(**tensors, backend=backend)
    visits = []
    name = f"cross_entropy_{backend}_"
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: visits.append(a[-1]) or inner(*a))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(**tensors, backend=backend), expected)
    assert visits == [False]


def test_a_tied_weight_and_an_input_used_twice(backend, device):
    """One tensor as hidden and weight, and a loss used in two places: the gradients add up."""
    w = torch.randn(12, 12, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.arange(12, device=device)

    def gradient(op):
        loss = op(w, w, y)
        (dw,) = torch.autograd.grad(loss * loss + 3 * loss, w)
        return {"dw": dw}

    found = gradient(lambda *a: linear_cross_entropy(*a, backend=backend))
    check(found, gradient(reference.linear_cross_entropy), 1e-13)


def test_backward_twice_with_retain_graph(backend, device):
    tensors = case(30, 8, 20, device)
    loss = linear_cross_entropy(**tensors, backend=backend)
    inputs = [tensors[name] for name in ("hidden", "weight", "bias")]
    first = torch.autograd.grad(loss, inputs, torch.tensor(2.0, device=device).double(), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(0.5, device=device).double())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 4 * b, rtol=1e-14, atol=0)


def test_second_derivative_is_refused(backend, device):
    tensors = case(5, 4, 6, device)
    loss = linear_cross_entropy(**tensors, backend=backend)
    upstream = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
    (dh,) = torch.autograd.grad(loss, tensors["hidden"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(dh.sum(), upstream)


def test_strided_inputs(backend, device):
    wide = torch.randn(40, 32, dtype=torch.float64, device=device)
    tensors = {
        "hidden": wide[::2, 5:13].detach().requires_grad_(),
        "weight": torch.randn(8, 30, dtype=torch.float64, device=device).t().detach().requires_grad_(),
        "bias": torch.randn(60, dtype=torch.float64, device=device)[::2].detach().requires_grad_(),
        "labels": torch.randint(0, 30, (40,), device=device)[::2],
    }
    assert not any(t.is_contiguous() for t in tensors.values())
    found = results(linear_cross_entropy, tensors, backend=backend)
    check(found, results(reference.linear_cross_entropy, exact(tensors)), 1e-13)


def test_rows_wider_than_a_block(device, monkeypatch):
    """The GPU's block sizes; the largest logit of a row lies in a later block than the first."""
    from ibft_kernels._launch import shapes_of
    from ibft_kernels.ops import _cross_entropy_triton

    def hopper(kernel, *_):
        return {name: value for name, value in shapes_of("sm_90")[kernel].items() if name != "measured"}

    monkeypatch.setattr(_cross_entropy_triton, "launch_shape", hopper)
    tensors = case(3, 8, 2 * hopper("cross_entropy")["BLOCK_V"] + 77, device, labelled=1.0)
    tensors["bias"].data += torch.linspace(0, 30, tensors["bias"].numel(), device=device)
    found = results(linear_cross_entropy, tensors, backend="triton")
    check(found, results(reference.linear_cross_entropy, exact(tensors)), 1e-12)


def test_extreme_logits(backend, device):
    """Sums of exponentials that would overflow or vanish without the maximum taken out, and a masked vocabulary."""
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 3.0]], device=device)
    bias = torch.tensor([0.0, 0.0, float("-inf")], device=device)
    labels = torch.tensor([0, 0, 1], device=device)
    found = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", backend=backend)
    torch.testing.assert_close(found, torch.tensor([0.0, 2e4, 0.6931472], device=device))
    (dh,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(dh, torch.tensor([[0.0, 0.0], [-2.0, 0.0], [1.0, 0.0]], device=device))


def test_nan_is_not_hidden(backend, device):
    tensors = case(6, 4, 10, device, labelled=1.0)
    tensors["hidden"].data[2, 1] = float("nan")
    tensors["weight"].requires_grad_(False)
    tensors["bias"].requires_grad_(False)
    loss = linear_cross_entropy(**tensors, reduction="none", backend=backend)
    assert loss.isnan().nonzero().tolist() == [[2]]


# --- low precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), [(123, 64, 507), (252, 96, 2003)])
def test_low_precision_against_the_truth(backend, device, n, d, v, dtype):
    """No further from float64 than plain PyTorch in that precision (logits in it, loss in fp32)."""
    tensors = case(n, d, v, device, dtype)
    truth = results(reference.linear_cross_entropy, exact(tensors))
    found = results(linear_cross_entropy, tensors, backend=backend, chunk_bytes=100 * v * 2)

    def native(hidden, weight, labels, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    plain = results(native, tensors)
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    for name, expected in truth.items():
        rounding = torch.finfo(dtype).eps * (1.0 if truncates else 0.5) * expected.square().mean().sqrt()
        error = (found[name].double() - expected).square().mean().sqrt()
        plain_error = (plain[name].double() - expected).square().mean().sqrt()
        assert error <= 1.05 * plain_error + (1.0 if truncates else 0.1) * rounding, name
    assert found["loss"].dtype == torch.float32


def test_a_small_upstream_gradient_is_not_rounded_to_bf16(backend, device):
    """The scale meets the gradient in fp32: 1/3000 in bf16 would put one error of 0.2 % on all of it."""
    tensors = case(64, 32, 100, device, torch.bfloat16, bias=False)
    unit = results(linear_cross_entropy, tensors, 1.0, ("hidden",), reduction="sum", backend=backend)["hidden"]
    small = results(linear_cross_entropy, tensors, 1.0, ("hidden",), normalizer=3000, backend=backend)["hidden"]
    ratio = (small.double() * 3000).norm() / unit.double().norm()
    truncates = backend == "triton" and device.type == "cpu"  # the interpreter's conversion, up to one unit downwards
    # 1/3000 lies 0.0024 of itself from the nearest bf16: with a rounded scale the ratio would be off by that
    assert abs(torch.tensor(1 / 3000).bfloat16().item() * 3000 - 1) > 1e-3
    assert abs(ratio - 1) < (2.0**-8 if truncates else 2e-4)


def test_fp16_gradients_survive_a_large_token_count(backend, device):
    """softmax - onehot over 32,000 columns and 100,000 tokens would vanish in fp16; the unscaled one does not."""
    tensors = case(16, 64, 32000, device, torch.float16, bias=False)
    found = results(linear_cross_entropy, tensors, 1.0e5, ("hidden", "weight"), normalizer=1e5, backend=backend)
    truth = results(reference.linear_cross_entropy, exact(tensors), 1.0e5, ("hidden", "weight"), normalizer=1e5)
    for name in ("hidden", "weight"):
        assert (found[name].double() - truth[name]).norm() <= 5e-3 * truth[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_masters_keep_an_fp32_gradient(backend, device, dtype):
    tensors = case(200, 32, 50, device, torch.float32)
    tensors["hidden"] = tensors["hidden"].detach().to(dtype).requires_grad_()
    found = results(linear_cross_entropy, tensors, backend=backend, chunk_bytes=64 * 50 * 2)
    truth = results(reference.linear_cross_entropy, exact(tensors))
    assert found["hidden"].dtype == dtype
    assert found["weight"].dtype == found["bias"].dtype == torch.float32
    rel = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for name in ("loss", "hidden", "weight", "bias"):
        assert (found[name].double() - truth[name]).norm() <= rel * truth[name].norm(), name


# --- memory, traffic, repetition ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "v", "itemsize", "budget", "expected"),
    [
        (1000, 1000, 4, 4_000_000, 1000),  # all fit
        (1001, 1000, 4, 4_000_000, 504),  # two even chunks, not 1000 and a sliver
        (65, 1000, 4, 64 * 4000, 40),
        (1025, 1000, 4, 110 * 4000, 104),
        (10, 1000, 4, 1, 1),  # less than a row: one row
        (0, 1000, 4, 4_000_000, 1),
        (4096, 102_400, 2, 128 << 20, 592),
    ],
)
def test_chunk_rows(n, v, itemsize, budget, expected):
    assert chunk_rows(n, v, itemsize, budget) == expected


@given(n=st.integers(1, 10**6), v=st.integers(1, 200_000), budget=st.integers(1, 1 << 30))
def test_a_chunk_keeps_to_its_budget(n, v, budget):
    rows = chunk_rows(n, v, 2, budget)
    assert 1 <= rows <= n
    assert rows == 1 or rows * v * 2 <= budget


def test_each_logit_is_read_twice_and_written_once(device):
    if device.type != "cpu":
        return
    n, d, v = 70, 16, 1000
    tensors = case(n, d, v, device, torch.float16, labelled=1.0, bias=False)
    tensors["weight"].requires_grad_(False)
    with count_bytes() as traffic:
        loss = linear_cross_entropy(**tensors, backend="triton", chunk_bytes=32 * v * 2)
    least_read, least_written = 2 * 2 * n * v, 2 * n * v
    assert least_read <= traffic.loaded <= 1.05 * least_read
    assert least_written <= traffic.stored <= 1.05 * least_written
    with count_bytes() as traffic:
        loss.backward()
    assert 2 * n * d <= traffic.loaded <= 1.05 * 2 * n * d + 16 * n
    assert traffic.stored == 2 * n * d


def test_the_buffer_is_kept_on_a_cpu_and_grows():
    """One piece of memory for smaller and larger calls alike, and for every dtype."""
    release_logits_buffer()
    small = logits_buffer(100, torch.float32, torch.device("cpu"))
    large = logits_buffer(1000, torch.float32, torch.device("cpu"))
    again = logits_buffer(50, torch.bfloat16, torch.device("cpu"))
    assert [b.numel() for b in (small, large, again)] == [100, 1000, 50]
    assert again.dtype == torch.bfloat16
    assert again.data_ptr() == large.data_ptr()
    release_logits_buffer()
    assert torch.equal(logits_buffer(4, torch.float32, torch.device("cpu")).isnan(), torch.ones(4, dtype=torch.bool))


def test_two_threads_have_two_buffers():
    tensors = [case(60, 16, 40, "cpu") for _ in range(4)]
    expected = [results(linear_cross_entropy, t, backend="torch") for t in tensors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda t: results(linear_cross_entropy, t, backend="torch"), tensors))
            for one, other in zip(found, expected, strict=True):
                check(one, other, 1e-13)


def test_same_bits_twice(backend, device):
    tensors = case(200, 32, 300, device, torch.float32)
    options = {"backend": backend, "chunk_bytes": 64 * 300 * 4}
    first, second = (results(linear_cross_entropy, tensors, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_inputs_are_left_alone(backend, device):
    tensors = case(40, 8, 30, device, labelled=1.0)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    results(linear_cross_entropy, tensors, backend=backend)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def test_nothing_of_the_logits_is_saved(backend, device):
    saved = []
    tensors = case(40, 8, 500, device, bias=False)
    tensors["weight"].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(**tensors, backend=backend)
    assert max(t.numel() for t in saved) <= 40 * 8


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(4, 8, dtype=torch.int64)}, "hidden: expected a floating tensor"),
        (
            {"weight": torch.ones(10, 8).bfloat16(), "hidden": torch.ones(4, 8).half()},
            "weight: expected torch.float16 or",
        ),
        ({"hidden": torch.ones(4, 7)}, r"weight: expected shape \[V, 7\], got \(10, 8\)"),
        ({"weight": torch.ones(8)}, r"weight: expected shape \[V, 8\], got \(8,\)"),
        ({"weight": torch.ones(10, 8).half()}, "weight: expected torch.float32 or a wider dtype, got torch.float16"),
        ({"weight": torch.ones(10, 8, device="meta")}, "weight: expected device cpu, got meta"),
        ({"bias": torch.ones(9)}, r"bias: expected shape \(10,\), got \(9,\)"),
        ({"labels": torch.ones(4)}, "labels: expected torch.int64, got torch.float32"),
        ({"labels": torch.ones(5, dtype=torch.int64)}, r"labels: expected shape \(4,\), got \(5,\)"),
        ({"labels": torch.tensor([0, 10, 1, 2])}, "labels: expected 0 .. 9 or ignore_index -100, got 10"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, "labels: expected 0 .. 9 or ignore_index -100, got -1"),
        ({"labels": torch.ones(4, dtype=torch.int64, device="meta")}, "labels: expected device cpu, got meta"),
        ({"rows": torch.arange(4).int()}, r"rows: expected int64 \[M\] on cpu, got torch.int32"),
        ({"rows": torch.arange(3)}, r"labels: expected shape \(3,\), one a row of `rows`, got \(4,\)"),
        ({"rows": torch.tensor([0, 1, 1, 2])}, r"rows: expected strictly increasing indices in 0 .. 3, got \[0, 1, 1"),
        ({"rows": torch.tensor([0, 1, 2, 4])}, r"rows: expected strictly increasing indices in 0 .. 3"),
        ({"rows": torch.tensor([-1, 1, 2, 3])}, r"rows: expected strictly increasing indices in 0 .. 3"),
        ({"rows": torch.arange(4), "labels": torch.tensor([0, 1, 2, 10])}, "labels: expected 0 .. 9"),
        ({"reduction": "batchmean"}, "reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"reduction": "sum", "normalizer": 3}, "normalizer: reduction 'sum' divides by nothing"),
        ({"normalizer": -1}, "normalizer: expected a finite number >= 0, got -1"),
        ({"normalizer": float("nan")}, "normalizer: expected a finite number >= 0, got nan"),
        ({"chunk_bytes": 0}, "chunk_bytes: expected 1 or more, got 0"),
        ({"backend": "tpu"}, "backend: expected 'auto', 'triton' or 'torch', got 'tpu'"),
        ({"reduction": "none", "weight": torch.ones(10, 8, requires_grad=True)}, "reduction: 'none' makes no gradient"),
    ],
)
def test_bad_arguments_are_named_before_any_product(changes, message, monkeypatch):
    from ibft_kernels.ops import linear_cross_entropy as module

    monkeypatch.setattr(module._Head, "visit", lambda *_: pytest.fail("computed"))
    arguments = {"hidden": torch.ones(4, 8), "weight": torch.ones(10, 8), "labels": torch.arange(4)} | changes
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_the_kernel_marks_a_label_out_of_range(backend, device, label):
    """Where the host does not look at the labels: NaN for that row alone, and no access outside the row."""
    from ibft_kernels.ops import linear_cross_entropy as module

    logits, loss = torch.zeros(3, 10, device=device), torch.empty(3, device=device)
    labels = torch.tensor([0, label, -100], device=device)
    getattr(module, f"cross_entropy_{backend}_")(logits, None, labels, loss, -100, True)
    assert loss.isnan().tolist() == [False, True, False]
    assert (logits[2] == 0).all()


@pytest.mark.gpu
def test_a_label_out_of_range_on_a_gpu_shows_as_nan():
    tensors = case(4, 8, 10, torch.device("cuda"), labelled=1.0)
    rows = torch.arange(4, device="cuda")
    tensors["labels"][2] = 10
    assert linear_cross_entropy(**tensors, rows=rows).isnan()


@pytest.mark.gpu
def test_no_host_synchronisation():
    tensors = case(64, 8, 100, torch.device("cuda"))
    rows = (tensors["labels"] != -100).nonzero().squeeze(1)
    tensors["labels"] = tensors["labels"][rows]
    count = torch.tensor(100.0, device="cuda")
    expected = linear_cross_entropy(**tensors, rows=rows, normalizer=count)
    expected.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        loss = linear_cross_entropy(**tensors, rows=rows, normalizer=count, chunk_bytes=1000)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, expected)
