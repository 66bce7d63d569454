"""The CPU's way of attention within segments: batched products over segments of like length.

Legend (the rest as in ibft/attention.py): n segments of a bucket, L the longest of them, R gathered rows.

Segments of like length form a bucket, padded on the right: a causal query never looks right, so padding needs no mask,
only a zero gradient. One gather lays a bucket out as queries [n Hkv, L G, d] and keys [n Hkv, L, d]: the G heads of a
token stay together, so one product serves the whole group, and a run of tokens is a run of rows. Each run of at most
BLOCK_TOKENS queries meets its keys in one product, so a whole row of the softmax is at hand (no running maximum, no
log-sum-exp), and keys after the run or before the window are never touched:

    S = scale Q K^T + bias      P = softmax(S)      O = P V
    dV = P^T dO                 dP = dO V^T         dS = P (dP - rowsum(P dP))
    dQ = scale dS K             dK = scale dS^T Q

Saved: the gathered Q, K, V. Backward computes P again. 16 bit inputs are computed in fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ibft.attention import Segments

__all__ = ["segment_attention"]

BLOCK_TOKENS = 48  # queries of one product
SCORES_BUDGET = 2**18  # scores of one product: 1 MiB of fp32, about a core's cache
LIKE_LENGTHS = 0.8  # segments share a bucket if the shortest is at least so much of the longest


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: "Segments", scale: float, window: int | None
) -> Tensor:
    """[N, Hq, d], contiguous; arguments as in `packed_attention`, which checks them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    key = ("plan", q.shape[1], k.shape[1], window, dtype)
    plan = segments.cached(key, lambda: _plan(segments.lengths, q.shape[1], k.shape[1], window, dtype))
    out: Tensor = _SegmentAttention.apply(q, k, v, plan, scale)
    return out


@dataclass(frozen=True)
class _Bucket:
    """Segments computed together: `batch` = their number times Hkv, padded to `length` tokens.

    Its rows among all gathered ones begin at `query_row` (batch * length * G of them) and `key_row` (batch * length).
    """

    batch: int
    length: int
    query_row: int
    key_row: int

    def queries(self, x_Rd: Tensor, group: int) -> Tensor:
        """The bucket's rows, a view [batch, length * G, d]."""
        return x_Rd[self.query_row :][: self.batch * self.length * group].view(self.batch, -1, x_Rd.shape[1])

    def keys(self, x_Rd: Tensor) -> Tensor:
        """The bucket's rows, a view [batch, length, d]."""
        return x_Rd[self.key_row :][: self.batch * self.length].view(self.batch, -1, x_Rd.shape[1])


@dataclass(frozen=True)
class _Plan:
    """All that depends on the lengths alone; made once for the layers of a micro-batch.

    Attributes:
        buckets: the longest first.
        query_from, key_from: [R] gathered row -> row of q [N * Hq] or k [N * Hkv]; padding repeats its segment's last.
        query_to, key_to: the way back, [N * Hq] and [N * Hkv].
        query_pads: the gathered rows of q that are padding.
        bias: [BLOCK_TOKENS * G, before + BLOCK_TOKENS], 0 where a query of a block sees a key, else -inf; the block's
            first query stands at column `before`.
    """

    buckets: list[_Bucket]
    query_from: Tensor
    key_from: Tensor
    query_to: Tensor
    key_to: Tensor
    query_pads: Tensor
    bias: Tensor
    before: int
    group: int
    window: int | None

    def blocks(self, bucket: _Bucket) -> Iterator[tuple[slice, slice]]:
        """(rows of the queries, keys that one of them sees), block by block."""
        for start in range(0, bucket.length, BLOCK_TOKENS):
            end = min(start + BLOCK_TOKENS, bucket.length)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            yield slice(start * self.group, end * self.group), slice(first, end)

    def buffer(self) -> Tensor:
        """Room for the scores of any block."""
        return self.bias.new_empty(
            max(b.batch * min(b.length, BLOCK_TOKENS) * self.group * b.length for b in self.buckets)
        )

    def probabilities(self, q_b: Tensor, k_b: Tensor, scale: float, buffer: Tensor) -> Tensor:
        """P [batch, rows, keys] of one block, in the buffer."""
        rows, keys = q_b.shape[1], k_b.shape[1]
        first = self.before + rows // self.group - keys
        bias = self.bias[:rows, first : first + keys]
        out = buffer[: len(q_b) * rows * keys].view(len(q_b), rows, keys)
        torch.baddbmm(bias, q_b, k_b.transpose(1, 2), alpha=scale, out=out)
        return torch.softmax(out, -1, out=out)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float) -> Tensor:
        queries = _gather(q, plan.query_from)
        keys, values = _gather(k, plan.key_from), _gather(v, plan.key_from)
        out, buffer = torch.empty_like(queries), plan.buffer()
        for bucket in plan.buckets:
            q_b, o_b = (bucket.queries(x, plan.group) for x in (queries, out))
            k_b, v_b = (bucket.keys(x) for x in (keys, values))
            for rows, seen in plan.blocks(bucket):
                p = plan.probabilities(q_b[:, rows], k_b[:, seen], scale, buffer)
                _multiply(p, v_b[:, seen], o_b[:, rows])
        ctx.save_for_backward(queries, keys, values)
        ctx.plan, ctx.scale, ctx.dtype, ctx.kv_shape = plan, scale, q.dtype, k.shape
        return _scatter(out, plan.query_to, q.shape, q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        grads = _gather(grad, plan.query_from).index_fill_(0, plan.query_pads, 0)
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        buffer, d_buffer = plan.buffer(), plan.buffer()
        for bucket in plan.buckets:
            q_b, g_b, dq_b = (bucket.queries(x, plan.group) for x in (queries, grads, d_queries))
            k_b, v_b, dk_b, dv_b = (bucket.keys(x) for x in (keys, values, d_keys, d_values))
            for rows, seen in plan.blocks(bucket):
                p = plan.probabilities(q_b[:, rows], k_b[:, seen], scale, buffer)
                _multiply_add(p.transpose(1, 2), g_b[:, rows], dv_b[:, seen])
                ds = d_buffer[: p.numel()].view(p.shape)
                _multiply(g_b[:, rows], v_b[:, seen].transpose(1, 2), ds)
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
                _multiply(ds, k_b[:, seen], dq_b[:, rows])
                _multiply_add(ds.transpose(1, 2), q_b[:, rows], dk_b[:, seen])
        dq = _scatter(d_queries.mul_(scale), plan.query_to, grad.shape, ctx.dtype)
        dk = _scatter(d_keys.mul_(scale), plan.key_to, ctx.kv_shape, ctx.dtype)
        return dq, dk, _scatter(d_values, plan.key_to, ctx.kv_shape, ctx.dtype), None, None


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. Given a strided result, torch would multiply matrix by matrix; a copy is cheaper.

    Always into a given tensor: autocast leaves that alone.
    """
    if out.is_contiguous():
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b, out=out.new_empty(out.shape)))


def _multiply_add(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total += a b, for the same reason in two steps where total is strided."""
    if total.is_contiguous():
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b, out=total.new_empty(total.shape))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """[N, H, d] -> [R, d], one row a head of a token; at least fp32."""
    gathered = x.reshape(-1, x.shape[-1]).index_select(0, rows)
    return gathered.to(torch.promote_types(x.dtype, torch.float32))


def _scatter(x_Rd: Tensor, rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The way back: another gather, so the padding is simply not asked for."""
    return x_Rd.index_select(0, rows).view(shape).to(dtype)


def _plan(lengths: Sequence[int], query_heads: int, kv_heads: int, window: int | None, dtype: torch.dtype) -> _Plan:
    group = query_heads // kv_heads
    length_S = torch.tensor(lengths)
    start_S = length_S.cumsum(0) - length_S
    query_head = torch.arange(query_heads).view(kv_heads, 1, group)
    key_head = torch.arange(kv_heads).view(kv_heads, 1)
    buckets: list[_Bucket] = []
    query_from, key_from, query_real, key_real = [], [], [], []
    query_row = key_row = 0
    for members in _like_lengths(lengths, query_heads):
        longest = lengths[members[0]]
        place = torch.arange(longest)
        token = start_S[members, None] + torch.minimum(place, length_S[members, None] - 1)  # [n, longest]
        real = (place < length_S[members, None])[:, None].expand(-1, kv_heads, -1)
        query_from.append((token[:, None, :, None] * query_heads + query_head).flatten())
        key_from.append((token[:, None] * kv_heads + key_head).flatten())
        query_real.append(real[..., None].expand(*real.shape, group).flatten())
        key_real.append(real.flatten())
        buckets.append(_Bucket(len(members) * kv_heads, longest, query_row, key_row))
        query_row, key_row = query_row + len(query_from[-1]), key_row + len(key_from[-1])
    bias, before = _bias(buckets[0].length, group, window, dtype)
    real_queries = torch.cat(query_real)
    return _Plan(
        buckets,
        query_from=torch.cat(query_from),
        key_from=torch.cat(key_from),
        query_to=_inverse(torch.cat(query_from), real_queries),
        key_to=_inverse(torch.cat(key_from), torch.cat(key_real)),
        query_pads=(~real_queries).nonzero().flatten(),
        bias=bias,
        before=before,
        group=group,
        window=window,
    )


def _like_lengths(lengths: Sequence[int], heads: int) -> list[list[int]]:
    """The indices of `lengths` by groups of like length, each with its longest first and within SCORES_BUDGET."""
    groups: list[list[int]] = []
    longest = room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < 1 or lengths[index] < LIKE_LENGTHS * longest:
            groups.append([])
            longest = lengths[index]
            room = SCORES_BUDGET // (heads * longest * min(longest, BLOCK_TOKENS))
        groups[-1].append(index)
        room -= 1
    return groups


def _inverse(source: Tensor, real: Tensor) -> Tensor:
    """Where in `source` each of 0 .. max(source) stands, padding left aside."""
    rows = real.nonzero().flatten()
    inverse = torch.empty_like(rows)
    inverse[source[rows]] = rows
    return inverse


def _bias(longest: int, group: int, window: int | None, dtype: torch.dtype) -> tuple[Tensor, int]:
    """`_Plan.bias` and `_Plan.before`, for segments up to `longest` tokens."""
    block, last_start = min(longest, BLOCK_TOKENS), (longest - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    before = last_start if window is None else min(last_start, window - 1)
    back = torch.arange(block)[:, None] + before - torch.arange(before + block)  # the key's distance to the left
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return bias.repeat_interleave(group, 0), before
