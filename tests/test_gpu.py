"""The trainer on a CUDA device (`make gpu-test`): the same numbers as the CPU's, and the default run."""

import json

import pytest
import torch
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_trainer
from typer.testing import CliRunner

from ibft.nf4 import NF4Linear

pytestmark = pytest.mark.gpu
LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def gradient_on(folder, device, *overrides):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = tiny_trainer(folder, random_samples(LENGTHS), f"runtime.device={device}", "lora.dropout=0.3", *overrides)
    randomise_lora(trainer.model)
    trainer.model.train()
    parts = trainer.backward(next(trainer.batches(trainer.data, epoch=1)))
    return {name: value.cpu() for name, value in gradients(trainer).items()}, parts


def test_cuda_and_cpu_take_the_same_gradient(folder):
    """fp32, noise and dropout on: Triton kernels on the device against PyTorch on the host."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, _ = gradient_on(folder, "cpu")
    found, _ = gradient_on(folder, "cuda")
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_accumulation_is_exact_on_cuda(folder):
    torch.backends.cuda.matmul.allow_tf32 = False
    split = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=8"]
    whole = ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1"]
    common = ["data.packing=false", "train.gradient_checkpointing=true"]
    found, _ = gradient_on(folder, "cuda", *common, *split)
    expected, _ = gradient_on(folder, "cuda", *common, *whole)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "deepseek"])
def test_fused_equals_unfused_on_cuda(tmp_path, family, packing):
    """fp32, dropout on: keeping everything, making gate and up again, running blocks again, inputs on the host."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = save_tiny_model(tmp_path, family, std=0.08)
    common = [f"data.packing={packing}"]
    expected, _ = gradient_on(folder, "cuda", *common, "train.fused_kernels=false")
    for mode in ("false", "mlp", "true", "true train.activation_offloading=true"):
        found, _ = gradient_on(folder, "cuda", *common, *f"train.gradient_checkpointing={mode}".split())
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (mode, name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fused_is_as_near_the_truth_as_unfused_on_cuda(tmp_path, precision):
    folder = save_tiny_model(tmp_path, "qwen2", std=0.08)
    truth, _ = gradient_on(folder, "cuda", "train.fused_kernels=false")
    fused, native = (
        gradient_on(folder, "cuda", f"train.mixed_precision={precision}", f"train.fused_kernels={fused}")[0]
        for fused in (True, False)
    )

    def off(run):
        return sum(float((run[name] - value).norm() / value.norm()) for name, value in truth.items())

    assert off(fused) <= 1.1 * off(native)


def test_nf4_values_do_not_depend_on_the_device():
    layer = NF4Linear.quantize(torch.randn(96, 128))
    on_cpu = {dtype: layer.dequantize(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    layer.cuda()
    for dtype, value in on_cpu.items():
        assert torch.equal(layer.dequantize(dtype).cpu(), value)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_low_precision_trains(folder, precision, optim):
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS), "runtime.device=cuda", f"train.mixed_precision={precision}",
        f"train.optim={optim}", "train.max_steps=8", "train.gradient_checkpointing=true",
    )  # fmt: skip
    rows = []
    trainer.on_log = rows.append
    trainer.train()
    assert rows[-1]["ce"] < rows[0]["ce"] - 0.1


def test_the_default_run(tmp_path):
    from ibft.cli import app

    result = CliRunner().invoke(
        app, ["train", "runtime.device=cuda", "-o", str(tmp_path / "run")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    print(result.output)
    table = json.loads((tmp_path / "run/result.json").read_text())
    assert table["last"]["loss"] < table["first"]["loss"]
    assert table["pass_at_1"]["after"]["tasks"] == 128
