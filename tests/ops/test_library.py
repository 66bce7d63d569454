"""Every registered op: schema, fake, autograd and AOT rules (`opcheck`); every public op in one full graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ibft_kernels
from ibft_kernels import (
    Linear,
    LoraProjection,
    add_rms_norm,
    fold_head,
    folded_cross_entropy,
    ib_bottleneck,
    ib_bottleneck_latent,
    ib_kl_loss,
    ib_lora_backward,
    ib_lora_mlp,
    ib_objective,
    linear_cross_entropy,
    lora_linear,
    lora_mlp,
    lora_qkv,
    nf4_dequantize,
    philox_dropout,
    philox_normal,
    rms_norm,
    rotate,
    swiglu_backward_,
    swiglu_forward,
)
from ibft_kernels._library import NAMESPACE

N, Z, D, V = 13, 20, 24, 29
SEED = torch.tensor([3 << 32 | 5])
Case = tuple[Any, ...]


def ids(n: int = N) -> torch.Tensor:
    return torch.randint(0, 1000, (n, 3), dtype=torch.int32)


def rows(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_(grad)


# --- cases: one generator an op, of argument tuples -----------------------------------------------


def philox_words_cases(backend: str) -> Iterator[Case]:
    yield ids(), 5, None, -7, backend
    yield ids(0), 5, SEED, 0, backend


def philox_normal_cases(backend: str) -> Iterator[Case]:
    yield ids(), 18, torch.float32, None, -7, backend
    yield ids(), 18, torch.float16, SEED, 0, backend


def philox_dropout_cases(backend: str) -> Iterator[Case]:
    yield rows(N, Z), None, 20_000, None, 7, backend
    yield torch.randn(N, 2 * Z)[:, Z:].requires_grad_(), ids(), 20_000, SEED, 0, backend
    yield rows(N, Z, grad=False), ids(), 20_000, None, 7, backend


def philox_dropout_backward_cases(backend: str) -> Iterator[Case]:
    keep = torch.ones((N, Z) if backend == "torch" else 0, dtype=torch.uint8)
    yield rows(N, Z, grad=False), keep, None, 20_000, None, 7, backend
    yield rows(N, Z, grad=False), keep, ids(), 20_000, SEED, 0, backend


def philox_dropout_add_cases(backend: str) -> Iterator[Case]:
    for arguments in philox_dropout_backward_cases(backend):
        yield rows(N, Z, grad=False), *arguments
    yield rows(N, 2 * Z, grad=False)[:, Z:], *arguments


def ib_kl_loss_cases(backend: str) -> Iterator[Case]:
    halves = torch.randn(N, 2 * Z).chunk(2, dim=1)
    mask, normalizer = torch.randint(0, 2, (N,), dtype=torch.uint8), torch.full((1,), 3.0)
    yield rows(N, Z), rows(N, Z), None, None, None, None, None, 7, [-4.0, 4.0], "mean", backend
    yield *(h.requires_grad_() for h in halves), ids(), None, mask, None, SEED, 0, None, "batchmean", backend
    yield rows(N, Z), rows(N, Z, grad=False), None, torch.randn(N, Z), mask, normalizer, None, 0, None, "mean", backend
    yield rows(N, Z, grad=False), rows(N, Z), ids(), None, mask, None, None, 7, [-0.5, 0.5], "none", backend
    yield rows(0, Z), rows(0, Z), None, None, None, None, None, 7, None, "sum", backend


def ib_kl_backward_cases(backend: str) -> Iterator[Case]:
    mu, logvar, dz, eps = torch.randn(4, N, Z)
    own = eps if backend == "torch" else None
    dkl, one, none = torch.tensor(1.7), torch.full((1,), 0.5), torch.empty(0)
    mask = torch.randint(0, 2, (N,), dtype=torch.uint8)
    yield dz, dkl, mu, logvar, one, ids(), own, mask, SEED, 0, [-4.0, 4.0], "mean", backend, True, True
    yield dz, None, mu, logvar, one, None, eps, None, None, 0, None, "mean", backend, True, True
    yield None, torch.randn(N), mu, logvar, none, None, own, mask, None, 7, None, "none", backend, True, False
    yield None, dkl, mu, logvar, one, None, own, None, None, 7, [-1.0, 1.0], "sum", backend, False, True


def routes(backend: str) -> tuple[str, ...]:
    return ("torch",) if backend == "torch" else ("fused", "product")


def ib_bottleneck_cases(backend: str) -> Iterator[Case]:
    mask, normalizer = torch.randint(0, 2, (N,), dtype=torch.uint8), torch.full((1,), 3.0)
    for route in routes(backend):
        encoder = rows(2 * Z, D), rows(2 * Z)
        yield rows(N, D), *encoder, None, None, None, None, None, 7, [-4.0, 4.0], "mean", route
        yield rows(N, D), encoder[0], None, ids(), None, mask, None, SEED, 0, None, "none", route
        frozen = rows(2 * Z, D, grad=False), rows(2 * Z, grad=False)
        yield rows(N, D), *frozen, None, torch.randn(N, Z), mask, normalizer, None, 0, None, "batchmean", route


def bottleneck_backward_tail(backend: str) -> Iterator[tuple[Case, Case]]:
    """What the two backward ops share: (dz, dkl, saved tensors and settings), (needs_weight, needs_bias)."""
    h, w, pair = torch.randn(N, D), torch.randn(2 * Z, D), torch.randn(N, 2 * Z)
    dz, eps = torch.randn(2, N, Z)
    dkl, one, none = torch.tensor(1.7), torch.full((1,), 0.5), torch.empty(0)
    mask = torch.randint(0, 2, (N,), dtype=torch.uint8)
    own = eps if backend == "torch" else None
    for route in routes(backend):
        yield (dz, dkl, h, w, pair, one, ids(), own, mask, SEED, 0, [-4.0, 4.0], "mean", route), (True, True)
        yield (dz, None, h, w, pair, one, None, eps, None, None, 0, None, "sum", route), (True, False)
        yield (None, torch.randn(N), None, w, pair, none, None, own, mask, None, 7, None, "none", route), (False, False)


def ib_bottleneck_backward_cases(backend: str) -> Iterator[Case]:
    for shared, needs in bottleneck_backward_tail(backend):
        yield *shared, True, *needs
    yield *shared, False, False, True


def ib_bottleneck_backward_into_cases(backend: str) -> Iterator[Case]:
    for shared, needs in bottleneck_backward_tail(backend):
        yield torch.randn(N, D), *shared, *needs
        yield torch.randn(N, 2 * D)[:, D:], *shared, *needs


def lora_backward_tail(backend: str) -> Iterator[Case]:
    """What the two ops share, after dhidden: (dz, dkl, saved tensors, settings, needs_weight, needs_bias)."""
    lora_b, scaling = torch.randn(D, 6), 0.37
    for shared, needs in bottleneck_backward_tail(backend):
        dz, dkl, h, w, pair, inverse, noise_ids, eps, mask, *settings = shared
        yield dz, dkl, h, w, pair, inverse, lora_b, noise_ids, eps, mask, scaling, *settings, *needs
        yield dz, dkl, h, w, pair, inverse, None, noise_ids, eps, mask, scaling, *settings, *needs


def ib_lora_backward_cases(backend: str) -> Iterator[Case]:
    for shared in lora_backward_tail(backend):
        yield torch.randn(N, D), *shared
    yield None, *shared


def ib_lora_backward_into_cases(backend: str) -> Iterator[Case]:
    for shared in lora_backward_tail(backend):
        yield torch.randn(N, 2 * D)[:, D:], *shared


def scatter_rows_cases(backend: str) -> Iterator[Case]:
    where = torch.tensor([1, 4, 6])
    yield torch.randn(3, D), torch.tensor(1.7), where, N, backend
    yield torch.randn(3, D), torch.randn(3), where, N, backend
    yield torch.randn(N, D), torch.tensor(1.7), None, N, backend


def linear_cross_entropies_cases(backend: str) -> Iterator[Case]:
    labels, where = torch.tensor([3, -100, V - 1]), torch.tensor([1, 4, 6])
    frozen = [rows(V, D, grad=False), rows(V, Z, grad=False)]
    none, bias = torch.empty(0), rows(V, grad=False)
    hidden_only = [True, False, False]
    budget = 2 * V * 4  # two rows of logits: more than one chunk
    yield [rows(N, D), rows(N, Z)], frozen, [none, bias], where, labels, -100, hidden_only * 2, True, budget, backend
    yield [rows(3, D)], [rows(V, D)], [rows(V)], None, labels, -100, [True] * 3, True, budget, backend
    yield [rows(N, D)], frozen[:1], [none], where, labels, -100, hidden_only, False, budget, backend


def nf4_tensors(n_weights: int) -> Case:
    """A random weight, the same for every caller."""
    fixed = torch.Generator().manual_seed(n_weights)
    n_blocks = -(-n_weights // 64)
    packed, absmax = (torch.randint(256, (n,), generator=fixed).to(torch.uint8) for n in (-(-n_weights // 2), n_blocks))
    code, offset, nested, nested_code = (torch.randn(n, generator=fixed) for n in (16, 1, -(-n_blocks // 256), 256))
    return packed, absmax, code, offset, nested, nested_code


def nf4_dequantize_cases(backend: str) -> Iterator[Case]:
    yield *nf4_tensors(Z * D), 64, 256, Z, D, torch.float16, backend
    yield *nf4_tensors(N * 5), 64, 256, N, 5, torch.float32, backend
    yield *nf4_tensors(0), 64, 256, 0, D, torch.float32, backend


def nf4_dequantize_into_cases(backend: str) -> Iterator[Case]:
    yield torch.zeros(Z, D), *nf4_tensors(Z * D), 64, 256, backend
    yield torch.zeros(2 * N * 5)[: N * 5].view(N, 5), *nf4_tensors(N * 5), 64, 256, backend


def rms_norm_cases(backend: str) -> Iterator[Case]:
    weight = rows(D, grad=False)
    yield rows(N, D), weight, 1e-5, backend
    yield torch.randn(2, 3, 2 * D)[..., D:].requires_grad_(), weight.half(), 1e-5, backend
    yield rows(N, D, grad=False).half(), weight, 0.3, backend
    yield rows(0, D), weight, 1e-5, backend


def add_rms_norm_cases(backend: str) -> Iterator[Case]:
    weight = rows(D, grad=False)
    yield rows(N, D), rows(N, D), weight, 1e-5, backend
    yield rows(2, 3, D), torch.randn(2, 3, 2 * D)[..., D:], weight, 1e-5, backend
    yield rows(N, D, grad=False), rows(N, D), weight, 1e-5, backend


def rms_norm_backward_cases(backend: str) -> Iterator[Case]:
    dy, h = torch.randn(2, N, D)
    weight, rstd = torch.randn(D), torch.rand(N)
    yield dy, None, h, weight, rstd, backend
    yield dy, torch.randn(N, 2 * D)[:, D:], h, weight, rstd, backend
    yield dy.half(), dy[:1].half().expand(N, D), h.half(), weight.half(), rstd, backend


def swiglu_forward_cases(backend: str) -> Iterator[Case]:
    yield *torch.randn(2, N, D), backend
    yield *torch.randn(N, 2 * D).half().chunk(2, dim=1), backend
    yield *torch.randn(2, 0, D), backend


def swiglu_backward_into_cases(backend: str) -> Iterator[Case]:
    yield *torch.randn(3, N, D).unbind(), backend
    yield torch.randn(N, D).half(), torch.randn(N, 2 * D).half()[:, D:], torch.randn(N, D).half(), backend


def rotate_cases(backend: str) -> Iterator[Case]:
    cos, sin = torch.randn(2, N, 6)
    yield rows(N, 4, 6), rows(N, 2, 6), cos, sin, backend
    q, k, _ = torch.randn(N, 8, 6, dtype=torch.float16).split([4, 2, 2], 1)
    yield q.requires_grad_(), k, cos, sin, backend
    yield rows(4, N, 6).transpose(0, 1), rows(N, 1, 6), cos.T.contiguous().T, sin[:1].expand(N, 6), backend
    yield rows(0, 4, 6), rows(0, 2, 6), cos[:0], sin[:0], backend


def rotate_backward_cases(backend: str) -> Iterator[Case]:
    cos, sin = torch.randn(2, N, 6)
    yield [torch.randn(N, 4, 6), torch.randn(N, 2, 6)], cos, sin, backend
    yield [torch.randn(N, 4, 1).half().expand(N, 4, 6)], cos, sin, backend


CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "philox_words": philox_words_cases,
    "philox_normal": philox_normal_cases,
    "philox_dropout": philox_dropout_cases,
    "philox_dropout_backward": philox_dropout_backward_cases,
    "philox_dropout_add_": philox_dropout_add_cases,
    "ib_kl_loss": ib_kl_loss_cases,
    "ib_kl_backward": ib_kl_backward_cases,
    "ib_bottleneck": ib_bottleneck_cases,
    "ib_bottleneck_backward": ib_bottleneck_backward_cases,
    "ib_bottleneck_backward_": ib_bottleneck_backward_into_cases,
    "ib_lora_backward": ib_lora_backward_cases,
    "ib_lora_backward_": ib_lora_backward_into_cases,
    "scatter_rows": scatter_rows_cases,
    "linear_cross_entropies": linear_cross_entropies_cases,
    "nf4_dequantize": nf4_dequantize_cases,
    "nf4_dequantize_": nf4_dequantize_into_cases,
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "rms_norm_backward": rms_norm_backward_cases,
    "rotate": rotate_cases,
    "rotate_backward": rotate_backward_cases,
    "swiglu_forward": swiglu_forward_cases,
    "swiglu_backward_": swiglu_backward_into_cases,
}


def registered() -> set[str]:
    prefix = f"{NAMESPACE}::"
    return {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}


def test_every_registered_op_has_cases():
    assert registered() == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, backend):
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for arguments in CASES[name](backend):
        torch.library.opcheck(op, arguments)


# --- one full graph -------------------------------------------------------------------------------


def normal_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * philox_normal(seed, noise_ids, Z, backend=backend)


def dropout_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return philox_dropout(x.sin(), 0.3, seed=seed, noise_ids=noise_ids, backend=backend)


def ib_kl_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mu, logvar = torch.cat([x, x.cos()], dim=-1).chunk(2, dim=-1)
    z, kl = ib_kl_loss(
        mu, logvar, seed=seed, noise_ids=noise_ids, mask=x[..., 0] > 0, reduction="batchmean",
        normalizer=seed.new_tensor([4.0], dtype=torch.float32), backend=backend,
    )  # fmt: skip
    return z.square().mean() + kl


def linear(rows_out: int) -> Linear:
    fixed = torch.Generator().manual_seed(rows_out)
    return Linear(torch.randn(rows_out, Z, generator=fixed), torch.randn(rows_out, generator=fixed))


ENCODER, UP, HEAD = linear(2 * Z), linear(Z), linear(V)
ROWS, LABELS = torch.tensor([0, 3, 4, 11]), torch.tensor([2, V - 1, -100, 7])


def bottleneck_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    z, kl = ib_bottleneck(x, *ENCODER, seed=seed, noise_ids=noise_ids, mask=x[..., 0] > 0, backend=backend)
    return z.square().mean() + kl


def latent_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    latent = ib_bottleneck_latent(
        x, ENCODER.weight, None, seed=seed, noise_ids=noise_ids, reduction="sum", backend=backend
    )
    return latent.z.square().mean() + latent.kl + latent.mu.mean() + latent.logvar.mean()


def lora_backward_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Out of place, then into a buffer. It is a backward, so x's gradient flows beside it."""
    rows, one = x.detach().view(-1, Z), x.new_ones(1)
    options = {"seed": seed, "noise_ids": noise_ids.view(-1, 3), "needs_bias": True, "backend": backend}
    encoder = ENCODER.weight, torch.cat([rows, rows.cos()], dim=1), one
    first = ib_lora_backward(rows, rows.sin(), one[0], *encoder, HEAD.weight[:Z].t(), scaling=0.5, **options)
    buffer = rows * first.dbias[:Z]
    second = ib_lora_backward(buffer, rows.cos(), None, *encoder, None, inplace=True, **options)
    return x * (first.dhidden @ UP.weight + first.dlora + buffer + second.dbias[Z:]).view(x.shape)


def cross_entropy_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    loss = linear_cross_entropy(x, HEAD.weight, LABELS, bias=HEAD.bias, rows=ROWS, backend=backend)
    return loss * (seed % 7 + 1)  # it draws nothing itself


def fold_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weight, bias = fold_head(HEAD.weight, x[0, 0, :, None] * UP.weight, UP.bias, HEAD.bias)
    return (weight.square().mean() + bias.mean()) * (seed % 7 + 1)


def folded_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    loss = folded_cross_entropy(
        x, *UP, HEAD.weight, LABELS, rows=ROWS, head_bias=HEAD.bias, fold=True, backend=backend
    )  # fmt: skip
    return loss * (seed % 7 + 1)


def objective_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ib_objective(
        x, x.cos(), LABELS, head=HEAD, encoder=ENCODER, up=UP, alpha=0.1, beta=0.02, rows=ROWS,
        seed=seed, noise_ids=noise_ids, backend=backend,
    ).loss  # fmt: skip


NF4 = nf4_tensors(Z * Z)


def nf4_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Alone, then into a buffer longer than the weight."""
    y = x @ nf4_dequantize(*NF4, shape=(Z, Z), dtype=torch.float32, backend=backend)
    buffer = x.new_zeros(Z * Z + 3)
    w = nf4_dequantize(*NF4, shape=(Z, Z), dtype=torch.float32, out=buffer, backend=backend)
    return (y.sin() @ w + buffer[:Z]) * (seed % 7 + 1)  # it draws nothing itself


def rms_norm_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x.sin(), UP.bias, 1e-5, backend=backend) * (seed % 7 + 1)  # it draws nothing itself


def add_rms_norm_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The residual goes on, as it does from block to block."""
    y, h = add_rms_norm(x.sin(), x, UP.bias, 1e-5, backend=backend)
    return (y.cos() + h) * (seed % 7 + 1)


def rotate_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """On slices of one product, of which v goes its own way."""
    qkv = torch.cat([x.flatten(0, 1)] * 2, dim=1).sin().view(-1, 5, 8)
    q, k, v = qkv.split([3, 1, 1], dim=1)
    angles = ROWS.repeat(5)[: q.shape[0], None] * UP.bias[None, :8]
    q, k = rotate(q, k, angles.cos(), angles.sin(), backend=backend)
    return (q * k + v) * (seed % 7 + 1)  # it draws nothing itself


def swiglu_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.detach().flatten(0, 1).repeat(1, 2).chunk(2, dim=1)
    return swiglu_forward(gate, up, backend=backend).view(x.shape) * x * (seed % 7 + 1)


def swiglu_backward_graph(backend: str, seed: torch.Tensor, noise_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """On halves of one buffer, which the graph must find changed."""
    fixed = x.detach().flatten(0, 1)
    both, h = torch.cat([fixed, fixed.cos()], dim=1), fixed.sin()
    swiglu_backward_(h, both[:, :Z], both[:, Z:], backend=backend)
    return (both @ ENCODER.weight + h).view(x.shape) * x * (seed % 7 + 1)


GRAPHS = {
    "philox_normal": normal_graph,
    "philox_dropout": dropout_graph,
    "ib_kl_loss": ib_kl_graph,
    "ib_bottleneck": bottleneck_graph,
    "ib_bottleneck_latent": latent_graph,
    "ib_lora_backward": lora_backward_graph,
    "linear_cross_entropy": cross_entropy_graph,
    "nf4_dequantize": nf4_graph,
    "fold_head": fold_graph,
    "folded_cross_entropy": folded_graph,
    "ib_objective": objective_graph,
    "rms_norm": rms_norm_graph,
    "add_rms_norm": add_rms_norm_graph,
    "rotate": rotate_graph,
    "swiglu_forward": swiglu_graph,
    "swiglu_backward_": swiglu_backward_graph,
}
# containers; host arithmetic
NO_OP = {
    "Dropout", "FoldedHead", "IBLoraGradients", "Latent", "Linear", "LoraProjection", "LoraShadow", "MlpShadow",
    "ObjectiveParts", "Tapped", "fold_pays", "noise_key", "refresh_shadows",
}  # fmt: skip
BESIDE_A_GRAPH = {"lora_linear", "lora_qkv", "lora_mlp", "ib_lora_mlp"}  # nodes of whole layers, not compiled


def test_every_public_op_has_a_graph():
    assert set(GRAPHS) == set(ibft_kernels.__all__) - NO_OP - BESIDE_A_GRAPH


def test_lora_layers_run_between_compiled_parts(backend):
    """Eager's values and gradients to the bit, and nothing is compiled anew when the length changes."""
    torch.manual_seed(0)
    a, b = torch.randn(3, Z, requires_grad=True), torch.randn(Z, 3, requires_grad=True)
    layer = LoraProjection(UP.weight / 4, UP.bias, a, b, 0.1)

    def block(x):
        y = lora_linear(x.sin(), layer, backend=backend).cos()
        q, k, v = lora_qkv(y, layer, layer, layer, backend=backend)
        hidden, latent = ib_lora_mlp(q * k, v.tanh(), layer, layer, layer, *ENCODER, seed=3, backend=backend)
        return lora_mlp(hidden, layer, layer, layer, backend=backend).square().sum() + latent.kl

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, backend="aot_eager", dynamic=True)
    graphs = None
    for length in (5, 7, 12):
        x = torch.randn(length, Z, requires_grad=True)
        expected, found = (torch.autograd.grad(run(x), [x, a, b]) for run in (block, compiled))
        assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs in (None, made)
        graphs = made
    assert graphs > 0


@pytest.mark.parametrize("name", GRAPHS)
def test_one_full_graph(name, backend):
    """Compiled without a break: eager's values and gradients to the bit, and the seed is an input, not a constant."""
    torch._dynamo.reset()
    graph = GRAPHS[name]
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    results = []
    for seed in (SEED, SEED + 1):
        for run in (graph, compiled):
            torch.manual_seed(0)
            x, noise_ids = torch.randn(3, 5, Z, requires_grad=True), ids(15).view(3, 5, 3)
            out = run(backend, seed, noise_ids, x)
            (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 0.7))
            results.append((out.detach(), dx))
    for eager, found in (results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(eager, found, strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_a_compiled_graph_draws_its_own_seed_anew(backend):
    compiled = torch.compile(lambda mu: ib_kl_loss(mu, mu, backend=backend)[0], fullgraph=True, backend="aot_eager")
    mu = torch.zeros(4, 8)
    first, second = compiled(mu), compiled(mu)
    assert not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_than_the_current_device():
    mu, logvar = torch.randn(2, N, Z, device="cuda:1")
    with torch.cuda.device(0):
        z, _ = ib_kl_loss(mu, logvar, seed=1)
    assert z.device == mu.device
    torch.testing.assert_close(z.cpu(), ib_kl_loss(mu.cpu(), logvar.cpu(), seed=1)[0])
