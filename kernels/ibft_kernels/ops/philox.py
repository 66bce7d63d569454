"""Philox-4x32-10 keyed by the sample: the noise of the bottleneck and the masks of LoRA dropout.

    key      64 bits: low half = run seed, high half = stream (one stream a consumer: z, or one dropout module)
    counter  (column group, position in the sample, sample's index in the epoch's order, epoch), 32 bits each

A counter-based generator has no state: a token's noise depends on its key and counter alone, so on neither packing nor
micro-batch, accumulation, rank or resume, and backward recomputes it instead of loading it. One call gives four words;
call j of a row gives the normals of columns 4j .. 4j + 3.

    uniform  u = ((word >>> 9) + 1/2) 2^-23        exact in fp32, never 0 or 1: every backend has the same u
    normal   r = sqrt(-2 ln u0),  (r cos 2 pi u1, r sin 2 pi u1)        Box-Muller, fp32
             words (0, 1) -> columns 4j, 4j + 1        words (2, 3) -> columns 4j + 2, 4j + 3

The angle is reduced exactly as a fraction of a turn, then one odd polynomial serves sine and cosine. That keeps the
backends within 1e-6 of each other (rounding 2 pi u first costs up to 2e-6 in the tails), and spares kernels the
library functions' range reduction, which claims local memory for angles that never occur here.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). Words equal `tl.philox` bit for bit.
Legend: N rows, J calls a row, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._dispatch import resolve_backend
from .._library import library_op
from ._philox_triton import launch_philox
from ._rows import FLOATS, SEED_SCHEMA, check_seed, join_seed, rows_of_ids, split_seed

__all__ = ["noise_key", "philox_normal", "philox_words"]

LOW32 = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # for counter words 0 and 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the two key words after each round

# sin(2 pi a) = SIN_1 a + a^3 (SIN_3 + SIN_5 a^2 + ...), |a| <= 1/4: minimax fit with SIN_1 held at the fp32 nearest to
# 2 pi; 8e-9 off in exact arithmetic, 1.7e-7 evaluated in fp32.
SIN_1, SIN_3, SIN_5, SIN_7, SIN_9 = (
    6.2831854820251465,
    -41.341712951660156,
    81.60400390625,
    -76.60961151123047,
    39.9422721862793,
)

# Calls in flight on the torch path: six int64 buffers of 1 MiB, so that few loops are started; a GPU wants length.
CPU_CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22


def noise_key(run_seed: int, stream: int) -> int:
    """The 64-bit key: `run_seed` modulo 2^32 in the low half, `stream` modulo 2^32 in the high half.

    The result lies in 0 .. 2^64 - 1. An int64 tensor holds the same 64 bits: from 2^63 on, store the key minus 2^64.
    """
    return (stream & LOW32) << 32 | (run_seed & LOW32)


# --- torch path -----------------------------------------------------------------------------------


def _round_keys(seed: int | torch.Tensor) -> Iterator[tuple[Any, Any]]:
    """The ten key pairs: ints, or 0-d device tensors where the seed lives on a device, which is not read."""
    key = seed.reshape(()) if isinstance(seed, torch.Tensor) and seed.device.type != "cpu" else int(seed)
    for i in range(ROUNDS):
        yield (key + i * WEYL[0]) & LOW32, ((key >> 32) + i * WEYL[1]) & LOW32


def word_chunks(
    seed: int | torch.Tensor, ids_N3: torch.Tensor | None, n_rows: int, calls: int, device: torch.device
) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Philox words of `calls` calls a row, some rows at a time: (rows, four int64 planes [n, J]).

    The words are the planes' low 32 bits; what lies above is undefined. The planes are scratch that the next chunk
    overwrites. Rounds 1 and 2 run on broadcast shapes (a product of the column word alone, or of the row words alone,
    is small), the other eight in place. Only a product's factors need clean upper halves, so one `and` a word and
    round suffices.
    """
    keys = list(_round_keys(seed))
    column_1J = torch.arange(calls, device=device)[None, :]
    if ids_N3 is None:
        position_N1 = torch.arange(n_rows, device=device)[:, None] & LOW32
        sample_N1 = epoch_N1 = torch.zeros_like(position_N1)
    else:
        epoch_N1, sample_N1, position_N1 = (ids_N3.long() & LOW32).split(1, dim=1)
    chunk = max(1, (CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK) // max(1, calls))
    scratch = [torch.empty(min(chunk, n_rows), calls, dtype=torch.int64, device=device) for _ in range(6)]

    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        c0, c2, spare_a, spare_b, l1, l3 = (buffer[: rows.stop - start] for buffer in scratch)
        # round 1: the factors are a row and a column
        product_a, product_b = column_1J * MULTIPLIERS[0], sample_N1[rows] * MULTIPLIERS[1]
        head_n1 = ((product_b >> 32) ^ position_N1[rows] ^ keys[0][0]) & LOW32
        torch.bitwise_xor((product_a >> 32) & LOW32 ^ keys[0][1], epoch_N1[rows], out=c2)
        # round 2: one factor is still a column
        torch.mul(c2, MULTIPLIERS[1], out=l1)
        torch.bitwise_xor(l1 >> 32, (product_b ^ keys[1][0]), out=c0).bitwise_and_(LOW32)
        product_head = head_n1 * MULTIPLIERS[0]
        torch.bitwise_xor((product_head >> 32) ^ keys[1][1], product_a, out=c2).bitwise_and_(LOW32)
        low3: torch.Tensor = product_head
        for k0, k1 in keys[2:]:
            torch.mul(c2, MULTIPLIERS[1], out=spare_b)
            torch.mul(c0, MULTIPLIERS[0], out=spare_a)
            torch.bitwise_right_shift(spare_b, 32, out=c0).bitwise_xor_(l1).bitwise_xor_(k0).bitwise_and_(LOW32)
            torch.bitwise_right_shift(spare_a, 32, out=c2).bitwise_xor_(low3).bitwise_xor_(k1).bitwise_and_(LOW32)
            l1, spare_b = spare_b, l1
            low3, spare_a = spare_a, (l3 if low3 is product_head else low3)
        yield rows, (c0, l1, c2, low3)


def _uniforms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two word planes -> uniforms, fp32 [2, n, J]."""
    bits = torch.empty(2, *first.shape, dtype=torch.int32, device=first.device)
    bits[0].copy_(first)
    bits[1].copy_(second)
    return bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def _sin_turns_torch(a: torch.Tensor) -> torch.Tensor:
    q = a * a
    tail = (q * SIN_9).add_(SIN_7).mul_(q).add_(SIN_5).mul_(q).add_(SIN_3)
    return tail.mul_(q.mul_(a)).add_(a, alpha=SIN_1)


def _normals(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Four word planes [n, J] -> normals, fp32 [n, 4J]."""
    w0, w1, w2, w3 = words
    r = _uniforms(w0, w2).log_().mul_(-2.0).sqrt_()  # [2, n, J]: one radius and one angle a pair
    u = _uniforms(w1, w3)
    quarter_back = u - 0.25
    quarter_back.sub_(quarter_back.round())
    out = torch.empty(*w0.shape, 2, 2, dtype=torch.float32, device=w0.device)  # [n, J, pair, cosine or sine]
    planes = out.permute(2, 0, 1, 3)
    torch.mul(r, _sin_turns_torch((u - 0.5).abs_().sub_(0.25)), out=planes[..., 0])
    torch.mul(r, _sin_turns_torch(quarter_back.abs_().neg_().add_(0.25)), out=planes[..., 1])
    return out.view(w0.shape[0], -1)


def normal_rows(
    seed: int | torch.Tensor,
    ids_N3: torch.Tensor | None,
    n_rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The torch path of `philox_normal` on checked rows [N, 3] (None: position = row number); [N, columns]."""
    out = torch.empty(n_rows, columns, dtype=dtype, device=device)
    for rows, words in word_chunks(seed, ids_N3, n_rows, -(-columns // 4), device):
        out[rows].copy_(_normals(words)[:, :columns])
    return out


# --- library: integers and noise have no gradient -------------------------------------------------


@library_op("philox_words", f"(Tensor noise_ids, SymInt calls, {SEED_SCHEMA}, str backend) -> Tensor")
def _words_op(noise_ids, calls, seed_tensor, seed, backend):
    n_rows, device, key = noise_ids.shape[0], noise_ids.device, join_seed(seed_tensor, seed)
    out = torch.empty(n_rows, calls, 4, dtype=torch.int32, device=device)
    if backend == "triton":
        launch_philox(out.view(n_rows, 4 * calls), key, noise_ids, normal=False)
    else:
        for rows, words in word_chunks(key, noise_ids, n_rows, calls, device):
            for i, word in enumerate(words):
                out[rows, :, i].copy_(word)
    return out


@_words_op.register_fake
def _(noise_ids, calls, seed_tensor, seed, backend):
    return noise_ids.new_empty(noise_ids.shape[0], calls, 4)


@library_op(
    "philox_normal", f"(Tensor noise_ids, SymInt columns, ScalarType dtype, {SEED_SCHEMA}, str backend) -> Tensor"
)
def _normal_op(noise_ids, columns, dtype, seed_tensor, seed, backend):
    n_rows, device, key = noise_ids.shape[0], noise_ids.device, join_seed(seed_tensor, seed)
    if backend != "triton":
        return normal_rows(key, noise_ids, n_rows, columns, device, dtype)
    out = torch.empty(n_rows, columns, dtype=dtype, device=device)
    launch_philox(out, key, noise_ids, normal=True)
    return out


@_normal_op.register_fake
def _(noise_ids, columns, dtype, seed_tensor, seed, backend):
    return noise_ids.new_empty(noise_ids.shape[0], columns, dtype=dtype)


# --- public ---------------------------------------------------------------------------------------


def _leading(noise_ids: torch.Tensor, seed: int | torch.Tensor, columns: int) -> tuple[torch.Size, torch.Tensor]:
    if noise_ids.dim() < 1:
        raise ValueError("noise_ids: expected shape [..., 3], got a 0-d tensor")
    if columns < 0:
        raise ValueError(f"columns: expected 0 or more, got {columns}")
    check_seed(seed, noise_ids.device)
    shape = noise_ids.shape[:-1]
    ids_N3 = rows_of_ids(noise_ids, shape, noise_ids.device)
    assert ids_N3 is not None
    return shape, ids_N3


def philox_words(
    seed: int | torch.Tensor, noise_ids: torch.Tensor, calls: int, *, backend: str = "auto"
) -> torch.Tensor:
    """The generator's integers: int32 [..., calls, 4], bit patterns of unsigned words. Arguments as `philox_normal`."""
    shape, ids_N3 = _leading(noise_ids, seed, calls)
    words = _words_op(ids_N3, calls, *split_seed(seed), resolve_backend(backend, ids_N3.device))
    return words.view(*shape, calls, 4)


def philox_normal(
    seed: int | torch.Tensor,
    noise_ids: torch.Tensor,
    columns: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """N(0, 1) noise that depends on the key and on each row's ids, and on nothing else.

    Args:
        seed: 64-bit key, see `noise_key`; an int, or a one-element int64 tensor (never copied to the host).
        noise_ids: int32 [..., 3] = (epoch, sample's index in the epoch's order, position in the sample).
        columns: how many normals a row.
        dtype: of the result; the noise is computed in fp32 and cast.
        backend: "auto", "triton" or "torch"; they agree within 1e-6, on the same integers.

    Returns:
        [..., columns] on the device of `noise_ids`.

    Raises:
        ValueError: a wrong shape, dtype, device or range.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
    shape, ids_N3 = _leading(noise_ids, seed, columns)
    noise = _normal_op(ids_N3, columns, dtype, *split_seed(seed), resolve_backend(backend, ids_N3.device))
    return noise.view(*shape, columns)
