"""The step benchmarks' own machinery, which a GPU's figures rest on: bases, baseline, gate, FLOP count, profile."""

import pytest
import step_case
import torch
from plain_loop import cross_entropy, keep_weights_unpacked
from profile_step import CATEGORIES, category_of, names_outwards, profiled, times_by_category
from random_base import SHAPES, as_linear4bit, model_config, random_base, save_4bit
from result_rows import write_row
from step_case import check_shape, random_data, run_case, shape_config, shape_trainer, step_columns, step_flop
from torch.profiler import profile, record_function

from ibft.nf4 import NF4Linear

CPU = torch.device("cpu")

# parameters in billions, from each model's page
PUBLISHED = {
    "deepseek-coder-7b": 6.91, "codellama-7b": 6.74, "llama3-8b": 8.03, "qwen2.5-coder-1.5b": 1.54, "34b": 33.74,
    "70b": 70.55,
}  # fmt: skip


def tiny_base():
    return random_base("tiny", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_are_the_published_ones(shape):
    from transformers import AutoModelForCausalLM

    assert {*PUBLISHED} == {*SHAPES} - {"tiny"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(shape))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[shape], abs=0.006)


def test_a_random_base_is_in_four_bits_and_alike_for_a_seed():
    base, again = tiny_base(), tiny_base()
    layers = [module for module in base.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 7 * base.config.num_hidden_layers
    assert not any(parameter.requires_grad for parameter in base.parameters())
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for layer in layers:
        weight = layer.dequantize(torch.float32)
        assert weight.std() == pytest.approx(layer.in_features**-0.5, rel=0.1)
        assert weight.abs().amax() <= 1.3 * layer.offset * 1.001  # absmax stays within its 30 %


def test_a_trainer_steps_on_a_random_base():
    config = shape_config(96)
    trainer = shape_trainer("tiny", config, random_data("tiny", 96, 2), CPU, torch.float32)
    row = trainer.train_step(next(iter(trainer.batches(trainer.data, epoch=0))))
    assert torch.isfinite(row["parts"].loss)
    assert 0 < row["parts"].kl < 100
    assert all(0 < norm < 1e3 for norm in row["norms"].values())


def test_the_baseline_reads_the_same_bytes_also_from_a_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(34).view(2, 17)
    with torch.no_grad():
        expected = tiny_base()(ids).logits
        theirs = as_linear4bit(tiny_base(), torch.float32)
        assert torch.equal(theirs(ids).logits, expected)
        save_4bit(theirs, str(tmp_path))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": CPU})
        assert torch.equal(keep_weights_unpacked(loaded)(ids).logits, expected)


def test_the_gate_passes_and_can_fail(monkeypatch):
    pairs = check_shape("tiny", CPU, length=64)
    assert {*pairs} == {"CE", "KL", "CE_z", "gradient of lora", "gradient of bottleneck"}
    monkeypatch.setattr(step_case, "philox_normal", lambda _seed, ids, Z: torch.zeros(len(ids), Z))
    with pytest.raises(AssertionError, match="CE_z: ours"):
        check_shape("tiny", CPU, length=64)


def test_labels_are_shifted_once():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, -100, 6]])
    predicted = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0], logits[1, 1], logits[1, 3]])
    expected = torch.nn.functional.cross_entropy(predicted, torch.tensor([3, 4, 1, 2, 6]))
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("provider", ["ours", "ours, alpha = 0", "hf", "hf, alpha = 0"])
def test_a_case_gives_a_row(provider):
    columns, times = run_case("tiny", provider, 64, CPU, card_gib=None, warmup=1, rounds=2)
    assert list(columns) == list(step_columns())
    assert len(times) == columns["rounds"] == 2
    assert columns["N"] == columns["T"] == 64
    assert columns["alpha"] == (0 if provider.endswith("alpha = 0") else 0.1)
    assert float(columns["tokens_per_s"]) == pytest.approx(64 / (sum(times) / 2e3), rel=0.01)


def test_out_of_memory_is_a_row(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step_case, "shape_step", run_out)
    columns, times = run_case("tiny", "hf, alpha = 0", 64, CPU, card_gib=8, warmup=1, rounds=2)
    assert (columns["result"], columns["alpha"], columns["tokens_per_s"], times) == ("out of memory", 0, "", [])


def test_flop_are_those_that_torch_counts():
    """On a dense model, whose products torch sees: eager attention, so its scores are whole, not causal halves."""
    from plain_loop import PlainBatch, PlainLoop, add_lora
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    N, R = 64, 8
    config = shape_config(N, f"lora.r={R}", "ib.alpha=0", "train.optim=adamw_torch_fused")
    base = AutoModelForCausalLM.from_config(model_config("tiny"), attn_implementation="eager").requires_grad_(False)
    loop = PlainLoop(add_lora(base, config), config, None, dtype=torch.float32)
    ((batch,),) = step_case.batches_of(random_data("tiny", N, 1), config)
    with FlopCounterMode(display=False) as counter:
        loop.train_step([PlainBatch.of(batch)])
    counts = counter.get_flop_counts()["Global"]
    causal = step_flop("tiny", N, N, N, R) - step_flop("tiny", N, 0, N, R)
    assert counts[torch.ops.aten.bmm] == pytest.approx(2 * causal, rel=0.05)
    assert sum(counts.values()) == pytest.approx(step_flop("tiny", N, 0, N, R) + 2 * causal, rel=0.01)


def test_rows_of_other_columns_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("result_rows.RESULTS", tmp_path)
    write_row("bench", CPU, [3.0, 1.0, 2.0], op="step")
    (path,) = tmp_path.glob("*/bench.csv")
    assert path.read_text().splitlines()[1].startswith("step,2.000,1.000,3.000,cpu-")
    with pytest.raises(ValueError, match="got columns op, N, "):
        write_row("bench", CPU, [1.0], op="step", N=1)


def test_the_profile_adds_up():
    config = shape_config(96)
    trainer = shape_trainer("tiny", config, random_data("tiny", 96, 4), CPU, torch.float32)
    totals, wall_ms, _ = profiled(trainer, steps=1, warmup=1)
    assert tuple(totals) == CATEGORIES
    assert sum(totals.values()) == pytest.approx(1e3 * wall_ms)
    assert all(us > 0 for us in totals.values()), totals
    assert totals["other"] < 0.5 * sum(totals.values())


@pytest.mark.parametrize(
    ("category", "names"),
    [
        ("products", ["aten::mm", "aten::matmul", "_LoraMlp"]),
        ("head", ["aten::mm", "ibft_kernels::linear_cross_entropies", "range: bottleneck"]),
        ("head", ["aten::mm", "MmBackward0", "range: head"]),
        ("bottleneck", ["aten::add_", "ibft_kernels::ib_lora_backward", "_IBLoraMlpBackward"]),
        ("products", ["aten::mm", "_IBLoraMlpBackward"]),
        ("dropout/noise", ["aten::mul_", "ibft_kernels::philox_dropout", "_SharedInput"]),
        ("dequantisation", ["bitsandbytes::dequantize_blockwise", "_SharedInput"]),
        ("dequantisation", ["nf4_dequantize_kernel", "ibft_kernels::nf4_dequantize_"]),
        ("attention", ["aten::bmm", "_SegmentAttentionBackward"]),
        ("attention", ["aten::_scaled_dot_product_flash_attention_for_cpu"]),
        ("element-wise", ["aten::mul", "ibft_kernels::rms_norm"]),
        ("element-wise", ["Memcpy DtoD (Device -> Device)", "aten::copy_"]),
        ("data", ["Memcpy HtoD (Pinned -> Device)", "aten::copy_", "aten::to"]),
        ("optimizer", ["aten::mul_", "Optimizer.step#AdamW.step"]),
        ("other", ["aten::view", "aten::mm"]),
        ("other", ["_LoraMlp"]),
    ],
)
def test_the_nearest_scope_decides(category, names):
    assert category_of(names) == category


def test_a_backward_outside_its_range_counts_for_it():
    """As on a GPU, where autograd's own thread runs it."""
    x, w = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    with profile() as profiler:
        y = x @ w
        with record_function("range: head"):
            loss = (y @ w).sum()
        loss.backward()
    events = profiler.events()
    outside = [e for e in events if e.name == "aten::mm" and any("MmBackward" in n for n in names_outwards(e))]
    assert len(outside) == 3  # dw and dy of the second product, dw of the first
    totals = times_by_category(events, 1e6, on_gpu=False)
    products = [e.self_cpu_time_total for e in events if e.name == "aten::mm" and e not in outside]
    assert products[0] < totals["products"] < sum(e.self_cpu_time_total for e in events if e.name == "aten::mm")
    assert totals["head"] >= products[1] + sum(e.self_cpu_time_total for e in outside[:2])
