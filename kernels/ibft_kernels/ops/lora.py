"""LoRA on a frozen linear layer (arXiv 2106.09685), for one projection or for several that read one input (q, k, v).

    y_i  = x W_i^T + b_i + (x' A_i^T) (s_i B_i)^T          x' = dropout(x): one mask for all readers of x

    t_i  = dy_i (s_i B_i)                                   [N, R], used twice
    dB_i = s_i dy_i^T (x' A_i^T)        dA_i = t_i^T x'     dx = sum_i dy_i W_i + dropout'(sum_i t_i A_i)

The A of all readers lie in one matrix, so x' is read once forward and once for dA, and dx's low-rank part is one
product. Saved: x and x A^T [N, sum R] (kept, not computed again); x' is recomputed from the noise (the torch path keeps
its mask, a byte an element, because Philox there costs more than the byte). A 4-bit W is dequantised again in backward.
dx is one buffer that the products add into. W and b are frozen: nothing is computed for them.

These are Python nodes around the library's products, not `torch.library` ops: a compiled graph runs them as they are,
between its parts, and nothing in them depends on a length.

LoRA's masters A and B may be fp32 beside 16-bit activations: products read `LoraShadow`s, rounded once an optimizer
step, and gradients come back in the masters' dtype.
Legend: N rows (tokens), D inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .._dispatch import resolve_backend
from ._rows import FLOATS, as_rows, check_seed, product, rows_of_ids, split_seed
from .dropout import LEVELS, _dropout_add_op, _dropout_backward_op, _dropout_op

__all__ = ["Dropout", "LoraProjection", "LoraShadow", "QuantizedWeight", "lora_linear", "lora_qkv", "refresh_shadows"]


class QuantizedWeight(Protocol):
    """A frozen weight [O, D] that is not held dense. The result need only last until the next weight is made dense."""

    @property
    def shape(self) -> Sequence[int]: ...

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor: ...


class Dropout(NamedTuple):
    """LoRA dropout keyed by the sample; arguments as in `philox_dropout`, noise_ids [..., 3] for x [..., D]."""

    p: float
    seed: int | torch.Tensor
    noise_ids: torch.Tensor | None = None


class LoraProjection(NamedTuple):
    """One frozen linear layer, and the adapter on it if it has one.

    weight [O, D] dense, or a `QuantizedWeight`; bias [O] or None, both frozen; lora_a [R, D] and lora_b [O, R], or both
    None; scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]


class LoraShadow:
    """What the products read of the adapters of one input's readers, in the activations' dtype: A concatenated
    [sum R, D], and each s B [O, R]. `refresh` after the masters changed: once an optimizer step.
    """

    def __init__(self, projections: Sequence[LoraProjection], dtype: torch.dtype) -> None:
        self.adapted = [p for p in projections if p.lora_a is not None]
        self.dtype = dtype
        first = self.adapted[0].lora_a if self.adapted else None
        self.a_RD: torch.Tensor | None = None
        self.b_OR: list[torch.Tensor] = []
        if first is not None:
            with torch.inference_mode(False), torch.no_grad():
                ranks = sum(p.rank for p in self.adapted)
                self.a_RD = torch.empty(ranks, first.shape[1], dtype=dtype, device=first.device)
                for p in self.adapted:
                    assert p.lora_b is not None
                    self.b_OR.append(torch.empty(p.lora_b.shape, dtype=dtype, device=first.device))
            self.refresh()

    def refresh(self) -> None:
        """Round the masters again."""
        refresh_shadows([self])


@torch.no_grad()
def refresh_shadows(shadows: Iterable[LoraShadow]) -> None:
    """`LoraShadow.refresh` of many, in a few launches."""
    rounded: list[torch.Tensor] = []
    masters: list[torch.Tensor] = []
    for shadow in shadows:
        if shadow.a_RD is None:
            continue
        parts = shadow.a_RD.split([p.rank for p in shadow.adapted])
        for p, a, b in zip(shadow.adapted, parts, shadow.b_OR, strict=True):
            assert p.lora_a is not None
            assert p.lora_b is not None
            rounded += [a, b]
            masters += [p.lora_a, p.lora_b if p.scaling == 1 else p.lora_b * p.scaling]
    if rounded:
        torch._foreach_copy_(rounded, masters)


# --- rows: forward and backward without autograd --------------------------------------------------


class RowDropout(NamedTuple):
    """Checked: threshold of 65536, noise ids as [N, 3], the seed as a registered op takes it, the backend."""

    threshold: int
    ids_N3: torch.Tensor | None
    seed: tuple[torch.Tensor | None, int]
    backend: str

    def __call__(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x', the torch path's mask, else empty)."""
        return _dropout_op(x_ND, self.ids_N3, self.threshold, *self.seed, self.backend)

    def again(self, x_ND: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """x' once more."""
        return _dropout_backward_op(x_ND, keep, self.ids_N3, self.threshold, *self.seed, self.backend)

    def add_(self, dx_ND: torch.Tensor, dy_ND: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """dx + the gradient dy through the mask, in dx's place."""
        _dropout_add_op(dx_ND, dy_ND, keep, self.ids_N3, self.threshold, *self.seed, self.backend)
        return dx_ND


class Kept(NamedTuple):
    """What backward needs of the low-rank path: x A^T [N, sum R], and the torch path's dropout mask. Either or both
    None.
    """

    xa_NR: torch.Tensor | None
    mask: torch.Tensor | None


def dense(weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)


def base_rows(x_ND: torch.Tensor, p: LoraProjection) -> torch.Tensor:
    """x W^T + b."""
    return F.linear(x_ND, dense(p.weight, x_ND.dtype), None if p.bias is None else p.bias.to(x_ND.dtype))


def low_rank_rows(x_ND: torch.Tensor, shadow: LoraShadow, dropout: RowDropout | None) -> Kept:
    if shadow.a_RD is None:
        return Kept(None, None)
    mask = None
    if dropout is not None:
        x_ND, mask = dropout(x_ND)
    return Kept(x_ND @ shadow.a_RD.t(), mask)


def add_low_rank_(
    ys: Sequence[torch.Tensor], kept: Kept, projections: Sequence[LoraProjection], shadow: LoraShadow
) -> None:
    """y_i += (x A_i^T) (s B_i)^T, in place: each y was made here."""
    if kept.xa_NR is None:
        return
    adapted = [y for y, p in zip(ys, projections, strict=True) if p.lora_a is not None]
    parts = kept.xa_NR.split([p.rank for p in shadow.adapted], dim=1)
    for y_NO, xa_NR, b_OR in zip(adapted, parts, shadow.b_OR, strict=True):
        y_NO.addmm_(xa_NR, b_OR.t())


def forward_rows(
    x_ND: torch.Tensor, projections: Sequence[LoraProjection], shadow: LoraShadow, dropout: RowDropout | None
) -> tuple[list[torch.Tensor], Kept]:
    """Every reader's output [N, O], and what backward needs."""
    kept = low_rank_rows(x_ND, shadow, dropout)
    ys = [base_rows(x_ND, p) for p in projections]
    add_low_rank_(ys, kept, projections, shadow)
    return ys, kept


class RowGradients(NamedTuple):
    """dx [N, D] or None, and (dA, dB) of every adapted projection, in the masters' dtype."""

    dx: torch.Tensor | None
    adapters: list[tuple[torch.Tensor, torch.Tensor]]


def low_rank_gradient(
    dys: Sequence[torch.Tensor], projections: Sequence[LoraProjection], shadow: LoraShadow
) -> torch.Tensor | None:
    """t = [dy_i (s_i B_i)], [N, sum R]; None without an adapter."""
    adapted = [dy for dy, p in zip(dys, projections, strict=True) if p.lora_a is not None]
    if len(adapted) <= 1:
        return torch.mm(adapted[0], shadow.b_OR[0]) if adapted else None
    ranks = [p.rank for p in shadow.adapted]
    t_NR = adapted[0].new_empty(adapted[0].shape[0], sum(ranks))
    for t, dy_NO, b_OR in zip(t_NR.split(ranks, dim=1), adapted, shadow.b_OR, strict=True):
        torch.mm(dy_NO, b_OR, out=t)
    return t_NR


def input_gradient(
    dys: Sequence[torch.Tensor],
    t_NR: torch.Tensor | None,
    kept: Kept,
    projections: Sequence[LoraProjection],
    shadow: LoraShadow,
    dropout: RowDropout | None,
) -> torch.Tensor:
    """dx [N, D], one new buffer that every product adds into."""
    dx_ND = torch.mm(dys[0], dense(projections[0].weight, dys[0].dtype))
    for dy_NO, p in zip(dys[1:], projections[1:], strict=True):
        dx_ND.addmm_(dy_NO, dense(p.weight, dy_NO.dtype))
    if t_NR is None or shadow.a_RD is None:
        return dx_ND
    if dropout is None:
        return dx_ND.addmm_(t_NR, shadow.a_RD)
    assert kept.mask is not None
    return dropout.add_(dx_ND, torch.mm(t_NR, shadow.a_RD), kept.mask)


def backward_rows(
    dys: Sequence[torch.Tensor],
    x_ND: torch.Tensor | None,
    kept: Kept,
    projections: Sequence[LoraProjection],
    shadow: LoraShadow,
    dropout: RowDropout | None,
    *,
    needs_x: bool,
    t_NR: torch.Tensor | None = None,
) -> RowGradients:
    """x may be None where there is no adapter. `t_NR`: dy (s B), where the caller has it already (the tapped block's
    down projection).
    """
    if t_NR is None:
        t_NR = low_rank_gradient(dys, projections, shadow)
    dx_ND = input_gradient(dys, t_NR, kept, projections, shadow, dropout) if needs_x else None
    if t_NR is None or kept.xa_NR is None or x_ND is None:
        return RowGradients(dx_ND, [])

    adapted = [(dy, p) for dy, p in zip(dys, projections, strict=True) if p.lora_a is not None]
    ranks = [p.rank for _, p in adapted]
    dropped_ND = x_ND
    if dropout is not None:
        assert kept.mask is not None
        dropped_ND = dropout.again(x_ND, kept.mask)
    masters = [(p.lora_a.dtype, p.lora_b.dtype) for _, p in adapted if p.lora_a is not None and p.lora_b is not None]
    das = product(t_NR.t(), dropped_ND, masters[0][0]).split(ranks)
    del dropped_ND
    grads = []
    for da, (dy_NO, p), xa_NR, dtypes in zip(das, adapted, kept.xa_NR.split(ranks, dim=1), masters, strict=True):
        db = product(dy_NO.t(), xa_NR, dtypes[1])
        grads.append((da.to(dtypes[0]), db if p.scaling == 1 else db.mul_(p.scaling)))
    return RowGradients(dx_ND, grads)


# --- autograd -------------------------------------------------------------------------------------


class _SharedInput(torch.autograd.Function):
    """x [N, D] and the masters of each adapted projection, flat -> one output a projection."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        projections: Sequence[LoraProjection],
        shadow: LoraShadow,
        dropout: RowDropout | None,
        *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ys, kept = forward_rows(x_ND, projections, shadow, dropout)
        ctx.projections, ctx.shadow, ctx.dropout = projections, shadow, dropout
        ctx.save_for_backward(x_ND if masters else None, *kept)
        ctx.versions = versions_of(shadow)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        x_ND, *kept = ctx.saved_tensors
        check_versions(ctx.shadow, ctx.versions)
        with torch.autocast(dys[0].device.type, enabled=False):
            grads = backward_rows(
                [as_rows(dy) for dy in dys], x_ND, Kept(*kept), ctx.projections, ctx.shadow, ctx.dropout,
                needs_x=ctx.needs_input_grad[0],
            )  # fmt: skip
        return grads.dx, None, None, None, *(grad for pair in grads.adapters for grad in pair)


def versions_of(shadow: LoraShadow) -> list[int]:
    """The version of each tensor of a shadow, as autograd would note it; they are no activations to be saved."""
    return [x._version for x in (shadow.a_RD, *shadow.b_OR) if x is not None]


def check_versions(shadow: LoraShadow, versions: list[int]) -> None:
    """Raises RuntimeError where the shadow was refreshed between a forward and its backward."""
    if versions_of(shadow) != versions:
        raise RuntimeError("a LoRA shadow was refreshed between a forward and its backward: refresh it between steps")


# --- public ---------------------------------------------------------------------------------------


def check_projection(name: str, p: LoraProjection, x: torch.Tensor) -> None:
    """Raise ValueError (got / expected) unless the projection reads x [..., D]."""
    shape = tuple(p.weight.shape)
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(f"{name}.weight: expected shape [O, {x.shape[-1]}], got {shape}")
    frozen = {"weight": p.weight if isinstance(p.weight, torch.Tensor) else None, "bias": p.bias}
    for part, tensor in frozen.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}.{part}: expected a frozen tensor, got one that requires a gradient")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}.{part}: expected device {x.device}, got {tensor.device}")
    if p.bias is not None and p.bias.shape != shape[:1]:
        raise ValueError(f"{name}.bias: expected shape {shape[:1]}, got {tuple(p.bias.shape)}")
    if (p.lora_a is None) != (p.lora_b is None):
        raise ValueError(f"{name}: expected both of lora_a and lora_b, or neither")
    if p.lora_a is None or p.lora_b is None:
        return
    expected = {"lora_a": (p.lora_a, (p.rank, shape[1])), "lora_b": (p.lora_b, (shape[0], p.rank))}
    for part, (tensor, size) in expected.items():
        if tuple(tensor.shape) != size:
            raise ValueError(f"{name}.{part}: expected shape {size}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS or tensor.device != x.device:
            raise ValueError(f"{name}.{part}: expected a float on {x.device}, got {tensor.dtype} on {tensor.device}")


def check_input(x: torch.Tensor) -> None:
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected a floating tensor [..., D], got {x.dtype} of shape {tuple(x.shape)}")


def check_shadow_of(
    name: str, shadow: LoraShadow | None, projections: Sequence[LoraProjection], x: torch.Tensor
) -> LoraShadow:
    """The given shadow, if it is these projections' and x's dtype; or a new one."""
    if shadow is None:
        return LoraShadow(projections, x.dtype)
    adapted = [p for p in projections if p.lora_a is not None]
    same = len(adapted) == len(shadow.adapted) and all(
        p.lora_a is q.lora_a and p.lora_b is q.lora_b and p.scaling == q.scaling
        for p, q in zip(adapted, shadow.adapted, strict=True)
    )
    if shadow.dtype != x.dtype or not same:
        raise ValueError(f"{name}: expected a shadow of these projections in {x.dtype}, got one in {shadow.dtype}")
    return shadow


def row_dropout(dropout: Dropout | None, x: torch.Tensor, backend: str) -> RowDropout | None:
    """Checked and flattened; None where nothing drops."""
    if dropout is None:
        return None
    if not 0.0 <= dropout.p < 1.0:
        raise ValueError(f"dropout.p: expected 0 <= p < 1, got {dropout.p}")
    check_seed(dropout.seed, x.device)
    ids_N3 = rows_of_ids(dropout.noise_ids, x.shape[:-1], x.device)
    threshold = min(round(dropout.p * LEVELS), LEVELS - 1)
    return RowDropout(threshold, ids_N3, split_seed(dropout.seed), backend) if threshold else None


def masters_of(*projections: LoraProjection) -> list[torch.Tensor]:
    """lora_a and lora_b of every adapted projection, as autograd takes and returns them."""
    return [master for p in projections for master in (p.lora_a, p.lora_b) if master is not None]


def _shared_input(
    names: Sequence[str],
    x: torch.Tensor,
    projections: Sequence[LoraProjection],
    dropout: Dropout | None,
    shadow: LoraShadow | None,
    backend: str,
) -> list[torch.Tensor]:
    check_input(x)
    for name, p in zip(names, projections, strict=True):
        check_projection(name, p, x)
    resolved = resolve_backend(backend, x.device)
    shadow = check_shadow_of("shadow", shadow, projections, x)
    rows = row_dropout(dropout, x, resolved)
    with torch.autocast(x.device.type, enabled=False):  # the dtype is x's, not a region's
        ys = _SharedInput.apply(as_rows(x), projections, shadow, rows, *masters_of(*projections))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


@torch.compiler.disable
def lora_linear(
    x: torch.Tensor,
    projection: LoraProjection,
    *,
    dropout: Dropout | None = None,
    shadow: LoraShadow | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer, 4-bit or dense, with its LoRA adapter.

    Args:
        x: [..., D], floating; the dtype of every product.
        projection: the layer and its adapter; masters may be wider than x.
        dropout: of the adapter's input; None in evaluation.
        shadow: `LoraShadow([projection], x.dtype)`, fresh; None makes one for this call.
        backend: "auto", "triton" or "torch", of the dropout's mask (the products are the library's).

    Returns:
        [..., O] in x's dtype. Differentiable once in x, lora_a and lora_b.

    Raises:
        ValueError: a wrong shape, dtype, device, or a base weight that requires a gradient.
        RuntimeError: the triton backend was asked for and cannot run here; the shadow was refreshed before backward.
    """
    (y,) = _shared_input(["projection"], x, [projection], dropout, shadow, backend)
    return y


@torch.compiler.disable
def lora_qkv(
    x: torch.Tensor,
    q: LoraProjection,
    k: LoraProjection,
    v: LoraProjection,
    *,
    dropout: Dropout | None = None,
    shadow: LoraShadow | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`lora_linear` for three readers of one input, as one autograd node: x A^T and dx's low-rank part are one product
    each, and one dropout mask serves all three (PEFT draws one a module).

    shadow: `LoraShadow([q, k, v], x.dtype)`. Otherwise as `lora_linear`, which says what is raised.
    """
    outputs = _shared_input(["q", "k", "v"], x, [q, k, v], dropout, shadow, backend)
    return outputs[0], outputs[1], outputs[2]
