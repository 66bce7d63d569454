"""The whole IB-FT objective, forward + backward: ours against the released way, half of the positions labelled."""

import pytest
import torch
from peak_memory import peak_mib
from released import objective as released_objective

from ibft_kernels import FoldedHead, Linear, ib_objective

ALPHA, BETA = 0.1, 0.02
SHAPES = {"cpu": (2048, 1024, 32768, 256, torch.float32), "cuda": (4096, 4096, 102400, 256, torch.bfloat16)}


def ours(t):
    """As the trainer calls it: the collator's row indices, one fold an optimizer step (here of one micro-batch)."""
    folded = FoldedHead(t["head_weight"], t["up_weight"], t["up_bias"])
    loss, *parts, _ = ib_objective(
        t["last"], t["tapped"], t["targets"], rows=t["rows"], head=Linear(t["head_weight"]),
        encoder=Linear(t["encoder_weight"], t["encoder_bias"]), up=folded, alpha=ALPHA, beta=BETA, eps=t["eps"],
        reduction="mean",
    )  # fmt: skip
    loss.backward()
    folded.backward()
    return loss, *parts


def released(t):
    names = ("eps", "head_weight", "encoder_weight", "encoder_bias", "up_weight", "up_bias")
    loss, *parts = released_objective(t["last"], t["tapped"], t["labels"], *(t[n] for n in names), ALPHA, BETA)
    loss.backward()
    return loss, *parts


PROVIDERS = {"ours": ours, "released": released}


def tensors(device):
    N, D, V, Z, dtype = SHAPES[device.type]
    torch.manual_seed(0)

    def leaf(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    t = {
        "last": leaf(N, D), "tapped": leaf(N, D), "head_weight": leaf(V, D, scale=D**-0.5).detach(),
        "encoder_weight": leaf(2 * Z, D, scale=D**-0.5), "encoder_bias": leaf(2 * Z, scale=0.1),
        "up_weight": leaf(D, Z, scale=Z**-0.5), "up_bias": leaf(D, scale=0.1), "eps": leaf(N, Z).detach(),
    }  # fmt: skip
    labels = torch.randint(0, V, (N,), device=device)
    labels[torch.randperm(N, device=device)[: N // 2]] = -100
    rows = (labels != -100).nonzero().squeeze(1)
    return t | {"labels": labels, "rows": rows, "targets": labels[rows]}


def run(provider, t):
    """Parts and gradients; the gradients of the inputs start over, as a step's do."""
    leaves = {name: value for name, value in t.items() if value.requires_grad}
    for value in leaves.values():
        value.grad = None
    parts = [part.detach() for part in PROVIDERS[provider](t)]
    if parts[0].is_cuda:
        torch.cuda.synchronize()
    return parts, {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider):
    t = tensors(device)
    (parts, grads), (expected_parts, expected) = run(provider, t), run("released", t)
    rel = 1e-5 if device.type == "cpu" else 3e-2
    for found, truth in zip(parts, expected_parts, strict=True):
        torch.testing.assert_close(found, truth, rtol=rel, atol=0, check_dtype=False)
    for name, truth in expected.items():
        assert (grads[name] - truth).norm() <= rel * truth.norm(), name
    del parts, grads, expected_parts, expected
    peak = peak_mib(lambda: run(provider, t), device)
    benchmark.pedantic(run, args=(provider, t), warmup_rounds=1, rounds=7)
    N, D, V, Z, dtype = SHAPES[device.type]
    record(
        "objective", op="ib_objective", provider=provider, mode="full", N=N, labelled=N // 2, D=D, Z=Z, V=V,
        dtype=str(dtype)[6:], peak_mib=f"{peak:.1f}",
    )  # fmt: skip
