"""Rotary position embedding of queries and keys in one autograd node (transformers' half-rotation layout).

Legend: N tokens, Hq query heads, Hkv key heads, d head size. With x1, x2 the halves of a head and c1, c2, s1, s2 those
of cos and sin (c1 = c2 and s1 = s2 in transformers; not assumed here),

    y1 = x1 c1 - x2 s1          y2 = x2 c2 + x1 s2          y = R x
    dx1 = dy1 c1 + dy2 s2       dx2 = dy2 c2 - dy1 s1       dx = R^T dy

R depends on the position alone, so only cos and sin are saved. Not in place: q and k are slices of a projection's
output, and autograd would have to know that nobody else reads it. liger-kernel's rope is of no help for that reason:
it copies slices to contiguous tensors first, and where they are contiguous already it overwrites its inputs and the
gradients that it is given.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions; the inputs stay as they are.

    Args:
        q: [N, Hq, d], d even; any view, such as a slice of one projection's [N, out].
        k: [N, Hkv, d], the same.
        cos, sin: [N, d] as transformers' rotary embedding gives them, flattened (scaling is inside); constants.

    Returns:
        New contiguous [N, Hq, d] and [N, Hkv, d] of q's and k's dtypes.

    Raises:
        ValueError: shapes that do not fit, an odd d, or cos narrower than d (a partial rotary embedding).
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(
            f"q, k: got {tuple(q.shape)} and {tuple(k.shape)}, expected [N, Hq, d] and [N, Hkv, d] with d even"
        )
    if cos.shape != sin.shape or cos.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"cos, sin: got {tuple(cos.shape)} and {tuple(sin.shape)}, expected [N, d] = {(q.shape[0], q.shape[2])}; "
            "partial rotary embedding is not supported"
        )
    out: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        s1, s2 = sin[:, None].chunk(2, -1)
        return _product(q, cos, s1, s2, -1), _product(k, cos, s1, s2, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        s1, s2 = sin[:, None].chunk(2, -1)
        for_q, for_k = ctx.needs_input_grad[:2]
        return (
            _product(dq, cos, s2, s1, 1) if for_q else None,
            _product(dk, cos, s2, s1, 1) if for_k else None,
            None,
            None,
        )


def _product(x: Tensor, cos: Tensor, s1: Tensor, s2: Tensor, sign: int) -> Tensor:
    """[x1 c1 + sign x2 s1, x2 c2 - sign x1 s2] in two passes over x; contiguous, of x's dtype."""
    half = x.shape[-1] // 2
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))  # an fp32 cos under autocast stays fp32
    torch.mul(x, cos[:, None], out=y)
    y[..., :half].addcmul_(x[..., half:], s1, value=sign)
    y[..., half:].addcmul_(x[..., :half], s2, value=-sign)
    return y.to(x.dtype)
