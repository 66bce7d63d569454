"""Ahead-of-time compilation: every kernel on every architecture, with no GPU and no spill."""

import os
import subprocess
import sys

import pytest

from ibft_kernels import aot

pytest.importorskip("triton", reason="Triton has no build for this platform")


def test_every_kernel_compiles_for_every_architecture(tmp_path):
    """bf16 everywhere; `python -m ibft_kernels.aot` alone adds fp16 and fp32."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "ibft_kernels.aot", "--dtype", "bf16"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert {(row[0], row[2]) for row in table} == {
        (k, f"sm_{a}") for k in aot.KERNELS for a in (75, 80, 86, 89, 90, 100, 120)
    }
    for kernel, _, arch, registers, local_bytes, _ in table:
        assert 16 <= int(registers) <= 128, (kernel, arch, "two blocks of 256 threads must fit an SM")
        assert int(local_bytes) == 0, (kernel, arch)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (aot.Row("k", "fp32", 89, registers=64), 0),
        (aot.Row("k", "fp32", 89, registers=255, local_bytes=8), 1),
        (aot.Row("k", "fp32", 89, error="CompilationError: no"), 1),
    ],
)
def test_a_spill_or_an_error_fails_the_command(monkeypatch, capsys, row, status):
    monkeypatch.setattr(aot, "INTERPRETED", False)
    monkeypatch.setattr(aot, "compile_all", lambda *_: iter([row]))
    assert aot.main([]) == status
    assert f"1 compiled, {status} with a spill or an error" in capsys.readouterr().out


def test_refuses_under_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    assert aot.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
