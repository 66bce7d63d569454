"""The whole objective in one call against the released way; one loop and one buffer of logits for both heads."""

import pytest
import torch
from checks import check

from ibft_kernels import FoldedHead, Linear, ib_objective, noise_key, reference
from ibft_kernels.ops import linear_cross_entropy as heads
from ibft_kernels.ops import objective

SEED = noise_key(3, 0)
WEIGHTS = ("head_weight", "encoder_weight", "encoder_bias", "up_weight", "up_bias")


def case(n, d, z, v, device, dtype=torch.float64) -> dict[str, torch.Tensor]:
    made = {
        "last_hidden": torch.randn(n, d),
        "tapped": torch.randn(n, d),
        "head_weight": torch.randn(v, d) * d**-0.5,
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
    up = FoldedHead(t["head_weight"], t["up_weight"], t["up_bias"]) if shared else Linear(t["up_weight"], t["up_bias"])
    loss, ce, kl, ce_z, *_ = op(
        t["last_hidden"], t["tapped"], t["labels"], head=Linear(t["head_weight"]),
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
        ({"encoder": Linear(torch.ones(5, 8))}, "weight: expected"),
        ({"up": Linear(torch.ones(7, 3))}, "up_weight: expected|size|shape"),
        ({"normalizer": -1.0}, "normalizer: expected a finite number"),
    ],
)
def test_bad_arguments_are_named(changes, message):
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
    results(ib_objective, t, rows=rows, shared=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(ib_objective, t, rows=rows, shared=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
