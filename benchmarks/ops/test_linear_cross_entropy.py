"""The main head's cross-entropy over a frozen head: ours, and every way there is of not holding [N, V] logits.

Peers get labels of -100 where a position has none; ours gets what the trainer's collator hands it, the M labelled rows
and their labels. The two products of M rows with the head, for logits and for the gradient, are the bound.
cut-cross-entropy leaves out what it thinks too small of a gradient; "exact" is the same without that.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import MODES, Comparison, each
from benchmarks.harness.providers import Provider, compiled, cut_cross_entropy, liger, torch_linear_cross_entropy
from ibft_kernels import linear_cross_entropy

pytestmark = pytest.mark.part("heads")


def eager_loss(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torch_loss(hidden, weight, labels):
    """In chunks where its documentation says that they pay: from as many rows as D on."""
    chunks = torch.nn.LinearCrossEntropyOptions() if len(hidden) >= hidden.shape[1] else None
    return F.linear_cross_entropy(hidden, weight, labels, options=chunks)


def liger_loss(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def cut_loss(hidden, weight, labels, **options):
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(hidden, weight, labels, **options)


def exact_cut_loss(hidden, weight, labels):
    return cut_loss(hidden, weight, labels, filter_eps=None)


def ours(t):
    return (linear_cross_entropy(t["hidden"], t["weight"], t["targets"], rows=t["rows"]),)


def way(loss):
    return lambda t: (loss(t["hidden"], t["weight"], t["labels"]),)


PROVIDERS = {
    "ours": Provider(ours),
    "eager": Provider(way(eager_loss)),
    "torch.compile": compiled(Provider(way(eager_loss))),
    "F.linear_cross_entropy": torch_linear_cross_entropy(way(torch_loss)),
    "liger": liger(way(liger_loss)),
    "cut-cross-entropy": cut_cross_entropy(way(cut_loss)),
    "cut-cross-entropy, exact": cut_cross_entropy(way(exact_cut_loss)),
}

# On a CPU F.linear_cross_entropy works in chunks of a few rows: one size is enough to see how that goes.
CPU_PROVIDERS = {name: PROVIDERS[name] for name in ("ours", "eager", "torch.compile")}

# mode, N, D, V, labelled share
CASES = {
    "cpu": [("full", 512, 512, 16384, 1.0)],
    "cuda": [
        *((mode, 4096, 4096, 102400, 1.0) for mode in MODES),
        *(("full", 4096, 4096, 102400, share) for share in (0.5, 0.25, 0.1)),
    ],
}
CPU_CASES = {
    "cpu": [("full", 1024, 1024, 32768, 1.0), *(("full", 512, 512, 16384, share) for share in (0.5, 0.1))],
}


def comparison(device, providers, mode, N, D, V, share):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    M = round(share * N)

    def inputs(device):
        labels = torch.randint(V, (N,), device=device)
        labels[torch.randperm(N, device=device)[M:]] = -100
        rows = (labels != -100).nonzero().squeeze(1)
        return {
            "hidden": torch.randn(N, D, device=device).to(dtype).requires_grad_(),
            "weight": (torch.randn(V, D, device=device) * D**-0.5).to(dtype),
            "labels": labels, "rows": rows, "targets": labels[rows],
        }  # fmt: skip

    # A head's gradient is a mean of its rows by softmax, which like attention's output could be had from one reading:
    # so each input once, and the gradient, with zeros for rows without a label. Providers differ in which pass makes
    # it: all that a backward surely does is to write it.
    read, written = V * D + M * D, N * D
    flop, elements = {
        "forward": (2 * M * D * V, read), "backward": (0, written), "full": (4 * M * D * V, read + written),
    }[mode]  # fmt: skip
    return Comparison(
        "linear_cross_entropy", "linear_cross_entropy", {"N": N, "D": D, "V": V, "detail": f"labelled {share:g}"},
        dtype, inputs, providers, mode=mode, bytes=elements * dtype.itemsize, flop=flop,
        seconds=0.3 if mode == "backward" else 2.0,  # each timed backward waits for an untimed forward
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_linear_cross_entropy(compare, device, provider, case):
    compare(comparison(device, PROVIDERS, *case), provider)


@each(CPU_CASES, CPU_PROVIDERS)
def test_linear_cross_entropy_cpu(compare, device, provider, case):
    compare(comparison(device, CPU_PROVIDERS, *case), provider)
