"""LoRA layers in 4 bits, forward + backward: ours, and plain autograd over the same frozen weights as PEFT writes it
(an adapter a module, each with a dropout of its own).

peak_mib: the call above what was there before. kept_mib: alive between forward and backward, outputs and what
they saved. Both from the allocator; a resident set would count what malloc keeps for itself.
"""

import pytest
import torch
import torch.nn.functional as F
from peak_memory import MIB, live_bytes, peak_mib

from ibft.nf4 import NF4Linear
from ibft_kernels import Dropout, LoraProjection, LoraShadow, MlpShadow, lora_mlp, lora_qkv

# rows, hidden, kv width, intermediate, rank
SHAPES = {"cpu": (2048, 768, 256, 2048, 32), "cuda": (4096, 4096, 4096, 11008, 32)}
P = 0.05


def projection(out, inputs, rank, device, dtype):
    base = NF4Linear.quantize((torch.randn(out, inputs, device=device) * inputs**-0.5).to(dtype))
    a, b = torch.randn(rank, inputs, device=device) * 0.1, torch.randn(out, rank, device=device) * 0.1
    return LoraProjection(base, None, a.requires_grad_(), b.requires_grad_(), 2.0)


def plain(x, p, dropout):
    dropped = F.dropout(x, P) if dropout else x
    low = F.linear(F.linear(dropped, p.lora_a.to(x.dtype)), p.lora_b.to(x.dtype))
    return p.weight(x) + p.scaling * low


def plain_qkv(x, q, k, v, dropout):
    return tuple(plain(x, p, dropout) for p in (q, k, v))


def plain_mlp(x, gate, up, down, dropout):
    return (plain(F.silu(plain(x, gate, dropout)) * plain(x, up, dropout), down, dropout),)


def ours_qkv(x, q, k, v, dropout):
    drop = Dropout(P, 1) if dropout else None
    return lora_qkv(x, q, k, v, dropout=drop, shadow=LoraShadow([q, k, v], x.dtype))


def ours_mlp(x, gate, up, down, dropout, recompute=False):
    drops = {"dropout": Dropout(P, 1), "down_dropout": Dropout(P, 2)} if dropout else {}
    shadow = MlpShadow(LoraShadow([gate, up], x.dtype), LoraShadow([down], x.dtype))
    return (lora_mlp(x, gate, up, down, shadow=shadow, recompute=recompute, **drops),)


def ours_mlp_recompute(*arguments):
    return ours_mlp(*arguments, recompute=True)


PROVIDERS = {
    "lora_qkv": {"ours": ours_qkv, "eager": plain_qkv},
    "lora_mlp": {"ours": ours_mlp, "ours, recompute": ours_mlp_recompute, "eager": plain_mlp},
}


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(("op", "provider"), [(op, name) for op, names in PROVIDERS.items() for name in names])
def test_forward_backward(benchmark, record, device, op, provider, dropout):
    N, D, KV, INNER, R = SHAPES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    sizes = [(D, D), (KV, D), (KV, D)] if op == "lora_qkv" else [(INNER, D), (INNER, D), (D, INNER)]
    layers = [projection(*size, R, device, dtype) for size in sizes]
    x = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    leaves = [x, *(m for p in layers for m in (p.lora_a, p.lora_b))]

    def forward(name=provider, dropout=dropout):
        return PROVIDERS[op][name](x, *layers, dropout)

    def step(name=provider, dropout=dropout):
        outputs = forward(name, dropout)
        grads = torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [*outputs, *grads]

    # the gate, without dropout: the two draw different masks
    for found, expected in zip(step(dropout=False), step("eager", dropout=False), strict=True):
        assert (found - expected).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    del found, expected
    held = []
    if device.type == "cpu":
        peak, kept = live_bytes(step)[0] / MIB, live_bytes(lambda: held.append(forward()))[1] / MIB
    else:
        peak, before = peak_mib(step, device), torch.cuda.memory_allocated()
        held.append(forward())
        kept = (torch.cuda.memory_allocated() - before) / MIB
    held.clear()
    benchmark.pedantic(step, warmup_rounds=2, rounds=15)
    record(
        "lora", op=op, provider=provider, mode="full", N=N, D=D, KV=KV, inner=INNER, R=R, dropout=P if dropout else 0,
        dtype=str(dtype)[6:], peak_mib=f"{peak:.1f}",
        kept_mib=f"{kept:.1f}",
    )  # fmt: skip
