"""Cross-entropy of a linear head without its [N, V] logits; one head, or several over the same labelled rows.

    x    = h W^T + b                        for the M rows with a label only, some rows at a time
    loss = sum_m (logsumexp(x_m) - x_m[y_m])
    g    = softmax(x) - onehot(y)           written over x
    dh   = g W        dW = g^T h        db = sum_m g_m

Loss and gradients are made in one visit of a chunk of logits, whose buffer has a fixed size in bytes and serves all
chunks of all heads; so backward only scales what forward left: dh [M, D] in the hidden states' dtype, dW [V, D] and
db [V], accumulated over the chunks in fp32, and neither for a frozen head. Making the logits a second time in backward
instead would save those and cost half as much again in products.

g is not divided by the token count: in fp16 the quotient would vanish. The upstream gradient, which carries that
division, meets dh, dW and db in fp32 (`_scatter_rows`). No step of the loop reads the device from the host.

Source: the chunked loop follows Liger-Kernel's fused linear cross-entropy (Hsu et al., arXiv 2410.10989); several heads
in one loop are this project's.
Legend: N rows, M labelled rows, m rows of a chunk, D width (hidden, or latent Z), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._dispatch import resolve_backend
from .._library import library_op
from .._ownership import graph_is_kept
from .._workspace import logits_buffer
from ._cross_entropy_triton import cross_entropy_triton_
from ._labelled_rows import inverse_count, labelled_rows
from ._rows import FLOATS, as_rows
from ._scatter_rows import scatter_rows

__all__ = ["chunk_rows", "cross_entropies", "linear_cross_entropy"]

# Bytes of logits at a time. Products lose nothing by it from a few hundred rows on (see docs/decisions/0003).
CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES = 64 << 20, 128 << 20
# The torch path visits logits in blocks that stay in a core's second-level cache between its four passes.
CACHE_BYTES = 1 << 20


def chunk_rows(n_rows: int, n_columns: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows a chunk: as few chunks as the budget allows, evened out so that the last is no sliver, in multiples of 8.

    At least one row, whatever the budget: a row of logits is the least that a softmax can see.
    """
    most = max(1, chunk_bytes // (n_columns * itemsize))
    if n_rows <= most:
        return max(1, n_rows)
    even = -(-n_rows // -(-n_rows // most))
    return min(most, -(-even // 8) * 8)


# --- torch path of the visit of one chunk ---------------------------------------------------------


def cross_entropy_torch_(
    logits_mV: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_m: torch.Tensor,
    loss_m: torch.Tensor,
    ignore_index: int,
    gradient: bool,
) -> None:
    """As the kernel. Low precision goes through fp32 a block at a time; fp32 and float64 stay in place."""
    columns = logits_mV.shape[1]
    compute = loss_m.dtype
    block = max(1, CACHE_BYTES // (columns * loss_m.element_size())) if logits_mV.device.type == "cpu" else 1 << 30
    target_m1 = labels_m.clamp(0, columns - 1)[:, None]
    ignored_m = labels_m == ignore_index
    none_ignored = logits_mV.device.type == "cpu" and not ignored_m.any()  # elsewhere asking would be a wait
    for start in range(0, logits_mV.shape[0], block):
        rows = slice(start, start + block)
        logits_bV, target_b1 = logits_mV[rows], target_m1[rows]
        x_bV = logits_bV.to(compute)
        if bias_V is not None:
            x_bV.add_(bias_V)
        torch.log_softmax(x_bV, dim=1, out=x_bV)
        torch.neg(x_bV.gather(1, target_b1).squeeze(1), out=loss_m[rows])
        if gradient:
            x_bV.exp_().scatter_add_(1, target_b1, torch.full_like(target_b1, -1, dtype=compute))
            if not none_ignored:
                x_bV.masked_fill_(ignored_m[rows, None], 0.0)
            if x_bV.dtype != logits_bV.dtype:
                logits_bV.copy_(x_bV)
    outside = (labels_m < 0) | (labels_m >= columns)
    loss_m.masked_fill_(outside, float("nan")).masked_fill_(ignored_m, 0.0)


# --- the chunk loop -------------------------------------------------------------------------------


@dataclass
class _Head:
    """One head in the loop: what it reads, and the gradients it accumulates (empty where not needed)."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    loss_M: torch.Tensor
    dhidden_MD: torch.Tensor
    dweight_VD: torch.Tensor
    dbias_1V: torch.Tensor

    def visit(
        self,
        part: slice,
        rows_m: torch.Tensor | None,
        labels_m: torch.Tensor,
        buffer: torch.Tensor,
        ignore_index: int,
        backend: str,
    ) -> None:
        h_mD = self.hidden_ND[part] if rows_m is None else self.hidden_ND.index_select(0, rows_m)
        columns = self.weight_VD.shape[0]
        logits_mV = buffer[: h_mD.shape[0] * columns].view(-1, columns)
        torch.mm(h_mD, self.weight_VD.t(), out=logits_mV)
        gradient = bool(self.dhidden_MD.numel() or self.dweight_VD.numel() or self.dbias_1V.numel())
        visit_ = cross_entropy_triton_ if backend == "triton" else cross_entropy_torch_
        visit_(logits_mV, self.bias_V, labels_m, self.loss_M[part], ignore_index, gradient)
        if self.dhidden_MD.numel():
            torch.mm(logits_mV, self.weight_VD, out=self.dhidden_MD[part])
        if self.dweight_VD.numel():
            _add_product_(self.dweight_VD, logits_mV.t(), h_mD, first=part.start == 0)
        if self.dbias_1V.numel():
            self.dbias_1V.add_(logits_mV.sum(dim=0, keepdim=True, dtype=self.dbias_1V.dtype))


def _add_product_(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """acc += a b (the first: acc = a b), accumulated in acc's fp32 (float64) whatever the factors' dtype."""
    beta = 0 if first else 1  # with 0, what acc holds is not read
    if a.dtype == acc.dtype:
        acc.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(acc, a, b, out_dtype=acc.dtype, beta=beta, out=acc)
    elif first:  # no such product on a CPU: each chunk's is rounded once, their sum is not
        acc.copy_(torch.mm(a, b))
    else:
        acc.add_(torch.mm(a, b))


@library_op(
    "linear_cross_entropies",
    "(Tensor[] hidden, Tensor[] weight, Tensor[] bias, Tensor? rows, Tensor labels, int ignore_index, bool[] needs, "
    "bool summed, int chunk_bytes, str backend) -> Tensor[]",
)
def _linear_cross_entropies(
    hidden: list[torch.Tensor],
    weight: list[torch.Tensor],
    bias: list[torch.Tensor],
    rows: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    needs: list[bool],
    summed: bool,
    chunk_bytes: int,
    backend: str,
) -> list[torch.Tensor]:
    """For each head four tensors: loss (0-d or [M]), dhidden [M, D], dweight [V, D], dbias [1, V], all but the
    first unscaled, and empty where `needs` (three a head) says so. A head without bias has an empty one.
    """
    outputs = _outputs(hidden, weight, labels, needs)
    heads = [
        _Head(h, _in_dtype_of(w, h), b.contiguous() if b.numel() else None, *outputs[4 * i : 4 * i + 4])
        for i, (h, w, b) in enumerate(zip(hidden, weight, bias, strict=True))
    ]
    M = labels.shape[0]
    widest = max(w.shape[0] for w in weight)
    step = chunk_rows(M, widest, hidden[0].element_size(), chunk_bytes)
    buffer = logits_buffer(min(step, M) * widest, hidden[0].dtype, labels.device)
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        rows_m = None if rows is None else rows[part]
        for head in heads:
            head.visit(part, rows_m, labels[part], buffer, ignore_index, backend)
    if summed:
        for i in range(0, len(outputs), 4):
            outputs[i] = outputs[i].sum()
    return outputs


def _in_dtype_of(weight_VD: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return weight_VD.to(hidden.dtype).contiguous()


def _outputs(
    hidden: list[torch.Tensor], weight: list[torch.Tensor], labels: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor]:
    outputs = []
    for i, (h, w) in enumerate(zip(hidden, weight, strict=True)):
        exact = accumulator(h.dtype)
        M, V, D = labels.shape[0], w.shape[0], w.shape[1]
        need_hidden, need_weight, need_bias = needs[3 * i : 3 * i + 3]
        outputs += [
            h.new_empty(M, dtype=exact),
            h.new_empty(M, D) if need_hidden else h.new_empty(0),
            (h.new_empty if M else h.new_zeros)(V, D, dtype=exact) if need_weight else h.new_empty(0),
            h.new_zeros(1, V, dtype=exact) if need_bias else h.new_empty(0),
        ]
    return outputs


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@_linear_cross_entropies.register_fake
def _(hidden, weight, bias, rows, labels, ignore_index, needs, summed, chunk_bytes, backend):
    outputs = _outputs(hidden, weight, labels, needs)
    if summed:
        for i in range(0, len(outputs), 4):
            outputs[i] = outputs[i].new_empty(())
    return outputs


# --- autograd -------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    hidden, _, bias, rows, _, _, needs, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[t for i, t in enumerate(output) if i % 4])
    ctx.save_for_backward(rows, *[t for i, t in enumerate(output) if i % 4])
    ctx.n_rows, ctx.bias_dtypes = [h.shape[0] for h in hidden], [b.dtype for b in bias]
    ctx.needs, ctx.backend = needs, backend


def _backward(ctx, grads):
    rows, *made = ctx.saved_tensors
    # read once more by a second backward, or by a compiler that traces this one with tensors of its own
    kept = graph_is_kept() or any(type(x) is not torch.Tensor for x in made)

    def scaled(i: int, g: torch.Tensor | None, rows: torch.Tensor | None, n_rows: int) -> torch.Tensor | None:
        if g is None or not ctx.needs[i]:
            return None
        if rows is None and made[i].dtype == g.dtype and g.dim() == 0 and not kept:
            return made[i].mul_(g)  # [V, D] exists once
        return scatter_rows(made[i], g, rows, n_rows, ctx.backend)

    dhidden, dweight, dbias = [], [], []
    for head, n_rows in enumerate(ctx.n_rows):
        g, first = grads[4 * head], 3 * head
        dhidden.append(scaled(first, g, rows, n_rows))
        dweight.append(scaled(first + 1, g, None, made[first + 1].shape[0]))
        db_1V = scaled(first + 2, g, None, 1)
        dbias.append(None if db_1V is None else db_1V[0].to(ctx.bias_dtypes[head]))
    return dhidden, dweight, dbias, *(None,) * 7


torch.library.register_autograd(_linear_cross_entropies, _backward, setup_context=_setup_context)


# --- public ---------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`; the [N, V] logits never exist.

    Args:
        hidden: [..., D], a floating dtype: the dtype of the products.
        weight: [V, D] in that dtype or a wider one (fp32 masters under bf16). No gradient is made for a frozen one.
        labels: int64, already shifted: [...] as hidden; or, with `rows`, [M].
        bias: [V] or None.
        rows: int64 [M], strictly increasing: the rows (of hidden flattened to [N, D]) that have a label. None: found
            here, for which the host waits once for the device.
        ignore_index: rows with this label count for nothing.
        reduction: "mean" over the labelled rows, "sum", or "none" (then the head must be frozen).
        normalizer: what "mean" divides by instead, the label tokens of a whole optimizer step for one: a number or a
            one-element tensor, a constant to autograd. 0 gives loss 0, as no label at all does.
        chunk_bytes: size of the buffer of logits; default 64 MiB on a CPU, 128 MiB elsewhere.
        backend: "auto", "triton" or "torch".

    Returns:
        nats, fp32 (float64 for float64 hidden): 0-d, or for "none" as `labels`, 0 where ignored. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype, device or range; a label outside 0 .. V-1. (Where reading the labels would
            make the host wait, for `rows` given on a GPU, such a label makes the loss NaN instead.)
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer: reduction {reduction!r} divides by nothing; expected None, got {normalizer!r}")
    if reduction == "none" and torch.is_grad_enabled() and _any_requires_grad(weight, bias):
        raise ValueError("reduction: 'none' makes no gradient for the head; expected a frozen weight and bias")
    found, targets = labelled_rows(hidden, labels, rows, weight.shape[0], ignore_index)
    inverse = inverse_count(normalizer, targets, ignore_index, accumulator(hidden.dtype))
    (loss,) = cross_entropies(
        [(hidden, weight, bias)], found, targets, ignore_index=ignore_index, summed=reduction != "none",
        chunk_bytes=chunk_bytes, backend=backend,
    )  # fmt: skip
    if reduction == "mean":
        return loss * inverse
    if reduction == "none" and rows is None:
        loss = loss if found is None else loss.new_zeros(labels.numel()).index_copy(0, found, loss)
        return loss.view(labels.shape)
    return loss


Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def cross_entropies(
    heads: list[Head],
    rows: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    ignore_index: int,
    summed: bool,
    chunk_bytes: int | None,
    backend: str,
) -> list[torch.Tensor]:
    """The losses of several (hidden [..., D], weight [V, D], bias [V] or None) over the same rows: sums, or [M] each.

    rows [M] and targets [M] as `labelled_rows` gives them.
    """
    device = targets.device
    for i, head in enumerate(heads):
        check_head(head, targets, rows, heads[0][0].dtype, f"[{i}]" if i else "")
    check_chunk_bytes(chunk_bytes)
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    grad = torch.is_grad_enabled()
    outputs = _linear_cross_entropies(
        [as_rows(hidden) for hidden, _, _ in heads],
        [weight for _, weight, _ in heads],
        [hidden.new_empty(0) if bias is None else bias for hidden, _, bias in heads],
        rows, targets, ignore_index,
        [grad and t is not None and t.requires_grad for head in heads for t in head],
        summed, chunk_bytes, resolve_backend(backend, device),
    )  # fmt: skip
    return outputs[::4]


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected 1 or more, got {chunk_bytes}")


def check_head(
    head: Head, targets: torch.Tensor, rows: torch.Tensor | None, dtype: torch.dtype, which: str = ""
) -> None:
    """Raise ValueError (got / expected) unless the head's tensors fit together; `which` follows their names."""
    hidden, weight, bias = head
    if hidden.dim() < 1 or hidden.dtype not in FLOATS:
        raise ValueError(
            f"hidden{which}: expected a floating tensor [..., D], got {hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    if hidden.dtype != dtype:
        raise ValueError(f"hidden{which}: expected the first head's dtype {dtype}, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(f"weight{which}: expected shape [V, {hidden.shape[-1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias{which}: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != targets.device:
            raise ValueError(f"{name}{which}: expected device {targets.device}, got {tensor.device}")
        if tensor.dtype not in FLOATS or torch.promote_types(tensor.dtype, hidden.dtype) != tensor.dtype:
            raise ValueError(f"{name}{which}: expected {hidden.dtype} or a wider dtype, got {tensor.dtype}")
    if rows is None and hidden.shape[:-1].numel() != targets.shape[0]:
        raise ValueError(f"hidden{which}: expected {targets.shape[0]} rows, got {hidden.shape[:-1].numel()}")
