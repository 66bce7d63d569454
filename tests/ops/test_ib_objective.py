"""The whole objective in one call against the released way; one loop and one buffer of logits for both heads."""

import pytest
import torch
from checks import check

from ibft_kernels import FoldedHead, Linear, ib_objective, noise_key, reference
from ibft_kernels.ops import linear_cross_entropy as heads
from ibft_kernels.ops import objective

SEED = noise_key(3, 0)


def case(n, d, z, v, device, dtype=torch.float64) -> dict[str, torch.Tensor]:
    made = {
        "last_hidden": torch.randn(n, d),
        "tapped": torch.randn(n, d),
        "head_weight": torch.randn(v, d) * d**-0.5,
        "head_bias": torch.randn(v),
        "encoder_weight": torch.randn(2 * z, d) * d**-0.5,
        "encoder_bias": torch.randn(2 * z),
        "up_weight": torch.randn(d, z) * z**-0.5,
        "up_bias": torch.randn(d),
        "eps": torch.randn(n, z),
    }
    made = {name: t.to(device, dtype).requires_grad_(name != "eps") for name, t in made.items()}
    labels = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < 0.5, -100)
    return made | {"labels": labels.to(device), "mask": (torch.rand(n) < 0.8).to(device)}


def results(op, t, *, shared=False, **options) -> dict[str, torch.Tensor]:
    """Loss, parts and the gradients of every float input of 1.7 * loss; `shared`: through a FoldedHead."""
    up = Linear(t["up_weight"], t["up_bias"])
    if shared:
        up = FoldedHead(t["head_weight"], *up, t["head_bias"])
    loss, ce, kl, ce_z, *_ = op(
        t["last_hidden"], t["tapped"], t["labels"], head=Linear(t["head_weight"], t["head_bias"]),
        encoder=Linear(t["encoder_weight"], t["encoder_bias"]), up=up, alpha=0.3, beta=0.2, eps=t["eps"],
        mask=t["mask"], reduction="batchmean", normalizer=31, kl_normalizer=57, **options,
    )  # fmt: skip
    inputs = {name: value for name, value in t.items() if value.requires_grad}
    (1.7 * loss).backward()
    if shared:
        up.backward()
    grads = {name: value.grad for name, value in inputs.items()}
    for value in inputs.values():
        value.grad = None
    return {"loss": loss.detach(), "ce": ce.detach(), "kl": kl.detach(), "ce_z": ce_z.detach(), **grads}


def exact(t):
    exact = {n: v.detach().double().requires_grad_(v.requires_grad) for n, v in t.items() if v.is_floating_point()}
    return t | exact


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("n", "d", "z", "v"), [(7, 24, 5, 11), (252, 64, 16, 507), (300, 123, 7, 301)], ids=["direct", "folded", "odd"]
)
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_released_way(backend, device, n, d, z, v, dtype, rel, shared):
    t = case(n, d, z, v, device, dtype)
    found = results(ib_objective, t, shared=shared, backend=backend, chunk_bytes=64 * v * dtype.itemsize)
    check(found, results(reference.ib_objective, exact(t)), rel)


def test_batches_of_sequences_and_given_rows(backend, device):
    t = case(60, 24, 5, 30, device)
    expected = results(ib_objective, t, backend=backend)
    rows = (t["labels"] != -100).nonzero().squeeze(1)
    given = t | {"labels": t["labels"][rows]}
    check(results(ib_objective, given, rows=rows, backend=backend), expected, 1e-13)
    shaped = dict(t)
    for name in ("last_hidden", "tapped", "eps"):
        shaped[name] = t[name].detach().view(3, 20, -1).requires_grad_(t[name].requires_grad)
    shaped |= {"labels": t["labels"].view(3, 20), "mask": t["mask"].view(3, 20)}
    found = results(ib_objective, shaped, backend=backend)
    found |= {name: found[name].flatten(0, 1) for name in ("last_hidden", "tapped")}
    check(found, expected, 1e-13)


def test_another_ignore_index(backend, device):
    t = case(60, 24, 5, 30, device)
    t["labels"][t["labels"] == -100] = 7
    found = results(ib_objective, t, ignore_index=7, backend=backend)
    check(found, results(reference.ib_objective, exact(t), ignore_index=7), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [20, 300], ids=["direct", "folded"])
def test_low_precision_against_the_truth(backend, device, n, dtype):
    """The trainer's mix, 16-bit activations and head with fp32 masters: no further from float64 than autocast is.

    Each tensor's root-mean-square error, against plain PyTorch under autocast, plus half a unit of rounding.
    """
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        backend = "torch"  # the interpreter's tl.dot is wrong for bf16
    t = case(n, 64, 16, 507, device, torch.float32)
    for name in ("last_hidden", "tapped", "head_weight"):
        t[name] = t[name].detach().to(dtype).requires_grad_()
    truth = results(reference.ib_objective, exact(t))
    found = results(ib_objective, t, backend=backend, chunk_bytes=64 * 507 * 2)

    def native(last, tapped, labels, *, head, encoder, up, alpha, beta, eps, mask, normalizer, kl_normalizer, **_):
        linear, entropy = torch.nn.functional.linear, torch.nn.functional.cross_entropy
        with torch.autocast(device.type, dtype=dtype):
            mu, logvar = linear(tapped, *encoder).chunk(2, dim=-1)
            logvar = logvar.float().clamp(-4, 4)
            z = mu.float() + (logvar / 2).exp() * eps
            kl = 0.5 * (logvar.exp() + mu.float() ** 2 - 1 - logvar).sum(-1)[mask].sum() / kl_normalizer
            logits = linear(last, *head), linear(linear(z, *up), *head)
        ce, ce_z = (entropy(x.float(), labels, reduction="sum") / normalizer for x in logits)
        return ce + alpha * (kl + beta * ce_z), ce, kl, ce_z

    plain = results(native, t)
    for name, expected in truth.items():
        error, allowed = ((r[name].double() - expected).square().mean().sqrt() for r in (found, plain))
        rounding = 0.5 * torch.finfo(dtype).eps * expected.square().mean().sqrt()
        assert error <= 1.1 * allowed + rounding, name


@pytest.mark.parametrize("n", [20, 300], ids=["direct", "folded"])
def test_autocast_does_not_change_the_dtype(device, n):
    t = case(n, 64, 16, 50, device, torch.float32)
    expected = results(ib_objective, t)

    def in_a_region(*args, **options):  # backward runs outside, as PyTorch asks for
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return ib_objective(*args, **options)

    found = results(in_a_region, t)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_all_labels_ignored(backend, device):
    t = case(20, 16, 4, 30, device)
    t["labels"].fill_(-100)
    found = results(ib_objective, t, backend=backend)
    assert found["ce"] == found["ce_z"] == 0
    assert found["kl"] > 0
    assert (found["last_hidden"] == 0).all()
    check(found, results(reference.ib_objective, exact(t)), 1e-12)


def test_the_philox_noise_is_the_bottlenecks(backend, device):
    t = case(40, 16, 4, 30, device)
    ids = torch.randint(0, 99, (40, 3), device=device).int()
    options = {
        "head": Linear(t["head_weight"]), "encoder": Linear(t["encoder_weight"], t["encoder_bias"]),
        "up": Linear(t["up_weight"], t["up_bias"]), "alpha": 0.1, "beta": 0.2, "seed": SEED, "noise_ids": ids,
    }  # fmt: skip
    inputs = t["last_hidden"], t["tapped"], t["labels"]
    found = ib_objective(*inputs, **options, backend=backend)
    assert found.ce_z.item() == pytest.approx(reference.ib_objective(*inputs, **options)[3].item(), rel=1e-6)


def test_both_heads_share_one_loop_and_one_buffer(backend, device, monkeypatch):
    """Every chunk's labels are visited by both heads before the next chunk, in the same memory."""
    visits = []
    inner = heads._Head.visit

    def visit(head, part, rows_m, labels_m, buffer, *rest):
        visits.append((part.start, head.weight_VD.shape[1], buffer.data_ptr(), buffer.nbytes))
        return inner(head, part, rows_m, labels_m, buffer, *rest)

    monkeypatch.setattr(heads._Head, "visit", visit)
    t = case(400, 64, 16, 50, device)
    results(ib_objective, t, backend=backend, chunk_bytes=64 * 50 * 8)
    starts = sorted({start for start, *_ in visits})
    assert len(starts) > 2
    assert [(start, width) for start, width, *_ in visits] == [(s, w) for s in starts for w in (64, 16)]
    assert len({(pointer, size) for *_, pointer, size in visits}) == 1
    assert visits[0][3] <= 64 * 50 * 8


@pytest.mark.parametrize(("rows", "width"), [(40, 64), (400, 16)])
def test_folds_only_where_it_pays(device, monkeypatch, rows, width):
    """The break-even of D 64, Z 16 lies at 25.6 labelled rows; about half the rows have a label."""
    widths = []
    inner = objective.cross_entropies
    monkeypatch.setattr(
        objective, "cross_entropies", lambda h, *a, **k: widths.append(h[1][1].shape[1]) or inner(h, *a, **k)
    )
    results(ib_objective, case(rows, 64, 16, 50, device))
    assert widths == [width]


def test_a_frozen_head_gets_no_gradient_and_none_is_made(device, monkeypatch):
    made = []
    inner = heads._outputs
    monkeypatch.setattr(heads, "_outputs", lambda *a: made.append(inner(*a)) or made[-1])
    t = case(400, 64, 16, 50, device)
    t["head_weight"].requires_grad_(False)
    t["head_bias"].requires_grad_(False)
    found = results(ib_objective, t)
    check(found, results(reference.ib_objective, exact(t)), 1e-12)
    assert "head_weight" not in found
    assert [o.numel() for o in made[0][2:4]] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tapped": torch.ones(5, 8)}, r"tapped: expected shape \[\*\(4,\), D\], got \(5, 8\)"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, r"labels: expected shape \(4,\), got \(3,\)"),
        ({"head": Linear(torch.ones(10, 7))}, r"weight: expected shape \[V, 8\], got \(10, 7\)"),
        ({"encoder": (torch.ones(5, 8), None)}, r"weight: expected shape \[2Z, 8\] with Z >= 1, got \(5, 8\)"),
        ({"up": Linear(torch.ones(7, 3))}, r"up_weight: expected shape \(8, 3\), got \(7, 3\)"),
        ({"normalizer": -1.0}, "normalizer: expected a finite number"),
        ({"chunk_bytes": 0}, "chunk_bytes: expected 1 or more, got 0"),
        ({"reduction": "none"}, "reduction: expected 'mean', 'batchmean' or 'sum', got 'none'"),
    ],
)
def test_bad_arguments_are_named_before_any_product(changes, message, monkeypatch):
    for name in ("fold_head", "cross_entropies"):
        monkeypatch.setattr(objective, name, lambda *_, **__: pytest.fail("computed"))
    arguments = {
        "last_hidden": torch.ones(4, 8), "tapped": torch.ones(4, 8), "labels": torch.arange(4),
        "head": Linear(torch.ones(10, 8)), "encoder": Linear(torch.ones(6, 8)), "up": Linear(torch.ones(8, 3)),
        "alpha": 0.1, "beta": 0.1,
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ib_objective(**arguments)


@pytest.mark.gpu
def test_no_host_synchronisation():
    t = case(400, 64, 16, 50, torch.device("cuda"))
    rows = (t["labels"] != -100).nonzero().squeeze(1)
    t["labels"] = t["labels"][rows]
    expected = results(ib_objective, t, rows=rows, shared=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        found = results(ib_objective, t, rows=rows, shared=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found["loss"], expected["loss"])
