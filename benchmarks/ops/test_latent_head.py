"""The bottleneck's cross-entropy CE(head(up(z))) over a frozen head, every row labelled: ours, which folds head and
up-projection into one matrix, against the direct way.

`direct` holds all logits; `direct, chunked` is our own loop over chunks of them, without the fold: the difference is
the fold alone. `ours, 8 micro-batches` shares one fold among eight, as an optimizer step does; its time is that of one.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider, compiled
from ibft_kernels import FoldedHead, folded_cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.part("heads")

LEAVES = ("z", "up_weight", "up_bias")


def chunked(t, *, fold):
    return folded_cross_entropy(
        t["z"], t["up_weight"], t["up_bias"], t["head"], t["labels"], rows=t["rows"], fold=fold
    )  # fmt: skip


def direct(t):
    hidden = F.linear(t["z"], t["up_weight"], t["up_bias"])
    return F.cross_entropy(F.linear(hidden, t["head"]).float(), t["labels"])


def way(loss_of):
    def run(t):
        loss = loss_of(t)
        return loss, *torch.autograd.grad(loss, [t[name] for name in LEAVES])

    return Provider(run)


def eight_micro_batches(t):
    """The same micro-batch eight times: the mean loss of the step and its gradients are one micro-batch's."""
    leaves = [t[name] for name in LEAVES]
    for leaf in leaves:
        leaf.grad = None  # of a call that was broken off
    head, total = FoldedHead(t["head"], t["up_weight"], t["up_bias"]), 0.0
    for _ in range(8):
        loss = linear_cross_entropy(t["z"], head.weight, t["labels"], bias=head.bias, rows=t["rows"]) / 8
        loss.backward()
        total = total + loss.detach()
    head.backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None  # else the next call would add to it
    return total, *gradients


PROVIDERS = {
    "ours": way(partial(chunked, fold=True)),
    "ours, 8 micro-batches": Provider(eight_micro_batches, calls=8),
    "direct, chunked": way(partial(chunked, fold=False)),
    "direct": way(direct),
    "torch.compile": compiled(way(direct)),
}
# a call of each of the others takes 2 to 4 s there
LARGE_PROVIDERS = {name: PROVIDERS[name] for name in ("ours", "direct, chunked")} | {
    "direct": replace(PROVIDERS["direct"], timed=False)
}

# N, D, Z, V
CASES = {"cpu": [(512, 1024, 256, 16384)], "cuda": [(4096, 4096, 256, 102400)]}
LARGE = {"cpu": [(2048, 2048, 256, 32768)]}


def comparison(device, providers, N, D, Z, V):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs(device):
        def random(*shape, scale=1.0):
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        return {
            "z": random(N, Z).requires_grad_(), "up_weight": random(D, Z, scale=Z**-0.5).requires_grad_(),
            "up_bias": random(D, scale=0.1).requires_grad_(), "head": random(V, D, scale=D**-0.5),
            "labels": torch.randint(V, (N,), device=device),
            "rows": torch.arange(N, device=device),  # as the collator hands them over: else ours would look for them
        }  # fmt: skip

    # The least is the folded way's, as no N here is so small that the direct 4 N D V would be less: logits, dz and dM,
    # 2 N Z V each, and the fold and its backward, 2 D Z V each, shared where a provider shares them. Each input is read
    # once, each gradient written once.
    sharing = max(provider.calls for provider in providers.values())
    return Comparison(
        "latent_head", "folded_cross_entropy", {"N": N, "D": D, "Z": Z, "V": V}, dtype, inputs, providers,
        reference="direct", whole=True, flop=6 * N * Z * V + 4 * D * Z * V / sharing,
        bytes=(2 * N * Z + (V * D + 2 * D * Z + 2 * D) / sharing) * dtype.itemsize,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_latent_head(compare, device, provider, case):
    compare(comparison(device, PROVIDERS, *case), provider)


@each(LARGE, LARGE_PROVIDERS)
def test_latent_head_large(compare, device, provider, case):
    compare(comparison(device, LARGE_PROVIDERS, *case), provider)
