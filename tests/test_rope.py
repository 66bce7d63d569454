"""The rotary embedding against transformers' own, values and gradients."""

import pytest
import torch

from ibft.rope import rotate


def table(tokens: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, d] of transformers' layout: each frequency twice."""
    positions = torch.arange(tokens) % 7 + 3
    angles = positions[:, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def transformers_rotate(q, k, cos, sin):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    return tuple(x[0] for x in found)


def slices(tokens: int, query_heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64):
    """q and k as slices of one projection's output, and that output."""
    buffer = torch.randn(tokens, (query_heads + 2 * kv_heads) * dim, dtype=dtype, requires_grad=True)
    q, k, _ = buffer.split([query_heads * dim, kv_heads * dim, kv_heads * dim], 1)
    return q.unflatten(1, (query_heads, dim)), k.unflatten(1, (kv_heads, dim)), buffer


@pytest.mark.parametrize("dim", [2, 6, 32, 50, 80, 128])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_values_and_gradients_are_those_of_transformers(dim, query_heads, kv_heads):
    torch.manual_seed(dim)
    q, k, buffer = slices(19, query_heads, kv_heads, dim)
    cos, sin = table(19, dim)
    before = buffer.detach().clone()
    found, expected = rotate(q, k, cos, sin), transformers_rotate(q, k, cos, sin)
    upstream = [torch.randn(x.shape, dtype=x.dtype) for x in expected]
    kept = [x.clone() for x in upstream]
    (found_grad,) = torch.autograd.grad(found, buffer, upstream)
    (expected_grad,) = torch.autograd.grad(expected, buffer, kept)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(found_grad, expected_grad, rtol=0, atol=1e-14)
    assert torch.equal(buffer, before), "an input was overwritten"
    assert all(map(torch.equal, upstream, kept)), "an incoming gradient was overwritten"


def test_halves_of_cos_and_sin_need_not_be_equal():
    """The rule of the docstring in full, which transformers' layout alone does not show."""
    q, k = torch.randn(5, 2, 8, dtype=torch.float64), torch.randn(5, 1, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 5, 8, dtype=torch.float64)
    for found, expected in zip(rotate(q, k, cos, sin), transformers_rotate(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda q, k: rotate(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_()), atol=1e-8
    )


def test_one_input_may_be_frozen():
    q, k, _ = slices(4, 2, 1, 6)
    q, k = q.detach().requires_grad_(), k.detach()
    cos, sin = table(4, 6)
    found, expected = rotate(q, k, cos, sin), transformers_rotate(q, k, cos, sin)
    (found[0].sum() + found[1].sum()).backward()
    torch.testing.assert_close(q.grad, torch.autograd.grad(expected[0].sum(), q)[0], rtol=0, atol=1e-14)
    assert k.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", ["same", torch.float32])
def test_16_bit_is_as_near_to_the_truth_as_transformers(dtype, table_dtype):
    """Also with an fp32 table, as under autocast: q and k keep their dtype there, where transformers promotes them."""
    torch.manual_seed(0)
    q, k, _ = slices(64, 6, 2, 32, dtype)
    cos, sin = table(64, 32, dtype if table_dtype == "same" else table_dtype)
    found, native = rotate(q, k, cos, sin), transformers_rotate(q, k, cos, sin)
    truth = transformers_rotate(*(x.double() for x in (q, k, cos, sin)))
    for ours, theirs, exact in zip(found, native, truth, strict=True):
        assert ours.dtype == dtype
        error, their_error = (ours - exact).abs().max(), (theirs.to(dtype) - exact).abs().max()
        assert error <= 1.01 * their_error + 1e-6


def test_saves_cos_and_sin_alone_and_returns_contiguous_tensors():
    saved: list[torch.Tensor] = []
    q, k, _ = slices(9, 6, 2, 16)
    cos, sin = table(9, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = rotate(q.transpose(0, 1).contiguous().transpose(0, 1), k, cos, sin)
    assert {x.data_ptr() for x in saved} == {cos.data_ptr(), sin.data_ptr()}
    assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize(
    ("q", "k", "cos", "message"),
    [
        ((5, 2, 7), (5, 1, 7), (5, 7), "d even"),
        ((5, 2, 8), (4, 1, 8), (5, 8), "expected"),
        ((5, 2, 8), (5, 1, 6), (5, 8), "expected"),
        ((1, 5, 2, 8), (1, 5, 1, 8), (5, 8), "expected"),
        ((5, 2, 8), (5, 1, 8), (5, 4), "partial rotary"),
        ((5, 2, 8), (5, 1, 8), (1, 8), r"expected \[N, d\]"),
    ],
)
def test_refuses(q, k, cos, message):
    with pytest.raises(ValueError, match=message):
        rotate(torch.randn(q), torch.randn(k), torch.randn(cos), torch.randn(cos))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_the_cpus_numbers(dtype):
    torch.manual_seed(0)
    q, k, _ = slices(100, 8, 2, 64, dtype)
    cos, sin = table(100, 64, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6  # two roundings at magnitudes up to 4
    for found, expected in zip(rotate(*(x.cuda() for x in (q, k, cos, sin))), rotate(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)
