"""Peak memory of the whole objective: it grows with the vocabulary by the weights it folds, never by [N, V]."""

import pytest
import torch

from benchmarks.harness.peak_memory import peak_mib
from ibft_kernels import FoldedHead, Linear, ib_objective, reference

N, D, Z, CHUNK_MIB = 2048, 32, 8, 4


def objective(n_columns: int, device: torch.device, *, op=ib_objective, shared=True):
    head, up = Linear(torch.randn(n_columns, D, device=device)), torch.nn.Linear(Z, D, device=device)
    encoder = torch.nn.Linear(D, 2 * Z, device=device)
    last, tapped = (torch.randn(N, D, device=device, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, n_columns, (N,), device=device)

    def call():
        folded = FoldedHead(head.weight, up.weight, up.bias) if shared else Linear(up.weight, up.bias)
        loss, *_ = op(
            last, tapped, labels, head=head, encoder=Linear(encoder.weight, encoder.bias), up=folded, alpha=0.1,
            beta=0.02, seed=1, chunk_bytes=CHUNK_MIB << 20,
        )  # fmt: skip
        loss.backward()
        if shared:
            folded.backward()

    call()
    return call


@pytest.mark.parametrize("shared", [True, False])
def test_peak_memory_does_not_grow_with_rows_times_vocabulary(device, monkeypatch, shared):
    from ibft_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "INTERPRETED", False)  # a CPU's torch path: the interpreter has copies of its own
    torch.use_deterministic_algorithms(False)  # poisoning would touch every page that torch.empty hands out
    small, large = 2048, 32768
    peaks = [peak_mib(objective(v, device, shared=shared), device) for v in (small, large)]
    logits = N * (large - small) * 4 / 2**20  # 240 MiB
    # M, the gradient of M as the loop makes it, scaled by the upstream gradient, and accumulated
    weights = 4 * (large - small) * Z * 4 / 2**20
    assert peaks[1] - peaks[0] < 1.5 * weights + CHUNK_MIB < logits / 20
    assert peaks[1] < CHUNK_MIB + logits / 20 + 8


def test_the_measure_sees_whole_logits(device, monkeypatch):
    """The same measure on the reference: if it did not show the logits there, it would prove nothing above."""
    torch.use_deterministic_algorithms(False)
    call = objective(8192, device, op=reference.ib_objective, shared=False)
    assert peak_mib(call, device) > 2 * N * 8192 * 4 / 2**20
