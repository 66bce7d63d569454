"""NF4 with double quantisation, undone: bitsandbytes' bits on every path, each byte moved once."""

import os
import re
import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import count_bytes

from ibft_kernels import nf4_dequantize, reference
from ibft_kernels.ops import nf4

Tensors = tuple[torch.Tensor, ...]
CPU = torch.device("cpu")
# 600 blocks in two programs, the second partial; whole tiles; a partial block; an odd number of weights; one weight
SHAPES = [(300, 128), (512, 128), (37, 66), (7, 9), (1, 1)]


def quantised(n_weights: int, blocksize: int = 64, nested_blocksize: int = 256) -> Tensors:
    """Random bytes and levels: every nibble pair and every absmax, where there are enough of them."""
    n_blocks = -(-n_weights // blocksize)
    return (
        torch.randint(256, (-(-n_weights // 2), 1)).to(torch.uint8),
        torch.randint(256, (n_blocks,)).to(torch.uint8),
        bnb.get_4bit_type("nf4", device="cpu"),
        torch.tensor(0.0371),
        torch.rand(-(-n_blocks // nested_blocksize)) * 0.05 + 0.01,
        bnb.create_dynamic_map().float(),
    )


def to(tensors: Tensors, device: torch.device) -> Tensors:
    return tuple(tensor.to(device) for tensor in tensors)


def by_bitsandbytes(
    tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype, blocksize: int = 64, nested_blocksize: int = 256
) -> torch.Tensor:
    packed, absmax, code, offset, nested_absmax, nested_code = tensors
    nested = bnb.QuantState(absmax=nested_absmax, code=nested_code, blocksize=nested_blocksize, dtype=torch.float32)
    state = bnb.QuantState(
        absmax=absmax, shape=torch.Size(shape), code=code, blocksize=blocksize, quant_type="nf4", dtype=dtype,
        offset=offset, state2=nested,
    )  # fmt: skip
    return bnb.dequantize_4bit(packed, state)


# --- the bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_bitsandbytes(backend, device, dtype, shape):
    tensors = quantised(shape[0] * shape[1])
    expected = by_bitsandbytes(tensors, shape, dtype)
    w = nf4_dequantize(*to(tensors, device), shape=shape, dtype=dtype, backend=backend)
    assert w.dtype == dtype
    assert torch.equal(w.cpu(), expected)
    assert torch.equal(reference.nf4_dequantize(*tensors, shape=shape, dtype=dtype), expected)


GPU_PATHS = [pytest.param(backend, "cuda", marks=pytest.mark.gpu) for backend in ("torch", "triton")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "place"), [("torch", "cpu"), *GPU_PATHS])
def test_bfloat16_equals_bitsandbytes(backend, place, shape):
    """Not in the interpreter, whose conversion to bf16 truncates."""
    tensors = quantised(shape[0] * shape[1])
    expected = by_bitsandbytes(tensors, shape, torch.bfloat16)
    w = nf4_dequantize(*to(tensors, torch.device(place)), shape=shape, dtype=torch.bfloat16, backend=backend)
    assert torch.equal(w.cpu(), expected)
    assert torch.equal(reference.nf4_dequantize(*tensors, shape=shape, dtype=torch.bfloat16), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_equals_bitsandbytes_on_the_device(dtype):
    tensors = to(quantised(300 * 128), torch.device("cuda"))
    w = nf4_dequantize(*tensors, shape=(300, 128), dtype=dtype)
    assert torch.equal(w, by_bitsandbytes(tensors, (300, 128), dtype))


@pytest.mark.parametrize(("blocksize", "nested_blocksize"), [(32, 256), (128, 64), (4096, 256), (64, 100)])
def test_other_block_sizes(backend, device, blocksize, nested_blocksize):
    shape = (90, 250)
    tensors = quantised(90 * 250, blocksize, nested_blocksize)
    expected = by_bitsandbytes(tensors, shape, torch.float32, blocksize, nested_blocksize)
    w = nf4_dequantize(
        *to(tensors, device), shape=shape, dtype=torch.float32, blocksize=blocksize, nested_blocksize=nested_blocksize,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(w.cpu(), expected)


@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_what_bitsandbytes_quantised(dtype):
    dense = (torch.randn(96, 130) * 0.02).to(dtype)
    packed, state = bnb.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
    tensors = packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code
    w = nf4_dequantize(*tensors, shape=dense.shape, dtype=dtype, backend="torch")
    assert torch.equal(w, bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_more_than_two_to_the_31_weights():
    """Offsets are 64-bit: the last blocks of such a weight are those of a small one."""
    shape, tail = (2**16 + 1, 2**15), 2**15
    n_weights = shape[0] * shape[1]
    device = torch.device("cuda")
    packed = torch.randint(256, (n_weights // 2,), dtype=torch.uint8, device=device)
    absmax = torch.randint(256, (n_weights // 64,), dtype=torch.uint8, device=device)
    code, offset, _, nested_code = to(quantised(64)[2:], device)
    nested_absmax = torch.rand(n_weights // 64 // 256, device=device)
    w = nf4_dequantize(packed, absmax, code, offset, nested_absmax, nested_code, shape=shape, dtype=torch.bfloat16)
    last = packed[-tail // 2 :], absmax[-tail // 64 :], code, offset, nested_absmax[-tail // 64 // 256 :], nested_code
    assert torch.equal(w[-1:], nf4_dequantize(*last, shape=(1, tail), dtype=torch.bfloat16, backend="torch"))


# --- rounding: a product, then a sum --------------------------------------------------------------


def test_these_numbers_tell_a_fused_multiply_add_apart():
    """Else the equalities above could not fail on a device for that reason."""
    _, absmax, _, offset, nested_absmax, nested_code = quantised(300 * 128)
    levels, scale = nested_code[absmax.long()], nested_absmax.repeat_interleave(256)[: absmax.numel()]
    fused = (levels.double() * scale.double() + offset.double()).float()
    assert (fused != levels * scale + offset).sum() > 50


def test_the_launcher_forbids_multiply_adds(monkeypatch):
    kernel, seen = nf4.nf4_dequantize_kernel, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(options) or kernel[grid](*arguments, **options)

    monkeypatch.setattr(nf4, "nf4_dequantize_kernel", Spy())
    nf4_dequantize(*quantised(128), shape=(2, 64), dtype=torch.float32, backend="triton")
    assert [options["enable_fp_fusion"] for options in seen] == [False]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ibft_kernels._aot_cases import CASES
from ibft_kernels._launch import stored_shape
from ibft_kernels.ops.nf4 import EXACT

case, arch, exact = CASES["nf4_dequantize"], int(sys.argv[1]), sys.argv[2] == "exact"
shape = stored_shape(f"sm_{arch}", "nf4_dequantize")
types = case.arguments("*bf16", shape)
constants = {(i,): types[p.name] for i, p in enumerate(case.kernel.params) if p.is_constexpr}
types |= {p.name: "constexpr" for p in case.kernel.params if p.is_constexpr}
aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(case.kernel.params) if not p.is_constexpr}
source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=aligned)
options = {"num_warps": shape["num_warps"], "enable_fp_fusion": True} | (EXACT if exact else {})
print(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"])
"""


@pytest.mark.parametrize("arch", [75, 90])
def test_the_compiled_kernel(tmp_path, arch):
    """The sum is a sum, a lane stores 16 bytes at once, and nothing passes through shared memory."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {}
    for options in ("exact", "fused"):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(arch), options], capture_output=True, text=True, check=False,
            env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[options] = done.stdout
    instructions = re.compile(r"\b(?:fma|add|mul)\.\S*f32\b")
    exact = [name.split(".")[0] for name in instructions.findall(found["exact"])]
    assert (exact.count("fma"), exact.count("add"), exact.count("mul")) == (0, 1, 9), "eight weights a lane, one absmax"
    assert ".ftz" not in found["exact"]
    assert "fma.rn.f32" in found["fused"], "the pattern above would not have found one"
    assert re.findall(r"st\.global\.\S+", found["exact"]) == ["st.global.v4.b32"]
    assert not re.search(r"\b(?:ld|st)\.shared", found["exact"])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_writes_the_start_of_a_given_buffer(backend, device, dtype):
    buffer = torch.full((300 * 128,), 7.0, dtype=dtype, device=device)
    for shape in [(300, 128), (37, 65)]:
        tensors = quantised(shape[0] * shape[1])
        before = buffer.clone()
        w = nf4_dequantize(*to(tensors, device), shape=shape, dtype=dtype, out=buffer, backend=backend)
        assert w.data_ptr() == buffer.data_ptr()
        assert w.shape == shape
        assert torch.equal(w.cpu(), by_bitsandbytes(tensors, shape, dtype))
        assert torch.equal(buffer[w.numel() :], before[w.numel() :])
    shaped = torch.empty(37, 65, dtype=dtype, device=device)
    assert torch.equal(
        nf4_dequantize(*to(tensors, device), shape=(37, 65), dtype=dtype, out=shaped, backend=backend), w
    )
    assert torch.equal(shaped, w)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_no_weights(backend, device, shape):
    tensors = to(quantised(0), device)
    assert nf4_dequantize(*tensors, shape=shape, dtype=torch.float16, backend=backend).shape == shape
    buffer = torch.ones(3, dtype=torch.float16, device=device)
    assert nf4_dequantize(*tensors, shape=shape, dtype=torch.float16, out=buffer, backend=backend).shape == shape
    assert buffer.tolist() == [1.0, 1.0, 1.0]


def test_each_byte_is_read_and_written_once():
    """Whole tiles, so that every lane counts. Lookups, in tables that a GPU keeps in cache, are taken off as what they
    must come to: four bytes of `code` a weight, of `nested_code` and `nested_absmax` a block, of `offset` a program.
    """
    n_weights, programs = 512 * 128, 2
    tensors = quantised(n_weights)
    with count_bytes() as traffic:
        w = nf4_dequantize(*tensors, shape=(512, 128), dtype=torch.float16, backend="triton")
    lookups = 4 * (n_weights + 2 * n_weights // 64 + programs)
    assert traffic.loaded - lookups == n_weights // 2 + n_weights // 64
    assert traffic.stored == w.nbytes == 2 * n_weights


class _Largest(TorchDispatchMode):
    """The bytes of the largest new tensor."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            self.bytes = max(self.bytes, 0 if out.untyped_storage().data_ptr() in given else out.nbytes)
        return out


def test_the_torch_path_works_in_chunks(monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    shape = (123, 250)
    tensors = quantised(123 * 250)
    out = torch.empty(shape)
    with _Largest() as largest:
        nf4._dequantize_torch(out, *(x.view(-1) for x in tensors), 64, 256)
    assert torch.equal(out, by_bitsandbytes(tensors, shape, torch.float32))
    assert 4 * 4096 <= largest.bytes <= 8 * 4096 < out.nbytes


# --- arguments ------------------------------------------------------------------------------------

NAMES = "packed", "absmax", "code", "offset", "nested_absmax", "nested_code"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (6, -64)}, r"shape: expected \(out, in\), got \(6, -64\)"),
        ({"shape": (384,)}, r"shape: expected \(out, in\), got \(384,\)"),
        ({"dtype": torch.float64}, "dtype: expected float16, bfloat16 or float32, got torch.float64"),
        ({"blocksize": 96}, "blocksize: expected a power of two from 32 to 4096, got 96"),
        ({"nested_blocksize": 0}, "nested_blocksize: expected 1 or more, got 0"),
        ({"packed": torch.zeros(192)}, "packed: expected torch.uint8 on cpu, got torch.float32 on cpu"),
        ({"packed": torch.zeros(193, dtype=torch.uint8)}, "packed: expected 192 contiguous elements, got 193"),
        ({"packed": torch.zeros(384, dtype=torch.uint8)[::2]}, r"packed: expected .*, got 192 \(strided"),
        ({"absmax": torch.zeros(5, dtype=torch.uint8)}, "absmax: expected 6 contiguous elements, got 5"),
        ({"absmax": torch.zeros(6)}, "absmax: expected torch.uint8"),
        ({"absmax": torch.zeros(6, dtype=torch.uint8, device="meta")}, "absmax: expected .* on cpu, got .* on meta"),
        ({"code": torch.zeros(16, dtype=torch.float64)}, "code: expected torch.float32"),
        ({"code": torch.zeros(15)}, "code: expected 16 contiguous elements, got 15"),
        ({"code": torch.zeros(16, requires_grad=True)}, "code: expected a frozen tensor"),
        ({"offset": torch.zeros(2)}, "offset: expected 1 contiguous elements, got 2"),
        ({"nested_absmax": torch.zeros(2)}, "nested_absmax: expected 1 contiguous elements, got 2"),
        ({"nested_absmax": torch.zeros(1).half()}, "nested_absmax: expected torch.float32"),
        ({"nested_code": torch.zeros(255)}, "nested_code: expected 256 contiguous elements, got 255"),
        ({"out": torch.zeros(383)}, "out: expected 384 contiguous elements, got 383"),
        ({"out": torch.zeros(384).half()}, "out: expected torch.float32 on cpu, got torch.float16"),
        ({"out": torch.zeros(384, device="meta")}, "out: expected torch.float32 on cpu, got torch.float32 on meta"),
        ({"out": torch.zeros(768)[::2]}, r"out: expected .* \(strided"),
        ({"out": torch.zeros(384, requires_grad=True)}, "out: expected a frozen tensor"),
        ({"backend": "numpy"}, "backend: expected"),
    ],
)
def test_bad_arguments_are_named(backend, changes, message):
    buffer = torch.full((400,), 7.0)
    arguments = dict(zip(NAMES, quantised(384), strict=True))
    arguments |= {"shape": (6, 64), "dtype": torch.float32, "out": buffer, "backend": backend}
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(**arguments | changes)
    assert (buffer == 7).all()
