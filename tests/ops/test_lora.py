"""lora_linear, lora_qkv, lora_mlp and ib_lora_mlp against plain autograd."""

import math

import pytest
import torch
from checks import check

import ibft_kernels
from ibft_kernels import (
    Dropout,
    LoraProjection,
    LoraShadow,
    MlpShadow,
    ib_lora_mlp,
    lora_linear,
    lora_mlp,
    lora_qkv,
    reference,
)
from ibft_kernels.ops import ib_lora_mlp as tap_module
from ibft_kernels.ops import lora_mlp as mlp_module

N, D, W, R, Z = 19, 36, 52, 5, 7
TIGHT = {torch.float64: 1e-9, torch.float32: 2e-5}


class Quantized:
    """A weight held in another form, whose dense copy lies in a buffer that the next one overwrites."""

    buffer = torch.empty(0)

    def __init__(self, weight):
        self.hidden_away, self.shape = weight, tuple(weight.shape)

    def dequantize(self, dtype):
        size = self.hidden_away.numel()
        if Quantized.buffer.numel() < size or Quantized.buffer.dtype != dtype:
            Quantized.buffer = torch.empty(size, dtype=dtype)
        return Quantized.buffer[:size].view(self.shape).copy_(self.hidden_away)


def leaf(*shape, dtype=torch.float64, scale=0.4):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()


def projection(out, inputs, *, rank=R, bias=True, adapter=True, quantized=False, dtype=torch.float64, scaling=1.7):
    weight = (torch.randn(out, inputs, dtype=torch.float64) / math.sqrt(inputs)).to(dtype)
    return LoraProjection(
        Quantized(weight) if quantized else weight,
        torch.randn(out, dtype=torch.float64).to(dtype) if bias else None,
        leaf(rank, inputs, dtype=dtype) if adapter else None,
        leaf(out, rank, dtype=dtype) if adapter else None,
        scaling,
    )


def masters(*projections):
    return [m for p in projections for m in (p.lora_a, p.lora_b) if m is not None]


def ids(*shape):
    rows = math.prod(shape)
    return (
        torch.stack([torch.full((rows,), 3), torch.arange(rows) // 5, torch.arange(rows) % 5], 1).int().view(*shape, 3)
    )


def gradients(outputs, leaves):
    """Outputs and leaf gradients under a non-unit upstream gradient, by position."""
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    weights = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), leaves)
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {f"grad{i}": g for i, g in enumerate(found)}


def assert_same(run, leaves, dtype):
    truth = {name: value.double() for name, value in gradients(run(reference), leaves).items()}
    check(gradients(run(ibft_kernels), leaves), truth, TIGHT[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("quantized", [False, True])
def test_linear(backend, dtype, p, quantized):
    layer = projection(W, D, quantized=quantized, dtype=dtype)
    x = leaf(2, N, D, dtype=dtype)
    dropout = Dropout(p, 11, ids(2, N))
    assert_same(lambda ops: ops.lora_linear(x, layer, dropout=dropout, backend=backend), [x, *masters(layer)], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("adapted", ["qkv", "qv", "k", ""])
def test_qkv(backend, dtype, adapted):
    """Unequal widths and ranks; an adapter on all, on some, on none; biases on some."""
    sizes = {"q": (W, 5), "k": (24, 3), "v": (24, 8)}
    q, k, v = (
        projection(out, D, rank=rank, adapter=name in adapted, bias=name != "k", quantized=name != "v", dtype=dtype)
        for name, (out, rank) in sizes.items()
    )
    x = leaf(N, D, dtype=dtype)
    run = lambda ops: ops.lora_qkv(x, q, k, v, dropout=Dropout(0.2, 5), backend=backend)  # noqa: E731
    assert_same(run, [x, *masters(q, k, v)], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapted", ["gate up down", "up", "down", ""])
def test_mlp(backend, dtype, recompute, adapted):
    gate, up, down = (
        projection(o, i, adapter=name in adapted, bias=name == "up", quantized=name != "up", dtype=dtype)
        for name, o, i in (("gate", W, D), ("up", W, D), ("down", D, W))
    )
    x = leaf(3, N, D, dtype=dtype)
    settings = {"dropout": Dropout(0.3, 1, ids(3, N)), "down_dropout": Dropout(0.1, 2, ids(3, N))}
    assert_same(
        lambda ops: ops.lora_mlp(x, gate, up, down, recompute=recompute, backend=backend, **settings),
        [x, *masters(gate, up, down)], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "none"])
@pytest.mark.parametrize("adapted", ["gate up down", "gate"])
@pytest.mark.parametrize("recompute", [False, True])
def test_tapped_mlp(backend, reduction, adapted, recompute):
    gate, up, down = (
        projection(o, i, adapter=name in adapted) for name, o, i in (("gate", W, D), ("up", W, D), ("down", D, W))
    )
    x, residual, weight, bias = leaf(2, N, D), leaf(2, N, D), leaf(2 * Z, D), leaf(2 * Z)
    mask = torch.rand(2, N) < 0.6

    def run(ops):
        hidden, latent = ops.ib_lora_mlp(
            x, residual, gate, up, down, weight, bias, dropout=Dropout(0.3, 1), seed=9, noise_ids=ids(2, N), mask=mask,
            reduction=reduction, recompute=recompute, backend=backend,
        )  # fmt: skip
        return hidden, latent[0], latent[1]

    # the noise is fp32 by definition: a few 1e-9 of z
    leaves = [x, residual, weight, bias, *masters(gate, up, down)]
    truth = gradients(run(reference), leaves)
    check(gradients(run(ibft_kernels), leaves), truth, 2e-6)


@pytest.mark.parametrize("outputs", ["hidden", "z", "kl", "z kl"])
def test_tapped_mlp_with_some_gradients_absent(backend, outputs):
    """Nothing arrives from above, or not from the objective: what is absent counts as zero."""
    gate, up, down = (projection(o, i) for o, i in ((W, D), (W, D), (D, W)))
    x, residual, weight = leaf(N, D), leaf(N, D), leaf(2 * Z, D)
    leaves = [x, residual, *masters(gate, up, down)]

    def run(ops):
        hidden, latent = ops.ib_lora_mlp(x, residual, gate, up, down, weight, None, seed=9, backend=backend)
        named = {"hidden": hidden, "z": latent[0], "kl": latent[1]}
        return tuple(named[name] for name in outputs.split())

    check(gradients(run(ibft_kernels), leaves), gradients(run(reference), leaves), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_low_precision_is_as_near_the_truth(dtype, recompute):
    """fp32 masters beside 16-bit activations: error <= that of plain PyTorch in that precision, within a quarter."""

    def to(p, kind):
        return LoraProjection(p.weight.to(kind), p.bias.to(kind), p.lora_a, p.lora_b, p.scaling)

    layers = [
        projection(o, i, dtype=torch.float32)._replace(scaling=2.0) for o, i in ((507, 252), (507, 252), (252, 507))
    ]
    layers = [to(p, dtype) for p in layers]
    x = leaf(123, 252, dtype=dtype)
    wide = x.detach().float().requires_grad_()
    settings = {"dropout": Dropout(0.1, 1), "down_dropout": Dropout(0.1, 2)}
    leaves = masters(*layers)
    truth = gradients(reference.lora_mlp(wide, *(to(p, torch.float32) for p in layers), **settings), [wide, *leaves])
    native = gradients(reference.lora_mlp(x, *layers, **settings), [x, *leaves])
    found = gradients(lora_mlp(x, *layers, recompute=recompute, backend="torch", **settings), [x, *leaves])
    for name, value in truth.items():
        off, native_off = ((run[name].float() - value).norm() / value.norm() for run in (found, native))
        assert off <= 1.25 * native_off + 1e-4, (name, float(off), float(native_off))
        assert found[name].dtype == native[name].dtype
        if found[name].dtype == torch.float32:  # of a master: never rounded to the activations' dtype
            assert (found[name].to(dtype).float() != found[name]).float().mean() > 0.9


def test_only_what_is_asked_for(backend):
    """No gradient of x: none is computed; masters that do not train get none."""
    layer = projection(W, D)
    x = leaf(N, D).detach()
    y = lora_linear(x, layer, backend=backend)
    a, b = torch.autograd.grad(y.sum(), masters(layer))
    expected = torch.autograd.grad(reference.lora_linear(x, layer).sum(), masters(layer))
    check({"a": a, "b": b}, {"a": expected[0], "b": expected[1]}, 1e-9)
    frozen = layer._replace(lora_a=layer.lora_a.detach(), lora_b=layer.lora_b.detach())
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(lora_linear(x, frozen, backend=backend).sum(), [x])
    (truth,) = torch.autograd.grad(reference.lora_linear(x, frozen).sum(), [x])
    check({"x": dx}, {"x": truth}, 1e-9)


def test_twice_with_the_graph_kept(backend):
    """Backward writes into what forward saved only if nobody will read it again."""
    gate, up, down = (projection(o, i) for o, i in ((W, D), (W, D), (D, W)))
    x, residual, weight = leaf(N, D), leaf(N, D), leaf(2 * Z, D)
    leaves = [x, *masters(gate, up, down)]
    for y in (
        lora_mlp(x, gate, up, down, backend=backend),
        ib_lora_mlp(x, residual, gate, up, down, weight, None, seed=1, backend=backend).hidden,
    ):
        loss = y.square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_tap_writes_into_a_gradient_that_is_its_own(monkeypatch):
    asked, backward = [], tap_module.ib_lora_backward
    monkeypatch.setattr(tap_module, "ib_lora_backward", lambda *a, **k: asked.append(k["inplace"]) or backward(*a, **k))
    gate, up, down = (projection(o, i) for o, i in ((W, D), (W, D), (D, W)))
    hidden, _ = ib_lora_mlp(leaf(N, D), leaf(N, D), gate, up, down, leaf(2 * Z, D), None, seed=1)
    (hidden * 2.0).tanh().sum().backward()
    assert asked == [True]


@pytest.mark.parametrize("op", ["linear", "qkv", "mlp", "tap"])
def test_autocast_does_not_reach_into_a_node(op):
    """The dtype of the products is x's: fp32 stays fp32 inside a bf16 region, forward and backward."""
    gate, up, down = (projection(o, i, dtype=torch.float32) for o, i in ((W, D), (W, D), (D, W)))
    x, weight = leaf(N, D, dtype=torch.float32), leaf(2 * Z, D, dtype=torch.float32)
    run = {
        "linear": lambda: lora_linear(x, gate),
        "qkv": lambda: lora_qkv(x, gate, up, gate)[1],
        "mlp": lambda: lora_mlp(x, gate, up, down),
        "tap": lambda: ib_lora_mlp(x, x, gate, up, down, weight, None, seed=1).hidden,
    }[op]
    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
        grads = torch.autograd.grad(found.square().sum(), [x, up.lora_a if op != "linear" else gate.lora_a])
    assert torch.equal(found, expected)
    truth = torch.autograd.grad(expected.square().sum(), [x, up.lora_a if op != "linear" else gate.lora_a])
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))


def test_that_test_would_notice(monkeypatch):
    gate, up, down = (projection(o, i) for o, i in ((W, D), (W, D), (D, W)))
    x = leaf(N, D)
    monkeypatch.setattr(mlp_module, "graph_is_kept", lambda: False)
    loss = lora_mlp(x, gate, up, down).square().sum()
    torch.autograd.grad(loss, [x], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd counts versions
        torch.autograd.grad(loss, [x])


def test_a_shadow_serves_many_calls_until_refreshed():
    layer = projection(W, D, dtype=torch.float32)
    x = leaf(N, D, dtype=torch.float32)
    shadow = LoraShadow([layer], torch.float32)
    before = lora_linear(x, layer, shadow=shadow)
    torch.testing.assert_close(before, lora_linear(x, layer), rtol=0, atol=0)
    with torch.no_grad():
        layer.lora_b.mul_(2)
    torch.testing.assert_close(lora_linear(x, layer, shadow=shadow), before, rtol=0, atol=0)  # not yet
    shadow.refresh()
    torch.testing.assert_close(lora_linear(x, layer, shadow=shadow), lora_linear(x, layer), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="refreshed between a forward and its backward"):
        before.sum().backward()


def saved_bytes(run):
    """Bytes of the storages that a forward saves, each once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = run()
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes(backend, recompute):
    """X, gate, up and the low-rank products; on the torch path a byte an element of what is dropped."""
    gate, up, down = (projection(o, i, dtype=torch.float32) for o, i in ((W, D), (W, D), (D, W)))
    q, k, v = (projection(o, D, dtype=torch.float32) for o in (D, 12, 12))
    x = leaf(N, D, dtype=torch.float32)
    drop = {"dropout": Dropout(0.3, 1)}
    mask = backend == "torch"
    found = saved_bytes(lambda: lora_qkv(x, q, k, v, backend=backend, **drop)[0])
    assert found == N * (4 * (D + 3 * R) + mask * D)
    found = saved_bytes(lambda: lora_linear(x, q, backend=backend))
    assert found == N * 4 * (D + R)
    found = saved_bytes(
        lambda: lora_mlp(x, gate, up, down, down_dropout=Dropout(0.3, 1), recompute=recompute, backend=backend, **drop)
    )
    assert found == N * (4 * (D + (0 if recompute else 2 * W) + 3 * R) + mask * (D + W))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, D + 1)}, r"projection.weight: expected shape \[O, 36\], got \(3, 37\)"),
        ({"weight": torch.zeros(W, D).requires_grad_()}, "projection.weight: expected a frozen tensor"),
        ({"bias": torch.zeros(3)}, r"projection.bias: expected shape \(52,\), got \(3,\)"),
        ({"lora_b": None}, "expected both of lora_a and lora_b, or neither"),
        ({"lora_b": torch.zeros(W, R + 1)}, r"projection.lora_b: expected shape \(52, 5\), got \(52, 6\)"),
        ({"lora_a": torch.zeros(R, D, dtype=torch.int64)}, "projection.lora_a: expected a float"),
    ],
)
def test_misfits(change, message):
    layer = projection(W, D)
    with pytest.raises(ValueError, match=message):
        lora_linear(leaf(N, D), layer._replace(**change))


def test_more_misfits():
    layer = projection(W, D)
    x = leaf(N, D)
    with pytest.raises(ValueError, match="x: expected a floating tensor"):
        lora_linear(torch.zeros(N, D, dtype=torch.int64), layer)
    with pytest.raises(ValueError, match=r"dropout.p: expected 0 <= p < 1, got 1.5"):
        lora_linear(x, layer, dropout=Dropout(1.5, 1))
    with pytest.raises(ValueError, match=r"noise_ids: expected shape \(19, 3\)"):
        lora_linear(x, layer, dropout=Dropout(0.5, 1, ids(4)))
    with pytest.raises(ValueError, match=r"expected a shadow of these projections in torch.float64"):
        lora_linear(x, layer, shadow=LoraShadow([layer], torch.float32))
    with pytest.raises(ValueError, match="expected a shadow of these projections"):
        lora_linear(x, layer, shadow=LoraShadow([projection(W, D)], torch.float64))
    gate, up, down = (projection(o, i) for o, i in ((W, D), (W + 1, D), (D, W)))
    with pytest.raises(ValueError, match=r"up.weight: expected 52 rows as gate.weight has, got 53"):
        lora_mlp(x, gate, up, down)
    with pytest.raises(ValueError, match=r"down.weight: expected shape \[O, 52\]"):
        lora_mlp(x, gate, gate, gate)
    with pytest.raises(ValueError, match=r"residual: expected \(19, 36\)"):
        ib_lora_mlp(x, leaf(N, D + 1), gate, gate, down, leaf(2 * Z, D), None)
    wrong = MlpShadow(LoraShadow([gate], torch.float64), LoraShadow([down], torch.float64))
    with pytest.raises(ValueError, match=r"shadow.wide: expected a shadow of these projections"):
        lora_mlp(x, gate, gate, down, shadow=wrong)


def test_no_rows(backend):
    layer = projection(W, D)
    x = leaf(0, D)
    y = lora_linear(x, layer, dropout=Dropout(0.2, 1), backend=backend)
    assert y.shape == (0, W)
    y.sum().backward()
    assert layer.lora_a.grad.count_nonzero() == 0
