"""Rotary position embedding of queries and keys in one autograd node (transformers' half-rotation layout).

Legend: N tokens, Hq query heads, Hkv key heads, d head size. With x = [x1, x2] the halves of a head, and c, s the
halves of cos and sin (equal in transformers' layout; not assumed here),

    y1 = x1 c1 - x2 s1          y2 = x2 c2 + x1 s2          y = R x
    dx1 = dy1 c1 + dy2 s2       dx2 = dy2 c2 - dy1 s1       dx = R^T dy

R depends on the position alone, so only cos and sin are saved.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with their positions rotated in; the inputs are left as they are.

    Args:
        q: [N, Hq, d]; any view, such as a slice of one projection's [N, out].
        k: [N, Hkv, d], the same.
        cos, sin: [N, d] as transformers' rotary embedding gives them, flattened; RoPE scaling is inside. Constants.

    Returns:
        New contiguous [N, Hq, d] and [N, Hkv, d].

    Raises:
        ValueError: shapes that do not fit, an odd d, or cos narrower than d (partial rotary embedding).
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[2] % 2:
        raise ValueError(f"q, k: got {tuple(q.shape)} and {tuple(k.shape)}, expected [N, Hq, d] and [N, Hkv, d], d even")
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
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        back = torch.cat((-sin[:, half:], -sin[:, :half]), -1)
        return _rotated(grads[0], cos, back), _rotated(grads[1], cos, back), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos[:, None]
    y[..., :half].addcmul_(x[..., half:], sin[:, None, :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[:, None, half:])
    return y
