"""What importing the package costs and needs; each in a fresh interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from ibft_kernels import _dispatch
from ibft_kernels._dispatch import resolve_backend


def run(code: str, **environment: str) -> str:
    base = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=base | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_no_model_library():
    code = "from ibft_kernels import ib_kl_loss, reference; import sys; print([m for m in sys.modules if '.' not in m])"
    loaded = run(code)
    assert "'torch'" in loaded
    for name in ("transformers", "peft", "bitsandbytes", "accelerate", "datasets", "ibft"):
        assert f"'{name}'" not in loaded


def test_works_without_triton():
    code = """
import sys, torch
sys.modules["triton"] = None
from ibft_kernels import ib_kl_loss, philox_dropout
z, kl = ib_kl_loss(torch.zeros(4, 8), torch.zeros(4, 8), seed=1)
assert kl == 0 and z.std() > 0.5
try:
    philox_dropout(z, 0.5, seed=1, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "backend='triton' cannot run here: triton is not installed"


def test_cpu_tensors_take_torch_unless_interpreted():
    code = """
import torch
from ibft_kernels._dispatch import resolve_backend
print(resolve_backend("auto", torch.device("cpu")))
try:
    resolve_backend("triton", torch.device("cpu"))
except RuntimeError as error:
    print(error)
"""
    first, *error = run(code).splitlines()
    assert first == "torch"
    assert "TRITON_INTERPRET=1 was not set" in "".join(error)
    assert run(code, TRITON_INTERPRET="1") == "triton"


def test_cuda_tensors_take_triton():
    assert resolve_backend("auto", torch.device("cuda")) == "triton"
    assert resolve_backend("torch", torch.device("cuda")) == "torch"


def test_other_devices_take_torch(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    assert resolve_backend("auto", torch.device("mps")) == "torch"
    with pytest.raises(RuntimeError, match="no Triton path for mps"):
        resolve_backend("triton", torch.device("mps"))
