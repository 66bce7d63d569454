"""Packed attention against a softmax written out, sample by sample, in float64."""

import contextlib
import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibft import attention, attention_cpu
from ibft.attention import WAYS, Segments, choose_way, packed_attention

HERE = ["segments", "mask"]  # the ways that need no CUDA device
LENGTHS = [5, 1, 17, 30, 1, 2, 16, 9]  # 1-token segments among them; 16 and 17 share a bucket
HEADS = [(6, 2), (4, 4), (5, 1)]


def naive(q, k, v, lengths, *, scale, window=None):
    """The definition: one segment and one head at a time."""
    outs = []
    for start, end in pairwise(accumulate(lengths, initial=0)):
        place = torch.arange(end - start)
        back = place[:, None] - place
        hidden = (back < 0) | (back >= (window or math.inf))
        heads = []
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            scores = scale * q[start:end, head] @ k[start:end, kv_head].T
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[start:end, kv_head])
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs).flatten(1)


def slices(tokens, query_heads, kv_heads, dim, *, dtype=torch.float64, device="cpu"):
    """q, k, v as slices of one [N, out] buffer, the layout of a fused projection; leaves."""
    buffer = torch.randn(tokens, (query_heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
    parts = buffer.split([query_heads * dim, kv_heads * dim, kv_heads * dim], 1)
    return [part.unflatten(1, (-1, dim)).requires_grad_() for part in parts]


def value_and_gradients(function, inputs, upstream):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out))]


def differences(found, expected):
    return [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]


def agree(found, expected, tolerance):
    """Within `tolerance` of the largest element, output and gradients each."""
    sizes = [x.abs().max().item() for x in expected]
    return all(d <= tolerance * size for d, size in zip(differences(found, expected), sizes, strict=True))


def by_way(way, segments, scale, window=None):
    return lambda q, k, v: WAYS[way](q, k, v, segments, scale, window).flatten(1)


# --- Segments ------------------------------------------------------------------------------------------------------


def test_segments_by_hand():
    segments = Segments.of([3, 1, 4])
    assert segments.lengths == (3, 1, 4)
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert segments.cu_seqlens.dtype == torch.int32
    assert (segments.max_length, segments.num_tokens) == (4, 8)
    moved = segments.to("meta", non_blocking=True)
    assert moved.cu_seqlens.device.type == "meta"
    assert (moved.lengths, moved.max_length) == ((3, 1, 4), 4)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_segments_refuse(lengths):
    with pytest.raises(ValueError, match="lengths: got"):
        Segments.of(lengths)


# --- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 1, 4, 16])
def test_float64_is_the_naive_softmax(way, query_heads, kv_heads, window):
    torch.manual_seed(0)
    inputs = slices(sum(LENGTHS), query_heads, kv_heads, 12)
    upstream = torch.randn(sum(LENGTHS), query_heads * 12, dtype=torch.float64)
    found = value_and_gradients(by_way(way, Segments.of(LENGTHS), 0.3, window), inputs, upstream)
    expected = value_and_gradients(lambda *x: naive(*x, LENGTHS, scale=0.3, window=window), inputs, upstream)
    assert max(differences(found, expected)) < 1e-13


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_means_what_transformers_means(window):
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(window)
    place = torch.arange(9)
    expected = sees(0, 0, place[:, None], place).expand(9, 9)
    assert torch.equal(attention._block_mask(Segments.of([9]), window, torch.device("cpu")), expected)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("block", [8, 32])
def test_long_segments_take_several_blocks(monkeypatch, block, window):
    """Segments of several blocks, the last one partial; windows within a block and across blocks."""
    monkeypatch.setattr(attention_cpu, "BLOCK_TOKENS", block)
    lengths = [90, 86, 33, 32, 31, 8, 7, 1]
    torch.manual_seed(1)
    inputs = slices(sum(lengths), 6, 2, 8)
    upstream = torch.randn(sum(lengths), 48, dtype=torch.float64)
    found = value_and_gradients(by_way("segments", Segments.of(lengths), 0.5, window), inputs, upstream)
    expected = value_and_gradients(lambda *x: naive(*x, lengths, scale=0.5, window=window), inputs, upstream)
    assert max(differences(found, expected)) < 1e-13


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    block=st.integers(1, 50),
    window=st.none() | st.integers(1, 45),
    budget=st.integers(1, 20_000),
)
def test_no_lengths_block_window_or_budget_changes_the_numbers(lengths, block, window, budget):
    torch.manual_seed(len(lengths))
    inputs = slices(sum(lengths), 4, 2, 4)
    upstream = torch.randn(sum(lengths), 16, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "BLOCK_TOKENS", block)
        patch.setattr(attention_cpu, "SCORES_BUDGET", budget)
        found = value_and_gradients(by_way("segments", Segments.of(lengths), 0.5, window), inputs, upstream)
    expected = value_and_gradients(by_way("mask", Segments.of(lengths), 0.5, window), inputs, upstream)
    assert max(differences(found, expected)) < 1e-13


@pytest.mark.parametrize("window", [None, 6])
def test_fp32_ways_agree(window):
    torch.manual_seed(2)
    inputs = slices(sum(LENGTHS), 6, 2, 32, dtype=torch.float32)
    upstream = torch.randn(sum(LENGTHS), 192)
    segments = Segments.of(LENGTHS)
    first, second = (value_and_gradients(by_way(way, segments, 32**-0.5, window), inputs, upstream) for way in HERE)
    assert agree(first, second, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_sdpa(dtype):
    torch.manual_seed(3)
    inputs = slices(sum(LENGTHS), 6, 2, 32, dtype=dtype)
    upstream = torch.randn(sum(LENGTHS), 192, dtype=dtype)
    segments = Segments.of(LENGTHS)
    truth = value_and_gradients(
        lambda *x: naive(*x, LENGTHS, scale=0.2), [x.detach().double().requires_grad_() for x in inputs], upstream
    )
    found = value_and_gradients(by_way("segments", segments, 0.2), inputs, upstream)
    native = value_and_gradients(by_way("mask", segments, 0.2), inputs, upstream)
    assert all(x.dtype == dtype for x in found)
    for ours, sdpa in zip(differences(found, truth), differences(native, truth), strict=True):
        assert ours <= 1.5 * sdpa + 1e-6  # a maximum over few rounding errors is a coarse measure


def test_only_saves_what_grows_with_the_tokens():
    saved = []
    lengths = [64] * 8
    q, k, v = slices(512, 6, 2, 8, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        packed_attention(q, k, v, Segments.of(lengths), scale=1.0)
    assert sum(saved) == q.numel() + k.numel() + v.numel()


# --- a segment and its neighbours ----------------------------------------------------------------------------------


def alone(inputs, lengths, index):
    start = sum(lengths[:index])
    rows = slice(start, start + lengths[index])
    return rows, [x.detach()[rows].clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("window", [None, 6])
def test_a_segment_does_not_depend_on_its_neighbours(way, window):
    torch.manual_seed(4)
    inputs = slices(sum(LENGTHS), 6, 2, 16, dtype=torch.float32)
    upstream = torch.randn(sum(LENGTHS), 96)
    packed = value_and_gradients(by_way(way, Segments.of(LENGTHS), 0.25, window), inputs, upstream)
    for index, length in enumerate(LENGTHS):
        rows, own = alone(inputs, LENGTHS, index)
        found = value_and_gradients(by_way(way, Segments.of([length]), 0.25, window), own, upstream[rows])
        own_rows = [x[rows] for x in packed]
        assert all(d <= 1e-6 * x.abs().max() for d, x in zip(differences(found, own_rows), packed, strict=True))


def test_not_even_on_a_neighbour_that_is_not_finite():
    """The numbers of padding are never looked at, so nothing says that they are finite."""
    torch.manual_seed(5)
    inputs = slices(sum(LENGTHS), 4, 2, 8, dtype=torch.float32)
    upstream = torch.randn(sum(LENGTHS), 32)
    function = by_way("segments", Segments.of(LENGTHS), 0.25)
    clean = value_and_gradients(function, inputs, upstream)
    poisoned_rows = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    poisoned_rows[6:23] = True  # the segment of 17, which shares a bucket with the one of 16
    poisoned = [
        x.detach().clone().masked_fill_(poisoned_rows[:, None, None], math.nan).requires_grad_() for x in inputs
    ]
    found = value_and_gradients(function, poisoned, upstream.masked_fill(poisoned_rows[:, None], math.inf))
    assert not found[0][poisoned_rows].isfinite().any()
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[~poisoned_rows], b[~poisoned_rows])


# --- how it is called ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic():
    """Also fills uninitialised memory with NaN, so a row that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", HERE)
def test_deterministic_algorithms(way):
    torch.manual_seed(6)
    inputs = slices(sum(LENGTHS), 6, 2, 16, dtype=torch.float32)
    upstream = torch.randn(sum(LENGTHS), 96)
    plain = value_and_gradients(by_way(way, Segments.of(LENGTHS), 0.25), inputs, upstream)
    with deterministic():
        first, second = (
            value_and_gradients(by_way(way, Segments.of(LENGTHS), 0.25), inputs, upstream) for _ in range(2)
        )
    assert all(map(torch.equal, first, second))
    assert agree(first, plain, 1e-6)


def test_autocast_changes_nothing():
    torch.manual_seed(7)
    inputs = slices(sum(LENGTHS), 6, 2, 16, dtype=torch.float32)
    upstream = torch.randn(sum(LENGTHS), 96)
    segments = Segments.of(LENGTHS)
    plain = value_and_gradients(by_way("segments", segments, 0.25), inputs, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(by_way("segments", segments, 0.25), inputs, upstream)
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("window", [17, 29, 30, 500])
def test_a_window_that_binds_nothing_is_ignored(monkeypatch, window):
    seen = []
    monkeypatch.setitem(WAYS, "segments", lambda q, *rest: seen.append(rest[-1]) or q)
    q, k, v = slices(sum(LENGTHS), 6, 2, 16)
    packed_attention(q, k, v, Segments.of(LENGTHS), scale=1.0, window=window)
    assert seen == [window if window < 30 else None]


def test_the_function_takes_the_chosen_way():
    torch.manual_seed(8)
    q, k, v = slices(sum(LENGTHS), 6, 2, 16)
    out = packed_attention(q, k, v, Segments.of(LENGTHS), scale=0.1, window=7)
    assert out.shape == (sum(LENGTHS), 96)
    assert out.is_contiguous()
    assert differences([out], [naive(q, k, v, LENGTHS, scale=0.1, window=7)])[0] < 1e-13


def test_masks_and_layouts_are_made_once_and_stay_on_their_device():
    segments = Segments.of(LENGTHS)
    q, k, v = slices(sum(LENGTHS), 6, 2, 16)
    for way in HERE:
        by_way(way, segments, 0.1)(q, k, v)
    cached = dict(segments._cache)
    assert len(cached) == 2
    for way in HERE:
        by_way(way, segments, 0.2)(q, k, v)
    assert all(segments._cache[key] is value for key, value in cached.items())
    assert len(segments._cache) == 2
    assert not segments.to("meta")._cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (8, 5, 4)}, "heads: got 5 of q and 2 of k"),
        ({"q": (9, 6, 4)}, "q, k, v: got"),
        ({"k": (8, 2, 3)}, "q, k, v: got"),
        ({"lengths": [4, 3]}, "segments: got 7 tokens, expected those of q, 8"),
        ({"window": 0}, "window: got 0"),
        ({"dtype": torch.float16}, "one dtype and one device"),
        ({"device": "meta"}, "one dtype and one device"),
    ],
)
def test_refuses(change, message):
    q, k, v = (
        torch.randn(change.get(name, shape)) for name, shape in zip("qkv", [(8, 6, 4), *[(8, 2, 4)] * 2], strict=True)
    )
    segments = Segments.of(change.get("lengths", [8])).to(change.get("device", "cpu"))
    with pytest.raises(ValueError, match=message):
        packed_attention(q.to(change.get("dtype", q.dtype)), k, v, segments, scale=1.0, window=change.get("window"))


def test_refuses_heads_that_are_not_adjacent():
    q, k, v = (torch.randn(4, heads, 8).transpose(0, 2) for heads in (6, 6, 6))
    with pytest.raises(ValueError, match="adjacent in memory"):
        packed_attention(q, k, v, Segments.of([8]), scale=1.0)


# --- the choice ----------------------------------------------------------------------------------------------------


class FakeTensor:
    """What `choose_way` looks at, of a tensor on a card that this machine need not have."""

    def __init__(self, device, dtype, dim):
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 1, dim)


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "window", "capability", "expected"),
    [
        ("cpu", torch.float32, 32, None, None, "segments"),
        ("cpu", torch.bfloat16, 30, 4, None, "segments"),
        ("mps", torch.float16, 64, None, None, "mask"),
        ("cuda", torch.bfloat16, 128, None, (8, 6), "varlen"),
        ("cuda", torch.float16, 64, 4, (9, 0), "varlen"),
        ("cuda", torch.bfloat16, 256, None, (8, 6), "efficient"),
        ("cuda", torch.float32, 128, None, (9, 0), "efficient"),
        ("cuda", torch.float16, 128, None, (7, 5), "efficient"),
        ("cuda", torch.bfloat16, 128, None, (7, 5), "mask"),
        ("cuda", torch.float16, 128, 4, (7, 5), "mask"),
        ("cuda", torch.float64, 128, None, (9, 0), "mask"),
        ("cuda", torch.bfloat16, 50, None, (9, 0), "mask"),
    ],
)
def test_choice(monkeypatch, device, dtype, dim, window, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert choose_way(FakeTensor(device, dtype, dim), window) == expected


@pytest.mark.parametrize(
    ("found", "window", "serves"),
    [
        ({"scale", "window_size", "enable_gqa"}, 4, True),
        ({"scale", "window_size"}, None, True),
        ({"scale", "is_causal"}, None, True),
        ({"scale", "is_causal"}, 4, False),
        ({"is_causal"}, None, False),
        (set(), None, False),
    ],
)
def test_varlen_serves_only_with_the_arguments_it_needs(monkeypatch, found, window, serves):
    monkeypatch.setattr(attention, "_varlen_arguments", lambda: frozenset(found))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert attention._varlen_serves(window) == serves


@pytest.mark.parametrize("found", [{"scale", "window_size", "enable_gqa"}, {"scale", "is_causal"}])
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_is_asked_for_the_same_attention_whatever_its_release(monkeypatch, found, window):
    """A stand-in with flash attention's meaning of the arguments: window_size = (keys to the left, to the right)."""
    if window and "window_size" not in found:
        pytest.skip("not served: see above")

    def stand_in(q, k, v, ends_q, ends_k, longest_q, longest_k, **arguments):
        assert set(arguments) <= found
        assert torch.equal(ends_q, ends_k)
        assert longest_q == longest_k == max(LENGTHS)
        assert q.shape == k.shape or arguments.get("enable_gqa")
        left, right = arguments.get("window_size", (-1, 0 if arguments.get("is_causal") else -1))
        assert right == 0
        seen = None if left == -1 else left + 1
        return naive(q, k, v, LENGTHS, scale=arguments["scale"], window=seen).view(q.shape)

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(attention, "_varlen_arguments", lambda: frozenset(found))
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(9)
    inputs = slices(sum(LENGTHS), 6, 2, 8)
    upstream = torch.randn(sum(LENGTHS), 48, dtype=torch.float64)
    found_values = value_and_gradients(by_way("varlen", Segments.of(LENGTHS), 0.3, window), inputs, upstream)
    expected = value_and_gradients(by_way("mask", Segments.of(LENGTHS), 0.3, window), inputs, upstream)
    assert max(differences(found_values, expected)) < 1e-13


def test_this_torch_has_the_calls_that_the_cuda_ways_make():
    assert attention._varlen_arguments() >= {"scale"}
    names = [argument.name for argument in torch.ops.aten._efficient_attention_forward.default._schema.arguments]
    assert names[:11] == [
        "query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p",
        "custom_mask_type", "compute_log_sumexp",
    ]  # fmt: skip
    assert "scale" in names


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["varlen", "efficient", "mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 6])
def test_cuda_ways(way, dtype, query_heads, kv_heads, window):
    """Every output and gradient: error <= that of SDPA under a mask in this precision, plus a stated tolerance."""
    if way != "mask" and choose_way(FakeTensor("cuda", dtype, 64), window) == "mask":
        pytest.skip("this card serves it under a mask only")
    if way == "varlen" and (dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0)):
        pytest.skip("flash attention: 16 bit on Ampere or later")
    if way == "efficient" and window:
        pytest.skip("windows go elsewhere")
    torch.manual_seed(10)
    inputs = slices(sum(LENGTHS), query_heads, kv_heads, 64, dtype=dtype, device="cuda")
    upstream = torch.randn(sum(LENGTHS), query_heads * 64, dtype=dtype, device="cuda")
    segments = Segments.of(LENGTHS).to("cuda")
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    truth = value_and_gradients(lambda *x: naive(*x, LENGTHS, scale=0.125, window=window), exact, upstream.cpu())
    with deterministic():
        found = value_and_gradients(by_way(way, segments, 0.125, window), inputs, upstream)
    native = value_and_gradients(by_way("mask", segments, 0.125, window), inputs, upstream)
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for ours, sdpa in zip(
        differences([x.cpu() for x in found], truth), differences([x.cpu() for x in native], truth), strict=True
    ):
        assert ours <= sdpa + tolerance


@pytest.mark.gpu
def test_cuda_attention_does_not_synchronise():
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    inputs = slices(sum(LENGTHS), 6, 2, 64, dtype=dtype, device="cuda")
    segments = Segments.of(LENGTHS).to("cuda")
    packed_attention(*inputs, segments, scale=0.125).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(*inputs, segments, scale=0.125).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
