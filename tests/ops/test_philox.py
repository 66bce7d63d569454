"""The generator: published vectors, equal integers everywhere, and normals that are normal."""

import math

import pytest
import torch
from traffic import count_bytes, within

import ibft_kernels
from ibft_kernels import noise_key, philox_normal, reference
from ibft_kernels.ops.philox import philox_words
from ibft_kernels.reference.philox import philox_4x32
from ibft_kernels.reference.philox import philox_words as reference_words

# Random123's known answers for philox4x32-10: counter, key, words
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def ids_like(rows: int, device: torch.device) -> torch.Tensor:
    """Any 32-bit patterns, negative ones included."""
    return torch.randint(-(2**31), 2**31, (rows, 3), dtype=torch.int64).to(torch.int32).to(device)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_reference_gives_the_published_vectors(counter, key, expected):
    words = [torch.tensor(int(word, 16)) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox_4x32(words, (k0, k1))] == expected.split()


def test_op_gives_the_published_zero_vector(backend, device):
    words = philox_words(0, torch.zeros(1, 3, dtype=torch.int32, device=device), 1, backend=backend)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()] == VECTORS[0][2].split()


@pytest.mark.parametrize("key", [0, noise_key(1234, 7), noise_key(0xFFFFFFFF, 0xFFFFFFFF), -5])
@pytest.mark.parametrize(("rows", "calls"), [(1, 1), (3, 9), (130, 70)])
def test_words_equal_the_reference_bit_for_bit(backend, device, key, rows, calls):
    ids = ids_like(rows, device)
    expected = reference_words(key, ids, calls)
    assert torch.equal(philox_words(key, ids, calls, backend=backend).long() & 0xFFFFFFFF, expected)


def test_words_do_not_depend_on_the_chunk_length(device, monkeypatch):
    ids = ids_like(11, device)
    whole = philox_words(5, ids, 6, backend="torch")
    monkeypatch.setattr("ibft_kernels.ops.philox.CPU_CHUNK", 13)
    monkeypatch.setattr("ibft_kernels.ops.philox.DEVICE_CHUNK", 13)
    assert torch.equal(philox_words(5, ids, 6, backend="torch"), whole)


def test_a_tensor_seed_is_the_same_64_bits(backend, device):
    ids = ids_like(5, device)
    key = noise_key(3, 0x80000001)
    for place in {device, torch.device("cpu")}:
        seed = torch.tensor([key - 2**64], device=place)
        assert torch.equal(philox_normal(seed, ids, 12, backend=backend), philox_normal(key, ids, 12, backend=backend))


def test_noise_key_packs_seed_and_stream():
    assert noise_key(5, 3) == 3 * 2**32 + 5
    assert noise_key(-1, -1) == 2**64 - 1
    assert reference.noise_key(2**40 + 9, 2) == noise_key(2**40 + 9, 2) == 2 * 2**32 + 9


@pytest.mark.parametrize("columns", [1, 4, 7, 64, 300])
def test_normals_equal_the_float64_truth(backend, device, columns):
    ids = ids_like(200, device)
    truth = reference.philox_normal(77, ids, columns, dtype=torch.float64)
    assert (philox_normal(77, ids, columns, backend=backend).double() - truth).abs().max() < 1e-6


def test_backends_agree_within_1e6(device):
    ids = ids_like(4000, device)
    by_triton, by_torch = (philox_normal(9, ids, 256, backend=name) for name in ("triton", "torch"))
    assert (by_triton - by_torch).abs().max() <= 1e-6


def test_extreme_uniforms_give_finite_normals():
    from ibft_kernels.ops.philox import _normals

    edge = torch.tensor([[0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x3FFFFFFF, 0xC0000000]])
    for radius in (0, 0xFFFFFFFF):
        normals = _normals((torch.full_like(edge, radius), edge, edge, torch.full_like(edge, radius)))
        assert normals.isfinite().all()
        assert normals.abs().max() <= math.sqrt(2 * 24 * math.log(2)) + 1e-6


def test_a_row_of_noise_is_its_samples_alone(backend, device):
    ids = ids_like(50, device)
    noise = philox_normal(4, ids, 20, backend=backend)
    order = torch.randperm(50).to(device)
    assert torch.equal(philox_normal(4, ids[order], 20, backend=backend), noise[order])
    assert torch.equal(philox_normal(4, ids[17:18], 20, backend=backend), noise[17:18])
    assert torch.equal(philox_normal(4, ids.view(5, 10, 3), 20, backend=backend), noise.view(5, 10, 20))
    assert torch.equal(philox_normal(4, ids, 8, backend=backend), noise[:, :8])


def grid_ids(epochs: int, samples: int, positions: int) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.int32) for n in (epochs, samples, positions)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def test_normals_are_normal():
    noise = philox_normal(2, grid_ids(4, 64, 64), 64, backend="torch").double().flatten()
    n = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(noise.sort().values)
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2 / math.sqrt(n)  # Kolmogorov: exceeded with probability 7e-4


def test_neighbours_are_uncorrelated():
    noise = philox_normal(2, grid_ids(2, 64, 64), 64, backend="torch").double()  # [epoch, sample, position, column]
    other = philox_normal(noise_key(2, 1), grid_ids(2, 64, 64), 64, backend="torch").double()
    pairs = {
        "column": (noise[..., :-1], noise[..., 1:]),
        "Box-Muller pair": (noise[..., ::2], noise[..., 1::2]),
        "call": (noise[..., :-4], noise[..., 4:]),
        "position": (noise[:, :, :-1], noise[:, :, 1:]),
        "sample": (noise[:, :-1], noise[:, 1:]),
        "epoch": (noise[0], noise[1]),
        "stream": (noise, other),
    }
    for name, (a, b) in pairs.items():
        bound = 5 / math.sqrt(a.numel())
        assert abs((a * b).mean()) < bound, name
        assert abs((a.square() * b.square()).mean() - 1) < 8 * bound, name  # sd of (a b)^2 is sqrt(8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_a_cast_of_the_fp32_normals(device, dtype):
    ids = ids_like(9, device)
    noise = philox_normal(1, ids, 10, backend="torch")
    assert torch.equal(philox_normal(1, ids, 10, dtype=dtype, backend="torch"), noise.to(dtype))


def test_the_noise_is_written_once_and_little_is_read():
    ids = ids_like(100, torch.device("cpu"))
    with count_bytes() as traffic:
        noise = philox_normal(1, ids, 300, backend="triton")
    assert traffic.stored == noise.nbytes
    assert within(traffic.total, ids.nbytes + noise.nbytes)


def test_no_rows_or_no_columns(backend, device):
    assert philox_normal(1, ids_like(0, device), 8, backend=backend).shape == (0, 8)
    assert philox_normal(1, ids_like(3, device), 0, backend=backend).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**64}, "seed: expected a 64-bit"),
        ({"seed": 1.5}, "seed: expected an int"),
        ({"seed": True}, "seed: expected an int"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected an int or a one-element int64 tensor, got"),
        ({"seed": torch.zeros(1)}, "seed: expected an int or a one-element int64 tensor, got torch.float32"),
        ({"noise_ids": torch.zeros(4, 3, dtype=torch.int64)}, "noise_ids: expected torch.int32, got torch.int64"),
        ({"noise_ids": torch.zeros(4, 2, dtype=torch.int32)}, "noise_ids: expected shape"),
        ({"noise_ids": torch.zeros((), dtype=torch.int32)}, "noise_ids: expected shape"),
        ({"columns": -1}, "columns: expected 0 or more, got -1"),
        ({"dtype": torch.int32}, "dtype: expected a floating-point dtype, got torch.int32"),
        ({"backend": "cuda"}, "backend: expected 'auto', 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"seed": 1, "noise_ids": torch.zeros(4, 3, dtype=torch.int32), "columns": 4} | changes
    with pytest.raises(ValueError, match=message):
        philox_normal(**arguments)


def test_every_op_has_a_twin():
    containers = {
        "Dropout", "FoldedHead", "IBLoraGradients", "Latent", "Linear", "LoraProjection", "LoraShadow", "MlpShadow",
        "ObjectiveParts", "Tapped",
    }  # fmt: skip
    # host arithmetic, rounding; and what `ib_bottleneck` returns the first two fields of
    without = containers | {"fold_pays", "ib_bottleneck_latent", "refresh_shadows"}
    assert set(ibft_kernels.__all__) - without == set(reference.__all__)
