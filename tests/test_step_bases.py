"""What step benchmarks run on, and what a step is made of: bases, rows of tokens, FLOP, the profile."""

import pytest
import torch
from torch.profiler import profile, record_function

from benchmarks.harness.result_rows import read
from benchmarks.steps import profile_step
from benchmarks.steps.plain_loop import PlainBatch, PlainLoop, add_lora, cross_entropy, keep_weights_unpacked
from benchmarks.steps.profile_step import CATEGORIES, category_of, names_outwards, profiled, times_by_category
from benchmarks.steps.random_base import SHAPES, as_linear4bit, model_config, random_base, save_4bit, shape_of
from benchmarks.steps.step_case import Base, bundled_config, data_of, shape_config
from benchmarks.steps.step_comparison import step_flop
from benchmarks.steps.step_rows import Rows, batches_of, in_pairs, padded, random_samples, regrouped, squares, typical
from ibft.nf4 import NF4Linear

CPU = torch.device("cpu")
TINY = Base.of("tiny")
V = SHAPES["tiny"]["vocab_size"]

# parameters in billions, from each model's page
PUBLISHED = {
    "deepseek-coder-7b": 6.91, "codellama-7b": 6.74, "llama3-8b": 8.03, "qwen2.5-coder-1.5b": 1.54, "34b": 33.74,
    "70b": 70.55,
}  # fmt: skip


def tiny_base():
    return random_base("tiny", dtype=torch.float32, device=CPU)


# --- bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_are_the_published_ones(shape):
    from transformers import AutoModelForCausalLM

    assert {*PUBLISHED} == {*SHAPES} - {"tiny"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(shape))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[shape], abs=0.006)


def test_a_shape_takes_other_sizes_and_refuses_what_it_has_not():
    base = random_base(shape_of("tiny", num_hidden_layers=1, vocab_size=40), dtype=torch.float32, device=CPU)
    assert (len(base.model.layers), base.lm_head.out_features) == (1, 40)
    assert base.config.hidden_size == SHAPES["tiny"]["hidden_size"]
    with pytest.raises(ValueError, match="got layers, expected some of model_type, vocab_size"):
        shape_of("tiny", layers=1)


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
    config, data = shape_config(96), random_samples(V, 96, 2)
    trainer = TINY.trainer(config, data, CPU)
    row = trainer.train_step(batches_of(data, config)[0])
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


def test_labels_are_shifted_once():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, -100, 6]])
    predicted = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0], logits[1, 1], logits[1, 3]])
    expected = torch.nn.functional.cross_entropy(predicted, torch.tensor([3, 4, 1, 2, 6]))
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


# --- rows of tokens -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    config = bundled_config()
    data = data_of(config)
    return config, data, batches_of(data, config)[:3]


def test_layouts_hold_the_same_samples(bundled):
    config, data, steps = bundled
    groups = regrouped(steps, data, config)
    assert len(groups) == len(steps)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    packed, longest = Rows("packed", steps), Rows("padded", [[padded(group)] for group in groups])
    to_2048 = Rows("padded", [[padded(pair, 2048) for pair in in_pairs(group)] for group in groups])
    ids = [
        sorted(id for batch in rows.batches for id in batch.input_ids[batch.kl_mask].tolist())
        for rows in (packed, longest, to_2048)
    ]
    assert ids[0] == ids[1] == ids[2]
    assert packed.padding < 0.1 < longest.padding < 0.5 < 0.9 < to_2048.padding
    assert packed.tokens == longest.tokens == to_2048.tokens
    lengths = [len(sample.input_ids) for group in groups for _, sample in group]
    for rows in (packed, longest, to_2048):
        assert sum(map(squares, rows.batches)) == sum(n * n for n in lengths)
    assert (packed.columns["T"], packed.columns["B"]) == (512, 4)
    assert (longest.columns["T"], longest.columns["B"]) == (max(lengths), max(sizes))
    assert (to_2048.columns["T"], to_2048.columns["B"]) == (2048, 2)


def test_typical_samples_cost_what_all_cost(bundled):
    config, data, steps = bundled
    groups = regrouped(steps, data, config)
    lengths = [len(sample.input_ids) for group in groups for _, sample in group]
    chosen = [len(sample.input_ids) for _, sample in typical(groups, 8)]
    assert sum(chosen) / 8 == pytest.approx(sum(lengths) / len(lengths), rel=0.05)


def test_what_is_labelled_is_what_was_asked_for():
    for share in (0.1, 0.5, 1.0):
        rows = Rows("one sample", batches_of(random_samples(V, 100, 2, labelled=share), shape_config(100)))
        assert float(rows.columns["labelled"]) == pytest.approx(min(share, 0.99), abs=0.005)


# --- FLOP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [True, False])
def test_flop_are_those_that_torch_counts(checkpointed):
    """On a dense model, whose products torch sees: eager attention, so its scores are whole, not causal halves."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    N, R = 64, 8
    config = shape_config(
        N, f"lora.r={R}", "ib.alpha=0", "train.optim=adamw_torch_fused",
        f"train.gradient_checkpointing={str(checkpointed).lower()}",
    )  # fmt: skip
    sizes = model_config("tiny")
    base = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager").requires_grad_(False)
    loop = PlainLoop(add_lora(base, config), config, None, dtype=torch.float32)
    ((batch,),) = batches_of(random_samples(V, N, 1), config)
    with FlopCounterMode(display=False) as counter:
        loop.train_step([PlainBatch.of(batch)])
    counts = counter.get_flop_counts()["Global"]

    def flop(squared, labels):
        return step_flop(sizes, N, squared, labels, R, again=checkpointed)

    causal = flop(N * N, N) - flop(0, N)
    assert counts[torch.ops.aten.bmm] == pytest.approx(2 * causal, rel=0.05)
    assert sum(counts.values()) == pytest.approx(flop(0, N) + 2 * causal, rel=0.01)


# --- the profile ----------------------------------------------------------------------------------


def test_the_profile_adds_up():
    trainer = TINY.trainer(shape_config(96), random_samples(V, 96, 4), CPU)
    totals, wall_ms, _ = profiled(trainer, steps=1, warmup=1)
    assert tuple(totals) == CATEGORIES
    assert sum(totals.values()) == pytest.approx(1e3 * wall_ms)
    assert all(us > 0 for us in totals.values()), totals
    assert totals["other"] < 0.5 * sum(totals.values())


def test_the_profile_gives_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.result_rows.RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    profile_step.main(["--shape", "tiny", "--length", "64", "--steps", "1", "ib.alpha=0"])
    (path,) = tmp_path.glob("*/profile.csv")
    rows = read(path)
    assert [row["category"] for row in rows] == [*CATEGORIES]
    assert {(row["model"], row["alpha"], row["result"], row["steps"]) for row in rows} == {("tiny", "0", "ok", "1")}
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)


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
