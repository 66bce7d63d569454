"""Ahead-of-time compilation: every kernel on every architecture, with no GPU and no spill."""

import os
import subprocess
import sys

import pytest

from ibft_kernels import _aot_cases, _launch, aot

pytest.importorskip("triton", reason="Triton has no build for this platform")


EVERY = (75, 80, 86, 89, 90, 100, 120)


def test_every_kernel_compiles_for_every_architecture(soaking, tmp_path):
    """The command as it is run by hand, every shipped launch shape. `make soak`: every dtype on every architecture;
    otherwise bf16 on the oldest, fp16 on Hopper.
    """
    parts = [(aot.DTYPES, EVERY)] if soaking else [(("bf16",), (75,)), (("fp16",), (90,))]
    table, expected = [], set()
    for dtypes, architectures in parts:
        table += compiled_table(tmp_path, dtypes, architectures)
        expected |= {
            (name, dtype, f"sm_{arch}")
            for name, case in _aot_cases.CASES.items()
            for dtype in [d for d in dtypes if d in case.dtypes] or case.dtypes
            for arch in architectures
        }
    assert {tuple(row[:3]) for row in table} == expected
    assert {row[0] for row in table} == set(_aot_cases.CASES)
    for kernel, _, arch, registers, local_bytes, *_ in table:
        assert 16 <= int(registers) <= 255, (kernel, arch)
        if not _aot_cases.CASES[kernel].dot:
            assert int(registers) <= 128, (kernel, arch, "two blocks of 256 threads must fit an SM")
        assert int(local_bytes) == 0, (kernel, arch)
    for kernel, dtype, arch, *_, mma, _ in table:
        if kernel in ("ib_lora_backward", "ib_lora_backward:widest") and dtype != "fp32" and arch != "sm_75":
            assert int(mma) <= 1.1 * least_mma(kernel, dtype, arch), (kernel, arch, "warps repeat each other's work")


def compiled_table(folder, dtypes, architectures) -> list[list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # another test runs beside it
    command = ["--processes", processes, "--dtype", *dtypes, "--arch", *map(str, architectures)]
    done = subprocess.run(
        [sys.executable, "-m", "ibft_kernels.aot", *command],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()[1:-1]]


def least_mma(kernel: str, dtype: str, arch: str) -> float:
    """Of 16 x 8 x 16, a warp: what the tiles of the fused LoRA+IB backward need if each is computed once."""
    case = _aot_cases.CASES[kernel]
    shape = _launch.stored_shape(arch, _launch.shape_key(case.launch, arch, aot.TORCH_DTYPES[dtype]))
    rank = case.arguments(f"*{dtype}", shape)["BLOCK_R"]
    rows, columns = shape["BLOCK_N"] / 16, shape["BLOCK_D"]
    per_tile = rows * (columns / 8) * (2 * shape["BLOCK_Z"] / 16) + rows * (rank / 8) * (columns / 16)
    return per_tile / shape["num_warps"]


FINE = {"registers": 64, "shared_bytes": 32 << 10, "tensor_cores": 32, "wide_loads": 4}


@pytest.mark.parametrize(
    ("dtype", "arch", "changes", "fault"),
    [
        ("fp16", 89, {}, ""),
        ("fp16", 89, {"local_bytes": 8}, "local memory"),
        ("fp16", 89, {"error": "CompilationError: no"}, "CompilationError: no"),
        ("fp16", 89, {"shared_bytes": 99 << 10}, ""),
        ("fp16", 89, {"shared_bytes": (99 << 10) + 1}, "over 101376 B of shared memory"),
        ("fp16", 90, {"shared_bytes": (99 << 10) + 1}, ""),
        ("bf16", 80, {"tensor_cores": 0}, "no tensor cores"),
        ("bf16", 75, {"tensor_cores": 0}, ""),
        ("fp32", 90, {"tensor_cores": 0}, ""),
        ("fp32", 90, {"wide_loads": 0}, "no wide loads"),
        ("fp16", 80, {"wide_loads": 0, "local_bytes": 8}, "local memory; no wide loads"),
    ],
)
def test_what_fails_a_row_and_the_command(monkeypatch, capsys, dtype, arch, changes, fault):
    monkeypatch.setattr(aot, "INTERPRETED", False)
    monkeypatch.setitem(_aot_cases.CASES, "k", _aot_cases.Case(None, "k", lambda *_: {}, dot=True))
    monkeypatch.setattr(aot, "compile_all", lambda *_: iter([aot.Row("k", dtype, arch, **FINE | changes)]))
    assert aot.main([]) == bool(fault)
    out = capsys.readouterr().out.splitlines()
    assert out[1].endswith(f"  {fault}" if fault else str((FINE | changes)["wide_loads"]))
    assert out[2] == f"1 compiled, {int(bool(fault))} failed"


def test_the_patterns_find_instructions_in_ptx():
    tensor_core = """
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 };
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 { %r1 }, %rd1;
        tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1;
        wgmma.commit_group.sync.aligned;
    """
    assert len(aot.TENSOR_CORE.findall(tensor_core)) == 3
    wide = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd1 + 0 ];
        @%p1 ld.global.v8.b32 { %r1 }, [ %rd1 + 0 ];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;
        @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        st.global.v4.b32 [ %rd1 + 0 ], { %r1 };
    """
    assert len(aot.WIDE_LOAD.findall(wide)) == 4


def test_every_architecture_has_a_limit():
    assert set(aot.SHARED_LIMITS) == set(_launch.ARCHITECTURES)


def test_refuses_under_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    assert aot.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
