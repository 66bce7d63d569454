"""LoRA layers over a frozen 4-bit base: ours, plain autograd over the same layers as PEFT writes it (an adapter a
module, each with a dropout of its own), and unsloth's functions. Bound: the products.

Without dropout all are held to eager in fp32. With dropout ours is held to the reference under the same Philox masks.
Eager draws other masks in every call, so there it is timed unchecked: the code is what all are held to without dropout.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ibft_kernels
from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled, unsloth
from benchmarks.steps.random_base import as_linear4bit, random_nf4
from ibft_kernels import Dropout, LoraProjection, reference

pytestmark = [pytest.mark.part("ops"), pytest.mark.patches]  # unsloth

P, SCALING = 0.05, 2.0
# tokens, hidden size, width of k and v, of the MLP, rank
SIZES = {"cpu": (2048, 768, 256, 2048, 32), "cuda": (4096, 4096, 4096, 11008, 32)}
EAGER = {
    "lora_linear": lambda layer, x, o: (layer(x, o),),
    "lora_qkv": lambda layer, x, q, k, v: (layer(x, q), layer(x, k), layer(x, v)),
    "lora_mlp": lambda layer, x, gate, up, down: (layer(F.silu(layer(x, gate)) * layer(x, up), down),),
}


def projections(t):
    return [LoraProjection(layer, None, t[f"a{i}"], t[f"b{i}"], SCALING) for i, layer in enumerate(t["layers"])]


def eager(op, p):
    """PEFT's layer, as under autocast: the masters are rounded in every call."""

    def layer(x, projection):
        dropped = F.dropout(x, p) if p else x
        low = F.linear(F.linear(dropped, projection.lora_a.to(x.dtype)), projection.lora_b.to(x.dtype))
        return projection.weight(x) + projection.scaling * low

    return Provider(lambda t: EAGER[op](layer, t["x"], *projections(t)), gate=not p)


def keyed(module, op, p, **settings):
    """The op of ibft_kernels or of its reference. Its shadows are made in the call: a step makes them once for all."""
    if p:
        settings["dropout"] = Dropout(p, 1)
        if op == "lora_mlp":
            settings["down_dropout"] = Dropout(p, 2)

    def run(t):
        made = getattr(module, op)(t["x"], *projections(t), **settings)
        return made if isinstance(made, tuple) else (made,)

    return Provider(run)


def unsloth_run(op):
    """x as [1, N, D]; not in place: that would write dx over x."""

    def run(t):
        from unsloth.kernels import fast_lora

        x = t["x"][None]
        weights = []
        for i, layer in enumerate(t["bitsandbytes"]):
            weights += [layer.weight, layer.weight.quant_state, t[f"a{i}"], t[f"b{i}"], SCALING]
        if op == "lora_linear":
            return (fast_lora.LoRA_W.apply(x, *weights)[0],)
        if op == "lora_qkv":
            return tuple(y[0] for y in fast_lora.LoRA_QKV.apply(x, *weights, False))
        kernels = fast_lora.swiglu_fg_kernel, fast_lora.swiglu_DWf_DW_dfg_kernel
        return (fast_lora.LoRA_MLP.apply(x, *weights, *kernels, False)[0],)

    return run


def left_out(provider, reason, where=("cpu", "cuda")):
    return replace(provider, obstacle_=lambda device: reason if device.type in where else None)


def providers(op, p):
    found = {"ours": keyed(ibft_kernels, op, p)}
    if op == "lora_mlp":
        found["ours, recompute"] = keyed(ibft_kernels, op, p, recompute=True)
    found |= {"eager": eager(op, p), "torch.compile": compiled(eager(op, p)), "unsloth": unsloth(unsloth_run(op))}
    if op != "lora_linear":
        found["torch.compile"] = left_out(found["torch.compile"], "a CPU compiles lora_linear alone", ["cpu"])
    if p:
        if op == "lora_mlp":  # seconds saved: gate and up are made again without dropout
            found["ours, recompute"] = left_out(found["ours, recompute"], "timed without dropout", ["cpu"])
        found["torch.compile"] = left_out(found["torch.compile"], "dropout takes a CPU 10 s to compile", ["cpu"])
        found["unsloth"] = left_out(found["unsloth"], "unsloth's functions know no dropout")
        found["same masks"] = replace(keyed(reference, op, p), timed=False)
    return found


# mode, dropout
CASES = {"cpu": [("full", 0.0), ("full", P)], "cuda": [(mode, p) for p in (0.0, P) for mode in MODES]}


def comparison(device, op, mode, p):
    N, D, KV, INNER, R = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = {
        "lora_linear": [(D, D)],
        "lora_qkv": [(D, D), (KV, D), (KV, D)],
        "lora_mlp": [(INNER, D), (INNER, D), (D, INNER)],
    }[op]
    detail = {"lora_linear": "", "lora_qkv": f"KV {KV}, ", "lora_mlp": f"inner {INNER}, "}[op] + f"R {R}"

    def inputs(device):
        generator = torch.Generator(device).manual_seed(torch.initial_seed())
        layers = [random_nf4(nn.Linear(i, o, bias=False, device="meta"), generator, dtype) for o, i in shapes]
        tensors = {
            "x": torch.randn(N, D, device=device).to(dtype).requires_grad_(),
            "layers": layers,
            "bitsandbytes": list(as_linear4bit(nn.Sequential(*layers), dtype)),
        }
        for i, (outputs, width) in enumerate(shapes):
            tensors[f"a{i}"] = (0.1 * torch.randn(R, width, device=device)).requires_grad_()
            tensors[f"b{i}"] = (0.1 * torch.randn(outputs, R, device=device)).requires_grad_()
        return tensors

    # Forward, one product with W and two with the adapter. Backward, dx through W, and four with the adapter
    base, adapter = {"forward": (1, 1), "backward": (1, 2), "full": (2, 3)}[mode]
    flop = sum(2 * N * (base * o * i + adapter * R * (o + i)) for o, i in shapes)
    return Comparison(
        "lora", op, {"N": N, "D": D, "detail": f"{detail}, dropout {p}" if p else detail}, dtype, inputs,
        providers(op, p), reference="same masks" if p else "eager", mode=mode, flop=flop,
    )  # fmt: skip


@each(CASES, providers("lora_linear", 0))
def test_lora_linear(compare, device, provider, case):
    compare(comparison(device, "lora_linear", *case), provider)


@each(CASES, providers("lora_qkv", 0))
def test_lora_qkv(compare, device, provider, case):
    compare(comparison(device, "lora_qkv", *case), provider)


@each(CASES, providers("lora_mlp", 0))
def test_lora_mlp(compare, device, provider, case):
    compare(comparison(device, "lora_mlp", *case), provider)
