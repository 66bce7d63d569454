"""The bottleneck's cross-entropy CE(head(up(z))), forward + backward, every row labelled: folded against direct.

`direct` holds all logits, `direct-chunked` is our own loop without the fold; `folded-8` shares one fold among eight
micro-batches, as an optimizer step does (its time is that of one micro-batch: an eighth of all).
"""

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_mib

from ibft_kernels import FoldedHead, folded_cross_entropy, linear_cross_entropy

SHAPES = {"cpu": (2048, 2048, 32768, 256, torch.float32), "cuda": (4096, 4096, 102400, 256, torch.bfloat16)}


def direct(z, up_weight, up_bias, head_weight, labels):
    F.cross_entropy(F.linear(F.linear(z, up_weight, up_bias), head_weight).float(), labels).backward()


def direct_chunked(*tensors):
    folded_cross_entropy(*tensors, fold=False).backward()


def folded(*tensors):
    folded_cross_entropy(*tensors, fold=True).backward()


def folded_8(z, up_weight, up_bias, head_weight, labels):
    head = FoldedHead(head_weight, up_weight, up_bias)
    for _ in range(8):
        (linear_cross_entropy(z, head.weight, labels, bias=head.bias) / 8).backward()
    head.backward()


PROVIDERS = {
    "folded": (folded, 1),
    "folded-8": (folded_8, 8),
    "direct-chunked": (direct_chunked, 1),
    "direct": (direct, 1),
}


def gradients(call, tensors):
    z, up_weight, up_bias, *_ = tensors
    for leaf in (z, up_weight, up_bias):
        leaf.grad = None
    call(*tensors)
    if z.is_cuda:
        torch.cuda.synchronize()
    return z.grad, up_weight.grad, up_bias.grad


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, record, device, provider):
    N, D, V, Z, dtype = SHAPES[device.type]
    call, micro_batches = PROVIDERS[provider]
    torch.manual_seed(0)

    def leaf(*shape, scale):
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    z, up_weight, up_bias = leaf(N, Z, scale=1.0), leaf(D, Z, scale=Z**-0.5), leaf(D, scale=0.1)
    tensors = (z, up_weight, up_bias, leaf(V, D, scale=D**-0.5).detach(), torch.randint(0, V, (N,), device=device))
    rel = 1e-4 if device.type == "cpu" else 3e-2
    for found, truth in zip(gradients(call, tensors), gradients(direct, tensors), strict=True):
        assert (found - truth).norm() <= rel * truth.norm()
    for tensor in tensors:
        tensor.grad = None
    peak = peak_mib(lambda: gradients(call, tensors), device)
    benchmark.pedantic(gradients, args=(call, tensors), warmup_rounds=1, rounds=3 if micro_batches > 1 else 7)
    record(
        "latent_head", op="folded_cross_entropy", provider=provider, mode="full", micro_batches=micro_batches, N=N, D=D,
        Z=Z, V=V, dtype=str(dtype)[6:], peak_mib=f"{peak:.1f}", scale=1 / micro_batches,
    )  # fmt: skip
