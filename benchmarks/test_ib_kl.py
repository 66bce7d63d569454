"""`ib_kl_loss` forward + backward: ours (Triton on CUDA, the torch path on a CPU) against plain PyTorch autograd."""

import pytest
import torch

from ibft_kernels import ib_kl_loss, reference

PROVIDERS = {"ours": ib_kl_loss, "eager": reference.ib_kl_loss}
SHAPES = {"cpu": [(2048, 64), (8192, 256)], "cuda": [(8192, 256), (262144, 256)]}


@pytest.mark.parametrize("noise", ["philox", "given"])
@pytest.mark.parametrize("size", [0, 1], ids=["small", "large"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider, size, noise):
    N, Z = SHAPES[device.type][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    mu, logvar = (torch.randn(N, Z, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(N, Z, device=device, dtype=dtype)
    eps = torch.randn(N, Z, device=device, dtype=dtype) if noise == "given" else None

    def step(op=PROVIDERS[provider]):
        z, kl = op(mu, logvar, seed=1, eps=eps, reduction="batchmean")
        grads = torch.autograd.grad((z, kl), (mu, logvar), (upstream, torch.ones_like(kl)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return z, kl, *grads

    # the gate: a wrong op is not timed
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for found, expected in zip(step(), step(reference.ib_kl_loss), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    benchmark.pedantic(step, warmup_rounds=3, rounds=15)
    record("ib_kl", op="ib_kl_loss", provider=provider, mode="full", noise=noise, N=N, Z=Z, dtype=str(dtype)[6:])
