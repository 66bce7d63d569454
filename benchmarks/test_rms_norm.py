"""`rms_norm` and `add_rms_norm` forward + backward under a frozen weight: ours (Triton on CUDA, torch path on a CPU),
transformers' LlamaRMSNorm in eager PyTorch, torch's own rms_norm, and on CUDA liger-kernel's where it is installed.
"""

import pytest
import torch

from ibft_kernels import add_rms_norm, rms_norm

EPS = 1e-6
# rows of a hidden state; rows of the heads that a q or k norm sees
SHAPES = {"cpu": [(2048, 1024), (16384, 64)], "cuda": [(8192, 4096), (262144, 128)]}


def llama(x, weight, eps):
    """transformers' LlamaRMSNorm.forward."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def torch_rms_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def liger(x, weight, eps):
    """As LlamaRMSNorm rounds. Not in place: by default its backward writes over dy, which each round here needs."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def summed(norm):
    """The residual sum as a block makes it with a norm that knows nothing of it."""

    def add_norm(x, residual, weight, eps):
        h = x + residual
        return norm(h, weight, eps), h

    return add_norm


PROVIDERS = {"ours": rms_norm, "eager": llama, "torch": torch_rms_norm, "liger": liger}
ADDING = {name: add_rms_norm if name == "ours" else summed(norm) for name, norm in PROVIDERS.items()}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("size", [0, 1], ids=["hidden", "heads"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider, size, residual):
    if provider == "liger":
        if device.type != "cuda":
            pytest.skip("liger-kernel runs on a GPU only")
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    N, C = SHAPES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs = [torch.randn(N, C, device=device, dtype=dtype).requires_grad_() for _ in range(1 + residual)]
    upstream = [torch.randn(N, C, device=device, dtype=dtype) for _ in inputs]
    weight = torch.randn(C, device=device, dtype=dtype)

    def step(name=provider):
        made = (ADDING if residual else PROVIDERS)[name](*inputs, weight, EPS)
        outputs = made if residual else (made,)
        grads = torch.autograd.grad(outputs, inputs, upstream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return *outputs, *grads

    # the gate: a wrong op is not timed
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for found, expected in zip(step(), step("eager"), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    benchmark.pedantic(step, warmup_rounds=3, rounds=25)
    op = "add_rms_norm" if residual else "rms_norm"
    record("rms_norm", op=op, provider=provider, mode="full", N=N, C=C, dtype=str(dtype)[6:])
