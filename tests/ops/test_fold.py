"""The folded latent head: the same loss and gradients as the direct way, over one call or many micro-batches."""

import pytest
import torch
from checks import check
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.peak_memory import live_bytes
from ibft_kernels import FoldedHead, fold_head, fold_pays, folded_cross_entropy, linear_cross_entropy, reference

NAMES = ("z", "up_weight", "up_bias", "head_weight", "head_bias")


def case(n, d, z, v, device, dtype=torch.float64) -> dict[str, torch.Tensor]:
    made = {
        "z": torch.randn(n, z),
        "up_weight": torch.randn(d, z) * z**-0.5,
        "up_bias": torch.randn(d),
        "head_weight": torch.randn(v, d) * d**-0.5,
        "head_bias": torch.randn(v),
    }
    made = {name: t.to(device, dtype).requires_grad_() for name, t in made.items()}
    labels = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < 0.3, -100)
    return made | {"labels": labels.to(device)}


def results(op, tensors, upstream=1.7, **options) -> dict[str, torch.Tensor]:
    loss = op(**tensors, **options)
    wanted = [name for name in NAMES if name in tensors and tensors[name] is not None and tensors[name].requires_grad]
    grads = torch.autograd.grad(loss * upstream, [tensors[name] for name in wanted])
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


def exact(tensors):
    return {
        n: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for n, t in tensors.items()
    }


@pytest.mark.parametrize("fold", [True, False, None])
@pytest.mark.parametrize(("n", "d", "z", "v"), [(1, 16, 7, 11), (252, 123, 16, 507), (120, 64, 7, 503), (3, 8, 16, 5)])
def test_equals_the_direct_way(backend, device, fold, n, d, z, v):
    """Folded, direct and chosen; also with Z above D, where folding never pays."""
    tensors = case(n, d, z, v, device)
    found = results(folded_cross_entropy, tensors, fold=fold, backend=backend, chunk_bytes=70 * v * 8)
    check(found, results(reference.folded_cross_entropy, exact(tensors)), 1e-12)


@pytest.mark.parametrize("absent", [{"up_bias"}, {"head_bias"}, {"up_bias", "head_bias"}])
@pytest.mark.parametrize("fold", [True, False])
def test_without_biases(device, absent, fold):
    tensors = case(40, 16, 5, 30, device) | dict.fromkeys(absent)
    found = results(folded_cross_entropy, tensors, fold=fold)
    check(found, results(reference.folded_cross_entropy, exact(tensors)), 1e-12)


@given(
    micro=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    bias=st.booleans(),
    head_trains=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_one_fold_for_all_micro_batches(micro, bias, head_trains, seed):
    """Micro-batches that share a FoldedHead leave the gradient of one whole batch with no fold at all."""
    torch.manual_seed(seed)
    tensors = case(sum(micro), 12, 5, 23, "cpu")
    if not bias:
        tensors["up_bias"] = tensors["head_bias"] = None
    tensors["head_weight"].requires_grad_(head_trains)
    truth = results(reference.folded_cross_entropy, exact(tensors), normalizer=9)
    count, names = 9, [n for n in NAMES if tensors[n] is not None and tensors[n].requires_grad]
    folded = FoldedHead(*(tensors[n] for n in ("head_weight", "up_weight", "up_bias", "head_bias")))
    loss = 0.0
    for z, labels in zip(tensors["z"].split(micro), tensors["labels"].split(micro), strict=True):
        part = linear_cross_entropy(z, folded.weight, labels, bias=folded.bias, normalizer=count)
        (1.7 * part).backward()
        loss += part.detach()
    folded.backward()
    check({"loss": loss, **{n: tensors[n].grad for n in names}}, truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_low_precision_fold_accumulates_in_fp32(device, dtype):
    """256 micro-batches: in bf16 their sum would stop growing once a step is below half a unit of it."""
    tensors = case(256, 16, 5, 30, device, dtype)
    tensors["labels"] = torch.zeros_like(tensors["labels"])
    tensors["z"] = torch.ones_like(tensors["z"])
    names = ("head_weight", "up_weight", "up_bias")
    folded = FoldedHead(*(tensors[n] for n in names))
    assert folded.weight.dtype == dtype
    for z, label in zip(tensors["z"], tensors["labels"], strict=True):
        linear_cross_entropy(z[None], folded.weight, label[None], bias=folded.bias, reduction="sum").backward()
    assert folded.weight.grad.dtype == folded.bias.grad.dtype == torch.float32
    expected = folded.weight.detach().double()
    logits = torch.ones(5, device=device).double() @ expected.T + folded.bias.detach().double()
    expected = 256 * (logits.softmax(-1) - torch.eye(30, device=device)[0])[:, None].expand(30, 5)
    error = (folded.weight.grad.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps, "one micro-batch's rounding, which adding them up must not enlarge"


def test_a_low_precision_head_bias_becomes_fp32(device):
    tensors = case(4, 16, 5, 30, device, torch.bfloat16)
    for up_bias in (None, tensors["up_bias"]):
        _, bias = fold_head(tensors["head_weight"], tensors["up_weight"], up_bias, tensors["head_bias"])
        assert bias.dtype == torch.float32


def test_a_fold_is_sent_once(device):
    folded = FoldedHead(*(case(4, 16, 5, 30, device)[n] for n in ("head_weight", "up_weight", "up_bias")))
    folded.backward()
    with pytest.raises(RuntimeError, match="one FoldedHead for each optimizer step"):
        folded.backward()


@pytest.mark.parametrize("fold", [True, False])
def test_autocast_does_not_change_the_loss(device, fold):
    tensors = case(60, 16, 5, 30, device, torch.float32)
    expected = results(folded_cross_entropy, tensors, fold=fold)

    def in_a_region(*args, **options):  # backward runs outside, as PyTorch asks for
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return folded_cross_entropy(*args, **options)

    found = results(in_a_region, tensors, fold=fold)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_fold_nothing_arrived_at(device):
    tensors = case(4, 16, 5, 30, device)
    FoldedHead(tensors["head_weight"], tensors["up_weight"], tensors["up_bias"]).backward()
    assert tensors["up_weight"].grad is None


def test_a_frozen_fold_has_frozen_leaves(device):
    tensors = {n: t.detach() for n, t in case(4, 16, 5, 30, device).items()}
    folded = FoldedHead(tensors["head_weight"], tensors["up_weight"], tensors["up_bias"])
    assert not folded.weight.requires_grad
    folded.backward()


def test_autocast_does_not_change_the_folds_dtype(device):
    tensors = case(4, 16, 5, 30, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        weight, bias = fold_head(tensors["head_weight"], tensors["up_weight"], tensors["up_bias"])
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight, tensors["head_weight"] @ tensors["up_weight"])


@pytest.mark.parametrize(("d", "z"), [(4096, 256), (1024, 256), (1536, 256), (64, 16)])
def test_the_break_even(d, z):
    """Where direct needs 1.25 times the multiply-adds of folded."""
    even = 1.25 * 2 * d * z / (2 * d - 1.25 * 3 * z)
    assert not fold_pays(int(even), d, z)
    assert fold_pays(int(even) + 1, d, z)
    even = 1.25 * d * z / (d - 1.25 * z)
    assert not fold_pays(int(even - 0.5), d, z, gradients=False)
    assert fold_pays(int(even) + 1, d, z, gradients=False)


def test_never_pays_for_a_wide_latent():
    assert not fold_pays(10**9, 256, 256)


def test_the_choice_follows_the_break_even(device, monkeypatch):
    from ibft_kernels.ops import fold

    shapes = []
    inner = fold.linear_cross_entropy
    monkeypatch.setattr(
        fold, "linear_cross_entropy", lambda h, w, *a, **k: shapes.append(w.shape[1]) or inner(h, w, *a, **k)
    )
    for n in (5, 500):  # the break-even of D 64, Z 16 is at 37.6 rows
        tensors = case(n, 64, 16, 30, device)
        folded_cross_entropy(**tensors)
    assert shapes == [64, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_weight": torch.ones(8)}, r"head_weight: expected \[V, D\], got torch.float32 of shape \(8,\)"),
        ({"head_weight": torch.ones(10, 8).int()}, r"head_weight: expected \[V, D\], got torch.int32"),
        ({"up_weight": torch.ones(7, 4)}, r"up_weight: expected shape \(8, 4\), got \(7, 4\)"),
        ({"up_weight": torch.ones(8)}, r"up_weight: expected \[8, Z\], got \(8,\)"),
        ({"up_weight": torch.ones(8, 4, device="meta")}, "up_weight: expected a floating tensor on cpu"),
        ({"up_bias": torch.ones(4)}, r"up_bias: expected shape \(8,\), got \(4,\)"),
        ({"head_bias": torch.ones(8)}, r"head_bias: expected shape \(10,\), got \(8,\)"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"head_weight": torch.ones(10, 8), "up_weight": torch.ones(8, 4)} | changes
    with pytest.raises(ValueError, match=message):
        fold_head(**arguments)


def test_the_gradient_of_the_fold_exists_once():
    """[V, Z] of a micro-batch's gradient: scaled where it lies, and handed to the leaf without a copy."""
    V, Z = 60_000, 64
    up = torch.randn(16, Z, requires_grad=True)
    folded = FoldedHead(torch.randn(V, 16) * 0.1, up)
    z, labels = torch.randn(64, Z, requires_grad=True), torch.randint(0, V, (64,))

    def backward():
        rows = torch.arange(64)
        linear_cross_entropy(z, folded.weight, labels, rows=rows, chunk_bytes=1 << 20, backend="torch").backward()

    peak, left = live_bytes(backward)
    assert left >= folded.weight.grad.nbytes == 4 * V * Z
    assert peak < 1.2 * folded.weight.grad.nbytes


def test_the_gradient_of_the_fold_with_the_graph_kept():
    up = torch.randn(16, 8, requires_grad=True)
    folded = FoldedHead(torch.randn(50, 16) * 0.1, up)
    loss = 3.0 * linear_cross_entropy(torch.randn(9, 8), folded.weight, torch.randint(0, 50, (9,)))
    first = torch.autograd.grad(loss, folded.weight, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, folded.weight)[0], first)
