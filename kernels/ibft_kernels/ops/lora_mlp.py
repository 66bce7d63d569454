"""The gated MLP of a Llama block with LoRA on its three layers, as one autograd node:

    y = down(silu(gate(x)) * up(x))            each layer as in `lora`

Saved: x, gate, up [N, I] and the three low-rank products; h = silu(gate) * up is made again in backward, by the visit
that makes its gradients: one kernel reads dh, gate and up and leaves h, dgate and dup in their place. With
recompute=True gate and up are not saved either, and two base products make them again (x A^T is kept): the block then
keeps 2 N I elements less at the price of 2/9 of the MLP's arithmetic.

Where autograd will read the saved tensors again (retain_graph), backward works on copies.
Legend: N rows (tokens), D hidden size, I intermediate size, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._dispatch import resolve_backend
from .._ownership import graph_is_kept
from ._rows import as_rows
from .lora import (
    Dropout,
    Kept,
    LoraProjection,
    LoraShadow,
    RowDropout,
    RowGradients,
    add_low_rank_,
    backward_rows,
    base_rows,
    check_input,
    check_projection,
    check_shadow_of,
    check_versions,
    forward_rows,
    input_gradient,
    low_rank_gradient,
    masters_of,
    row_dropout,
    versions_of,
)
from .swiglu import swiglu_backward_, swiglu_forward

__all__ = ["MlpShadow", "lora_mlp"]


class MlpShadow(NamedTuple):
    """Shadows of the two inputs: `wide` = LoraShadow([gate, up], dtype), `down` = LoraShadow([down], dtype)."""

    wide: LoraShadow
    down: LoraShadow

    def refresh(self) -> None:
        self.wide.refresh()
        self.down.refresh()


class MlpSpec(NamedTuple):
    """What is fixed for a call; no tensor that carries a gradient is read through it."""

    gate: LoraProjection
    up: LoraProjection
    down: LoraProjection
    shadow: MlpShadow
    dropout: RowDropout | None  # of x
    down_dropout: RowDropout | None  # of h
    recompute: bool
    backend: str

    @property
    def wide(self) -> list[LoraProjection]:
        return [self.gate, self.up]


Saved = tuple[torch.Tensor | None, ...]  # x, gate, up, x A^T, its mask, h A^T, its mask


def mlp_forward(x_ND: torch.Tensor, spec: MlpSpec) -> tuple[torch.Tensor, Saved]:
    """y [N, D] in new memory, and what backward needs."""
    (gate_NI, up_NI), kept = forward_rows(x_ND, spec.wide, spec.shadow.wide, spec.dropout)
    h_NI = swiglu_forward(gate_NI, up_NI, backend=spec.backend)
    wide: tuple[torch.Tensor | None, ...] = (None, None) if spec.recompute else (gate_NI, up_NI)
    del gate_NI, up_NI  # with recompute they are free before the last product
    (y_ND,), down_kept = forward_rows(h_NI, [spec.down], spec.shadow.down, spec.down_dropout)
    return y_ND, (x_ND, *wide, *kept, *down_kept)


def mlp_backward(
    dy_ND: torch.Tensor, saved: Saved, spec: MlpSpec, *, needs_x: bool, t_NR: torch.Tensor | None = None
) -> RowGradients:
    """dx, and (dA, dB) of gate, up and down as far as they are adapted. `t_NR`: dy (s B) of down, where known."""
    x_ND, gate_NI, up_NI, xa, mask, ha, down_mask = saved
    assert x_ND is not None
    kept = Kept(xa, mask)
    if gate_NI is None or up_NI is None:
        gate_NI, up_NI = (base_rows(x_ND, p) for p in spec.wide)
        add_low_rank_((gate_NI, up_NI), kept, spec.wide, spec.shadow.wide)
    elif graph_is_kept():
        gate_NI, up_NI = gate_NI.clone(), up_NI.clone()

    # dh before the adapters' gradients: those need h, which the visit below leaves in dh's place
    down, down_kept = spec.down, Kept(ha, down_mask)
    if t_NR is None:
        t_NR = low_rank_gradient([dy_ND], [down], spec.shadow.down)
    h_NI = input_gradient([dy_ND], t_NR, down_kept, [down], spec.shadow.down, spec.down_dropout)
    swiglu_backward_(h_NI, gate_NI, up_NI, backend=spec.backend)
    below = backward_rows(
        [dy_ND], h_NI, down_kept, [down], spec.shadow.down, spec.down_dropout, needs_x=False, t_NR=t_NR
    )
    del h_NI
    above = backward_rows(
        [gate_NI, up_NI], x_ND, kept, spec.wide, spec.shadow.wide, spec.dropout, needs_x=needs_x
    )  # fmt: skip
    return RowGradients(above.dx, [*above.adapters, *below.adapters])


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, spec: MlpSpec, *masters: torch.Tensor) -> torch.Tensor:
        y_ND, saved = mlp_forward(x_ND, spec)
        ctx.spec = spec
        ctx.versions = [versions_of(shadow) for shadow in spec.shadow]
        ctx.save_for_backward(*saved)
        return y_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        for shadow, versions in zip(ctx.spec.shadow, ctx.versions, strict=True):
            check_versions(shadow, versions)
        (dy,) = grads
        with torch.autocast(dy.device.type, enabled=False):
            found = mlp_backward(as_rows(dy), ctx.saved_tensors, ctx.spec, needs_x=ctx.needs_input_grad[0])
        return found.dx, None, *(grad for pair in found.adapters for grad in pair)


def mlp_spec(
    x: torch.Tensor,
    gate: LoraProjection,
    up: LoraProjection,
    down: LoraProjection,
    dropout: Dropout | None,
    down_dropout: Dropout | None,
    shadow: MlpShadow | None,
    recompute: bool,
    backend: str,
) -> MlpSpec:
    """Every check of the arguments (ValueError: got / expected), before the first product."""
    check_input(x)
    check_projection("gate", gate, x)
    check_projection("up", up, x)
    width = gate.weight.shape[0]
    if up.weight.shape[0] != width:
        raise ValueError(f"up.weight: expected {width} rows as gate.weight has, got {up.weight.shape[0]}")
    stand_in = x.detach().new_empty(()).expand(*x.shape[:-1], width)  # h's shape and dtype, in one element
    check_projection("down", down, stand_in)
    resolved = resolve_backend(backend, x.device)
    wide, below = (None, None) if shadow is None else shadow
    return MlpSpec(
        gate, up, down,
        MlpShadow(
            check_shadow_of("shadow.wide", wide, [gate, up], x), check_shadow_of("shadow.down", below, [down], x)
        ),
        row_dropout(dropout, x, resolved), row_dropout(down_dropout, stand_in, resolved), recompute, resolved,
    )  # fmt: skip


@torch.compiler.disable
def lora_mlp(
    x: torch.Tensor,
    gate: LoraProjection,
    up: LoraProjection,
    down: LoraProjection,
    *,
    dropout: Dropout | None = None,
    down_dropout: Dropout | None = None,
    shadow: MlpShadow | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) with LoRA on each layer that has an adapter.

    Args:
        x: [..., D], floating; the dtype of every product.
        gate, up, down: frozen layers [I, D], [I, D], [D, I], 4-bit or dense, and their adapters.
        dropout, down_dropout: of the adapters' inputs, x (one mask for gate and up) and h; None in evaluation.
        shadow: fresh shadows of the adapters; None makes them for this call.
        recompute: do not save gate(x) and up(x), make them again in backward.
        backend: "auto", "triton" or "torch", of dropout and SwiGLU (the products are the library's).

    Returns:
        [..., D] in x's dtype. Differentiable once in x and the adapters' masters.

    Raises:
        ValueError: a wrong shape, dtype, device, or a base weight that requires a gradient.
        RuntimeError: the triton backend was asked for and cannot run here; a shadow was refreshed before backward.
    """
    spec = mlp_spec(x, gate, up, down, dropout, down_dropout, shadow, recompute, backend)
    with torch.autocast(x.device.type, enabled=False):  # the dtype is x's, not a region's
        y_ND = _LoraMlp.apply(as_rows(x), spec, *masters_of(gate, up, down))
    return y_ND.view(*x.shape[:-1], y_ND.shape[-1])
