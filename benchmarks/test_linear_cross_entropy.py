"""The main head's cross-entropy, forward + backward, frozen head, every row labelled: ours against its peers."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_mib

from ibft_kernels import linear_cross_entropy

SHAPES = {"cpu": (1024, 1024, 32768, torch.float32), "cuda": (4096, 4096, 102400, torch.bfloat16)}


def eager(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torch_chunked(hidden, weight, labels):
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(hidden, weight, labels)


PROVIDERS = {
    "ours": linear_cross_entropy,
    "eager": eager,
    "torch": torch_chunked,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}


def skip_unless_available(provider: str, device: torch.device) -> None:
    package = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}.get(provider)
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package and device.type == "cpu":
        pytest.skip(f"{package} has GPU kernels only")
    if provider == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider):
    skip_unless_available(provider, device)
    N, D, V, dtype = SHAPES[device.type]
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype)
    labels = torch.randint(0, V, (N,), device=device)

    def step(op=PROVIDERS[provider]):
        hidden.grad = None
        loss = op(hidden, weight, labels)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), hidden.grad

    (loss, grad), (true_loss, true_grad) = step(), step(eager)
    rel = 1e-5 if device.type == "cpu" else 3e-2
    torch.testing.assert_close(loss, true_loss, rtol=rel, atol=0, check_dtype=False)
    assert (grad - true_grad).norm() <= rel * true_grad.norm()
    del grad, true_grad
    hidden.grad = None
    peak = peak_mib(step, device)
    benchmark.pedantic(step, warmup_rounds=1, rounds=7)
    record(
        "linear_cross_entropy", op="linear_cross_entropy", provider=provider, mode="full", N=N, D=D, V=V,
        dtype=str(dtype)[6:], peak_mib=f"{peak:.1f}",
    )  # fmt: skip
