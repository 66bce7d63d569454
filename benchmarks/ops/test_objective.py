"""The whole IB-FT objective, forward + backward, over a frozen head: ours; the released way, which is the reference;
and what one can write with each library at hand.

`eager` and the libraries share the bottleneck in plain PyTorch and are given the labelled rows alone, as ours is: two
whole heads there, one call each. `released` computes both heads at every position.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider, compiled, cut_cross_entropy, liger, torch_linear_cross_entropy
from benchmarks.ops import released
from benchmarks.ops.test_linear_cross_entropy import cut_loss, eager_loss, exact_cut_loss, liger_loss, torch_loss
from ibft_kernels import FoldedHead, Linear, fold_pays, ib_objective, reference

pytestmark = pytest.mark.part("heads")

ALPHA, BETA = 0.1, 0.02
LEAVES = ("last", "tapped", "encoder_weight", "encoder_bias", "up_weight", "up_bias")


def ours(t):
    """As the trainer does: the collator's rows, and one fold an optimizer step where that pays, here of one
    micro-batch. The fold's backward goes through `.grad`, which starts and ends empty.
    """
    leaves = [t[name] for name in LEAVES]
    for leaf in leaves:
        leaf.grad = None  # of a call that was broken off
    up, folded = (t["up_weight"], t["up_bias"]), None
    if fold_pays(t["rows"].numel(), *t["up_weight"].shape):
        folded = FoldedHead(t["head"], *up)
    loss, *parts, _ = ib_objective(
        t["last"], t["tapped"], t["targets"], rows=t["rows"], head=Linear(t["head"]),
        encoder=Linear(t["encoder_weight"], t["encoder_bias"]), up=folded or Linear(*up), alpha=ALPHA, beta=BETA,
        eps=t["eps"], reduction="mean", kl_normalizer=t["positions"],
    )  # fmt: skip
    loss.backward()
    if folded is not None:
        folded.backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return loss, *parts, *gradients


def released_way(t):
    names = ("last", "tapped", "labels", "eps", "head", "encoder_weight", "encoder_bias", "up_weight", "up_bias")
    return released.objective(*(t[name] for name in names), ALPHA, BETA)


def two_heads(head_loss):
    """The objective with `head_loss` (hidden, weight, labels) for both heads."""

    def parts(t):
        z, kl = reference.ib_bottleneck(
            t["tapped"], t["encoder_weight"], t["encoder_bias"], eps=t["eps"], reduction="mean",
            normalizer=t["positions"],
        )  # fmt: skip
        ce = head_loss(t["last"].index_select(0, t["rows"]), t["head"], t["targets"])
        hidden = F.linear(z.index_select(0, t["rows"]), t["up_weight"], t["up_bias"])
        ce_z = head_loss(hidden, t["head"], t["targets"])
        return ce + ALPHA * (kl + BETA * ce_z), ce, kl, ce_z

    return parts


def way(parts_of):
    def run(t):
        loss, *parts = parts_of(t)
        return loss, *parts, *torch.autograd.grad(loss, [t[name] for name in LEAVES])

    return run


PROVIDERS = {
    "ours": Provider(ours),
    "released": Provider(way(released_way)),
    "eager": Provider(way(two_heads(eager_loss))),
    "torch.compile": compiled(Provider(way(two_heads(eager_loss)))),
    "F.linear_cross_entropy": torch_linear_cross_entropy(way(two_heads(torch_loss))),
    "liger": liger(way(two_heads(liger_loss))),
    "cut-cross-entropy": cut_cross_entropy(way(two_heads(cut_loss))),
    "cut-cross-entropy, exact": cut_cross_entropy(way(two_heads(exact_cut_loss))),
}
# torch.compile costs seconds for every shape. On a CPU F.linear_cross_entropy works in chunks of a few rows, and took 2
# to 12 times as long as eager in the sweeps: the case of all providers is small enough for both.
CUDA_SWEEP_PROVIDERS = {name: provider for name, provider in PROVIDERS.items() if name != "torch.compile"}
CPU_SWEEP_PROVIDERS = {name: PROVIDERS[name] for name in ("ours", "released", "eager")}

# N, D, Z, V, labelled share. The sweeps go through the case of all providers; only on a CPU that over V does not. Z
# there is an eighth of D: with the 256 of the large cases a fold would not pay at these sizes, as it does at theirs.
CASES = {"cpu": [(512, 512, 64, 16384, 0.5)], "cuda": [(4096, 4096, 256, 102400, 0.5)]}
CPU_SWEEP = {
    "cpu": [
        (2048, 1024, 256, 32768, 0.5),
        *((N, 512, 64, 16384, 0.5) for N in (256, 1024)),
        *((512, 512, 64, 16384, share) for share in (1.0, 0.1)),
        *((128, 256, 32, V, 0.5) for V in (32768, 98304, 151936)),
    ]
}
CUDA_SWEEP = {
    "cuda": [
        *((N, 4096, 256, 102400, 0.5) for N in (1024, 2048, 8192)),
        *((4096, 4096, 256, 102400, share) for share in (1.0, 0.25, 0.1)),
        *((4096, 4096, 256, V, 0.5) for V in (32000, 64000, 128256, 151936)),
    ]
}


def comparison(device, providers, N, D, Z, V, share):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    M = round(share * N)

    def inputs(device):
        def random(*shape, scale=1.0):
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        leaves = {
            "last": random(N, D), "tapped": random(N, D), "encoder_weight": random(2 * Z, D, scale=D**-0.5),
            "encoder_bias": random(2 * Z, scale=0.1), "up_weight": random(D, Z, scale=Z**-0.5),
            "up_bias": random(D, scale=0.1),
        }  # fmt: skip
        labels = torch.randint(V, (N,), device=device)
        labels[torch.randperm(N, device=device)[M:]] = -100
        rows = (labels != -100).nonzero().squeeze(1)
        return {name: x.requires_grad_() for name, x in leaves.items()} | {
            "head": random(V, D, scale=D**-0.5), "eps": random(N, Z), "labels": labels, "rows": rows,
            "targets": labels[rows], "positions": torch.tensor(N, device=device),
        }  # fmt: skip

    # The main head's two products; the latent head's, of which there are fewer either folded or direct; the encoder's
    # three. Each input is read once, of `last` the labelled rows, and each gradient written once.
    latent = min(4 * D * Z * V + 6 * M * Z * V, 4 * M * D * V + 6 * M * D * Z)
    flop = 4 * M * D * V + latent + 12 * N * D * Z
    elements = V * D + M * D + N * D + N * Z + 2 * N * D + 2 * (2 * Z * D + 2 * Z + D * Z + D)
    # up_bias has its gradient of a fold by a product with a vector, whose sums over V are off by 3.2e-6 at V 32768 and
    # 6.9e-6 at 151936 (CPU, fp32, the most of four seeds); all else of ours is off by less than 1e-6.
    tolerance = 2e-5 if dtype == torch.float32 else None
    return Comparison(
        "objective", "ib_objective", {"N": N, "D": D, "Z": Z, "V": V, "detail": f"labelled {share:g}"}, dtype, inputs,
        providers, reference="released", tolerance=tolerance, whole=True, bytes=elements * dtype.itemsize, flop=flop,
    )  # fmt: skip


@each(CASES, PROVIDERS)
def test_objective(compare, device, provider, case):
    compare(comparison(device, PROVIDERS, *case), provider)


@each(CPU_SWEEP, CPU_SWEEP_PROVIDERS)
def test_objective_cpu(compare, device, provider, case):
    compare(comparison(device, CPU_SWEEP_PROVIDERS, *case), provider)


@each(CUDA_SWEEP, CUDA_SWEEP_PROVIDERS)
def test_objective_cuda(compare, device, provider, case):
    compare(comparison(device, CUDA_SWEEP_PROVIDERS, *case), provider)
