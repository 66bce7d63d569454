"""The 4-bit linear layer: bitsandbytes' values to the bit, gradients of a plain product, bytes that never change."""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model
from torch import nn

from ibft import nf4
from ibft.nf4 import NF4Linear, adopt_linear4bit

# NF4's 16 levels: Dettmers et al., QLoRA (arXiv 2305.14314), appendix E
NF4_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@given(
    out=st.integers(1, 40),
    blocks=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
def test_values_are_exactly_those_of_bitsandbytes_and_of_the_paper(out, blocks, dtype, seed):
    torch.manual_seed(seed)
    weight = (torch.randn(out, 64 * blocks) * 0.02).to(dtype)
    layer = NF4Linear.quantize(weight)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(layer.dequantize(dtype), bnb.dequantize_4bit(packed, state))

    # the same by hand: two 4-bit codes a byte (high nibble first), blocks of 64, their absmax in 8 bits
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    absmax = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    absmax = absmax + state.offset
    by_hand = torch.tensor(NF4_LEVELS)[codes].view(-1, 64) * absmax[:, None]
    torch.testing.assert_close(layer.dequantize(torch.float32).view(-1, 64), by_hand, rtol=1e-6, atol=1e-9)
    assert (layer.dequantize(torch.float32) - weight.float()).abs().max() < 0.16 * weight.float().abs().max()


def test_a_cpu_keeps_bitsandbytes_and_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(nf4, "nf4_dequantize", lambda *_, **__: pytest.fail("called on a CPU"))
    layer = NF4Linear.quantize(torch.randn(6, 64))
    first, second = layer.dequantize(torch.float32), layer.dequantize(torch.float32)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.fixture
def on_stream(monkeypatch):
    """`on_stream(7)`: from now on a CPU passes for a device whose current stream is 7. No buffer kept from before."""

    def choose(stream):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=stream))

    monkeypatch.setattr(nf4, "_kept", {})
    choose(0)
    return choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_of_a_device_has_the_same_bits(on_stream, dtype):
    for shape in [(6, 64), (40, 192), (5, 70)]:
        layer = NF4Linear.quantize(torch.randn(shape) * 0.02)
        assert torch.equal(layer._dequantize_into_buffer(dtype), layer.dequantize(dtype))


def test_layers_of_one_stream_share_a_buffer_that_only_grows(on_stream):
    small, large = NF4Linear.quantize(torch.randn(6, 64)), NF4Linear.quantize(torch.randn(40, 192))
    with torch.inference_mode():
        small._dequantize_into_buffer(torch.float32)
        first = large._dequantize_into_buffer(torch.float32).data_ptr()
    again = small._dequantize_into_buffer(torch.float32)  # after inference, written in place
    assert again.data_ptr() == first
    assert large._dequantize_into_buffer(torch.float32).data_ptr() == first
    assert small._dequantize_into_buffer(torch.float16).data_ptr() != first
    on_stream(1)
    assert small._dequantize_into_buffer(torch.float32).data_ptr() != first
    assert [buffer.numel() for buffer in nf4._kept.values()] == [40 * 192, 6 * 64, 6 * 64]


def test_a_kept_weight_that_was_overwritten_cannot_reach_a_gradient(on_stream):
    """Outside the layer, whose backward dequantises anew."""
    layer = NF4Linear.quantize(torch.randn(6, 64))
    y = F.linear(torch.randn(3, 64, requires_grad=True), layer._dequantize_into_buffer(torch.float32))
    layer._dequantize_into_buffer(torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_gives_bitsandbytes_bits_and_gradients(dtype):
    dense = torch.randn(96, 130, device="cuda") * 0.02
    packed, state = bnb.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    expected, layer = bnb.dequantize_4bit(packed, state), NF4Linear(packed, state, None)
    assert torch.equal(layer.dequantize(dtype), expected)
    other = NF4Linear.quantize(torch.randn(64, 96, device="cuda"))
    x = torch.randn(7, 130, dtype=dtype, device="cuda", requires_grad=True)
    y = layer(x)
    other(y.detach())  # overwrites the buffer
    upstream = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream @ expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradient_are_those_of_the_dequantised_layer(dtype, bias):
    torch.manual_seed(0)
    dense = nn.Linear(128, 48, bias=bias)
    layer = NF4Linear.quantize(dense.weight, dense.bias)
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    twin = x.detach().requires_grad_()
    expected = F.linear(twin, layer.dequantize(dtype), None if not bias else dense.bias.to(dtype))
    (expected_grad,) = torch.autograd.grad(expected, twin, upstream)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


def test_autocast_decides_the_dtype_of_the_product():
    layer = NF4Linear.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_nothing_but_the_packed_bytes_is_kept_for_backward():
    layer = NF4Linear.quantize(torch.randn(64, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 64, requires_grad=True)).sum()
    assert [tensor for tensor in kept if tensor.numel() > 1] == []


def test_refuses_what_it_would_compute_wrongly():
    packed, state = bnb.quantize_4bit(torch.randn(8, 64), compress_statistics=False, quant_type="nf4")
    with pytest.raises(ValueError, match="double quantisation"):
        NF4Linear(packed, state, None)
    packed, state = bnb.quantize_4bit(torch.randn(8, 64), compress_statistics=True, quant_type="fp4")
    with pytest.raises(ValueError, match="got fp4"):
        NF4Linear(packed, state, None)


def test_a_loaded_model_keeps_its_bytes_and_its_logits(tmp_path):
    """Adopted from transformers' own 4-bit loading: same bytes, same logits as bitsandbytes' layers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load():
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
        )

    folder = save_tiny_model(tmp_path)
    theirs, ours = load(), load()
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see ibft.nf4: its repacking would spoil the comparison
    assert adopt_linear4bit(ours) == 21
    before = {name: module.weight.clone() for name, module in ours.named_modules() if isinstance(module, NF4Linear)}
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected = theirs(ids).logits
        for _ in range(2):
            assert torch.equal(ours(ids).logits, expected)
    assert all(torch.equal(ours.get_submodule(name).weight, weight) for name, weight in before.items())
