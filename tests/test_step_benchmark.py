"""The step benchmarks' own machinery, which a GPU's figures rest on: bases, baseline, gate, rounds, FLOP, rows."""

import json
import math
import re
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile, record_function

from benchmarks.harness.result_rows import STEP_COLUMNS, append, read
from benchmarks.steps import profile_step, real_data, step_comparison, step_gate, step_process, step_sweep
from benchmarks.steps.card import Peaks, ScriptFailed, hold_to, said_by, too_small, usable_gib
from benchmarks.steps.plain_loop import PlainBatch, PlainLoop, add_lora, cross_entropy, keep_weights_unpacked
from benchmarks.steps.profile_step import CATEGORIES, category_of, names_outwards, profiled, times_by_category
from benchmarks.steps.random_base import SHAPES, as_linear4bit, model_config, random_base, save_4bit, shape_of
from benchmarks.steps.step_case import Base, bundled_config, data_of, shape_config
from benchmarks.steps.step_comparison import SIDES, StepComparison, StepProvider, step_flop, step_providers
from benchmarks.steps.step_gate import wrong_step
from benchmarks.steps.step_process import NAMES, measured
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


def tiny_rows(*lengths):
    """A step of each length."""
    steps = [batches_of(random_samples(V, length, 1), shape_config(length))[0] for length in lengths]
    return Rows("one sample", steps)


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


# --- the gate -------------------------------------------------------------------------------------


def gated(base=TINY, *, alpha=0.1, length=64):
    config, data = shape_config(length, f"ib.alpha={alpha}"), random_samples(V, length, 1)
    return wrong_step(base, config, data, batches_of(data, config)[0][0], CPU)


@pytest.mark.parametrize("alpha", [0.1, 0])
def test_the_gate_passes_what_is_right(alpha):
    assert gated(alpha=alpha) == ""


class Wrong(Base):
    """A base whose trainer is broken."""

    def trainer(self, config, data, device):
        trainer = super().trainer(config, data, device)
        self.spoil(trainer)
        return trainer


class WrongLoss(Wrong):
    def spoil(self, trainer):
        trainer.objective.beta *= 1.01


class WrongDirection(Wrong):
    """The norm stays what it was."""

    def spoil(self, trainer):
        trainer.groups["lora"][3].register_hook(lambda gradient: -gradient)


class MissingGradient(Wrong):
    def spoil(self, trainer):
        trainer.groups["lora"][3].requires_grad_(False)


WRONG = {
    WrongLoss: "^loss: ours",
    WrongDirection: "^gradient of lora: off by",
    MissingGradient: "^gradient of lora: of .*lora_B.* on one side alone",
}


def test_the_gate_refuses_other_noise(monkeypatch):
    monkeypatch.setattr(step_gate, "philox_normal", lambda _seed, ids, Z: torch.zeros(len(ids), Z))
    assert gated().startswith("CE_z: ours")


def test_in_bf16_rounding_passes_and_no_more():
    """Norms are held tighter than directions, where rounding of one order of computing and another leaves more."""
    allowed = step_gate.ALLOWED[torch.bfloat16]
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def outcome(ce, gradient):
        return step_gate.Outcome({"CE": ce}, {"lora": {"A": gradient}})

    def said(ce, gradient):
        return step_gate.difference(outcome(ce, gradient), outcome(1.0, along), allowed).partition(":")[0]

    assert said(1.02, along + 0.05 * across) == ""
    assert said(1.04, along) == "CE"
    assert said(math.nan, along) == "CE"
    assert said(1.0, 1.05 * along) == "norm of the gradient of lora"
    assert said(1.0, 0.99 * along + 0.15 * across) == "gradient of lora"
    assert said(1.0, math.nan * along) == "norm of the gradient of lora"


def sides(base=TINY, *, length=64, **settings):
    config, data = shape_config(length), random_samples(V, length, 2)
    rows = Rows("one sample", batches_of(data, config))
    providers = step_providers(base, config, data, rows, data, rows)
    return StepComparison("step", base, torch.float32, providers, **settings)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_is_never_timed(wrong):
    comparison = sides(wrong("tiny", "tiny"))
    found = comparison.measure(["ours", "hf"], CPU, rounds=1)
    ours, hf = found["ours"], found["hf"]
    assert ours.result == "incorrect"
    assert re.search(WRONG[wrong], ours.note), ours.note
    assert (ours.times_ms, ours.peaks, comparison.rates(ours, CPU)) == ([], None, {})
    assert (hf.result, len(hf.times_ms), hf.ours_speedup) == ("ok", 1, None)  # nothing to be compared with


# --- a comparison ---------------------------------------------------------------------------------


class Fake:
    """A loop that takes no time; `ms` is what the clock is told of a step."""

    def __init__(self, ms=1.0, error=None):
        self.ms, self.error, self.taken = ms, error, 0

    def train_step(self, micro_batches):
        if self.error is not None:
            raise self.error
        self.taken += 1
        CLOCK.append(self.ms)


CLOCK = []


@pytest.fixture
def clock(monkeypatch):
    """Times of steps as the fakes tell them, five times as long from the third round on: the machine is busy then."""
    rounds = {}

    def timed_ms(calls, device):
        CLOCK.clear()
        for call in calls:
            call()
        (ms,) = CLOCK
        rounds[ms] = rounds.get(ms, 0) + 1
        return ms if rounds[ms] < 3 else 5 * ms

    monkeypatch.setattr(step_comparison, "timed_ms", timed_ms)
    monkeypatch.setattr(step_comparison, "peaks_mib", lambda prepare, device: (prepare()(), (1.5, 2.5))[1])
    monkeypatch.setattr(step_comparison, "matmul_rate", lambda device, dtype: 1e9)


def faked(**loops):
    """ours takes a step of 64 tokens; what is named `short` one of 16."""
    config, providers = shape_config(64), {}
    for name, loop in loops.items():
        rows = tiny_rows(16) if name == "short" else tiny_rows(64)
        run = loop if callable(loop) else lambda device, loop=loop: loop
        rounds = 3 if name == "short" else None
        providers[name] = StepProvider(run, name=name, config=config, rows=rows, rounds=rounds)
    return StepComparison("step", TINY, torch.float32, providers)


@pytest.mark.usefixtures("clock")
def test_times_are_of_a_real_token():
    comparison = faked(ours=Fake(10.0), short=Fake(30.0))
    found = comparison.measure(["ours", "short"], CPU, rounds=5)
    ours, short = found["ours"], found["short"]
    assert (len(ours.times_ms), len(short.times_ms)) == (5, 3)
    assert (ours.tokens, short.tokens) == ([64] * 5, [16] * 3)
    assert (ours.ours_speedup, short.ours_speedup) == (1, pytest.approx((30 / 16) / (10 / 64)))
    assert ours.peaks == (1.5, 2.5)
    rates = comparison.rates(short, CPU)
    assert float(rates["tokens_per_s"]) == pytest.approx(16e3 / median(short.times_ms), rel=1e-3)
    flop = step_flop(TINY.sizes, 16, 16**2, 8, 32, again=True)
    per_s = 1e3 * flop / median(short.times_ms)
    assert float(rates["tflop_per_s"]) == pytest.approx(per_s / 1e12, rel=1e-3)
    assert float(rates["ceiling_share"]) == pytest.approx(per_s / 1e9, abs=1e-3)


@pytest.mark.usefixtures("clock")
def test_what_fails_is_a_row_and_ours_raises():
    def unbuilt(device):
        raise torch.OutOfMemoryError

    comparison = faked(ours=Fake(), large=unbuilt, grown=Fake(error=torch.OutOfMemoryError()),
                       broken=Fake(error=TypeError("no such\nthing")))  # fmt: skip
    found = comparison.measure([*comparison.providers], CPU, rounds=2)
    assert {name: (one.result, one.note, len(one.times_ms)) for name, one in found.items()} == {
        "ours": ("ok", "", 2), "large": ("out of memory", "", 0), "grown": ("out of memory", "", 0),
        "broken": ("failed", "TypeError: no such", 0),
    }  # fmt: skip
    with pytest.raises(TypeError, match="ours too"):
        faked(ours=Fake(error=TypeError("ours too"))).measure(["ours"], CPU)
    out = faked(ours=Fake(error=torch.OutOfMemoryError()), hf=Fake()).measure(["ours", "hf"], CPU, rounds=2)
    assert (out["ours"].result, out["hf"].result, out["hf"].ours_speedup) == ("out of memory", "ok", None)


@pytest.mark.usefixtures("clock")
def test_providers_that_run_alike_share_a_loop():
    made = []

    def run(device):
        made.append(Fake())
        return made[-1]

    comparison = faked(hf=run, short=run)
    comparison.measure(["hf", "short"], CPU, rounds=2)
    assert len(made) == 1


def test_whole_steps_give_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.result_rows.RESULTS", tmp_path)
    monkeypatch.setattr(step_comparison, "matmul_rate", lambda device, dtype: 1e12)
    comparison = sides(rounds=2)
    found = comparison.measure(SIDES, CPU)
    rows = [comparison.row(name) | one.columns() | comparison.rates(one, CPU) for name, one in found.items()]
    written = read(append("cpu", "step", STEP_COLUMNS, rows))
    assert [(row["provider"], row["alpha"]) for row in written] == [
        ("ours", "0.1"), ("hf", "0.1"), ("ours", "0"), ("hf", "0")
    ]  # fmt: skip
    for name, row in zip(SIDES, written, strict=True):
        assert (row["result"], row["rounds"], row["N"], row["T"], row["B"], row["L"], row["V"]) == (
            "ok", "2", "64", "64", "1", "3", "507"
        )  # fmt: skip
        assert float(row["tokens_per_s"]) == pytest.approx(64e3 / median(found[name].times_ms), rel=0.01)
        assert 0 < float(row["peak_mib"]) < 100
        assert float(row["ours_speedup"]) > 0
        assert float(row["ceiling_share"]) > 0
    assert len({comparison.key(CPU), sides(length=32).key(CPU), comparison.key(torch.device("cuda"))}) == 3


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_sweeps_change_one_size_at_a_time(kind):
    base = step_sweep.comparison(kind)
    points = [step_sweep.comparison(kind, *case) for case in step_sweep.CASES[kind]]
    assert {*base.providers} == {*SIDES}
    device = torch.device(kind)
    assert len({point.key(device) for point in (base, *points)}) == len(points) + 1
    first = base.row("ours")
    for (name, value), point in zip(step_sweep.CASES[kind], points, strict=True):
        assert {*point.providers} == {"ours", "hf"}
        for side in point.providers:
            row = point.row(side)
            assert {column for column in row if row[column] != first[column]} - {"provider"} == (
                {name, "N"} if name in ("T", "B") else {name}
            )
            # the first token of a sample is never a label
            assert float(row[name]) == pytest.approx(value, abs=0.0101)


@pytest.mark.skipif(not real_data.FILE.is_file(), reason="needs code_alpaca_2k.json.gz (see IBFT_DATA)")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_real_rows_are_the_same_in_every_layout(kind):
    comparison = real_data.comparison(torch.device(kind), "qwen2.5-coder-1.5b")
    rows = {name: provider.rows for name, provider in comparison.providers.items()}
    assert rows["ours"] is rows["hf"]
    assert rows["ours"].tokens == rows["hf, padded to longest"].tokens
    assert rows["ours"].padding < 0.01 < rows["hf, padded to longest"].padding < 0.8 < rows["released"].padding
    if kind == "cuda":
        assert rows["released"].tokens == rows["ours"].tokens
        assert max(int(batch.input_ids.max()) for batch in rows["ours"].batches) < comparison.base.sizes.vocab_size
    each = comparison.row("released")
    assert (each["provider"], each["layout"], each["T"], each["B"]) == ("released", "padded to 2048", 2048, 2)


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


# --- a process of its own -------------------------------------------------------------------------


@pytest.fixture
def in_here(monkeypatch, capsys):
    """Processes run in this one, with the arguments they would be given; which are kept."""
    given = []

    def said_by(script, *arguments):
        given.append([str(one) for one in arguments])
        monkeypatch.setattr("sys.argv", [str(script), *given[-1]])
        step_process.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(step_process, "said_by", said_by)
    step_process.gate_process.cache_clear()
    yield given
    step_process.gate_process.cache_clear()


@pytest.mark.parametrize("name", SIDES)
def test_a_case_in_a_process_gives_a_row(name, in_here, monkeypatch):
    monkeypatch.setattr(step_comparison, "matmul_rate", lambda device, dtype: 1e12)
    gated_with, whole = [], step_process.wrong_step

    def gate(base, config, *rest):
        gated_with.append(config.ib.alpha)
        return whole(base, config, *rest)

    monkeypatch.setattr(step_process, "wrong_step", gate)
    comparison = step_process.step_process("tiny", name, 64, 8, CPU)
    (found,) = comparison.measure([name], CPU, rounds=2).values()
    assert ["--gate" in arguments for arguments in in_here] == ([True, False] if "ours" in name else [False])
    assert gated_with == ([comparison.providers[name].config.ib.alpha] if "ours" in name else [])
    assert (found.result, found.tokens, len(found.times_ms)) == ("ok", [64, 64], 2)
    row = comparison.row(name) | found.columns() | comparison.rates(found, CPU)
    assert not row.keys() - {*STEP_COLUMNS}
    assert (row["provider"], row["alpha"], row["card_gib"]) == (
        name.partition(",")[0],
        "0" if "alpha" in name else "0.1",
        8,
    )
    assert float(row["tokens_per_s"]) == pytest.approx(64e3 / median(found.times_ms), rel=0.01)
    assert "ours_speedup" not in row


def test_a_wrong_step_is_not_measured_in_a_process(in_here, monkeypatch):
    monkeypatch.setattr(step_gate, "philox_normal", lambda _seed, ids, Z: torch.zeros(len(ids), Z))
    comparison = step_process.step_process("tiny", "ours", 64, None, CPU)
    found = comparison.measure(["ours"], CPU)["ours"]
    assert (found.result, found.times_ms) == ("incorrect", [])
    assert found.note.startswith("CE_z: ours")
    assert len(in_here) == 1


@pytest.mark.parametrize("way", ["here", "in a process"])
def test_what_cannot_be_gated_is_not_timed(way, in_here, monkeypatch):
    def wrong_step(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step_process if way == "in a process" else step_comparison, "wrong_step", wrong_step)
    comparison = sides() if way == "here" else step_process.step_process("tiny", "ours", 64, None, CPU)
    found = comparison.measure(["ours"], CPU)["ours"]
    assert (found.result, found.times_ms, found.peaks) == ("reference out of memory", [], None)
    assert len(in_here) == (way == "in a process")


def test_out_of_memory_in_a_process_is_a_row():
    comparison = step_process.step_process("tiny", "hf", 64, 8, CPU)
    for run in (Fake(error=torch.OutOfMemoryError()), None):
        provider = replace(
            comparison.providers["hf"], run=lambda device, run=run: run or raised(torch.OutOfMemoryError)
        )
        found = measured(provider, TINY, CPU, warmup=1, rounds=2)
        assert (found.result, found.times_ms, comparison.rates(found, CPU)) == ("out of memory", [], {})
    provider = replace(comparison.providers["hf"], run=lambda device: Fake(error=TypeError()))
    with pytest.raises(TypeError):
        measured(provider, TINY, CPU, warmup=1, rounds=2)


def raised(error):
    raise error


def test_a_process_that_fails_is_a_row_but_for_ours(monkeypatch):
    def said_by(*_):
        raise ScriptFailed("KeyError: 'q'\nTraceback ...")

    monkeypatch.setattr(step_process, "said_by", said_by)
    monkeypatch.setattr(step_process, "gate_process", lambda *_: "")
    found = step_process.step_process("tiny", "hf", 64, None, CPU).measure(["hf"], CPU)["hf"]
    assert (found.result, found.note) == ("failed", "ScriptFailed: KeyError: 'q'")
    with pytest.raises(ScriptFailed, match="KeyError"):
        step_process.step_process("tiny", "ours", 64, None, CPU).measure(["ours"], CPU)


def test_unsloth_is_left_out_where_it_cannot_run():
    provider = step_process.step_process("tiny", "unsloth", 64, None, CPU).providers["unsloth"]
    assert provider.obstacle(CPU) == "unsloth has GPU kernels only"
    assert provider.config.ib.alpha == 0
    assert {"unsloth"} == {*NAMES} - {*SIDES}


def test_what_a_script_says(tmp_path, monkeypatch):
    script = tmp_path / "said.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script.write_text("import sys; print('noise'); print('[1, \"' + sys.argv[1] + '\"]')")
    assert said_by("said", 2) == [1, "2"]
    script.write_text("raise KeyError('q')")
    with pytest.raises(ScriptFailed, match=r"^KeyError: 'q'\n(.*\n)*Traceback"):
        said_by("said")


def test_a_card_is_held_to_its_size(monkeypatch):
    held, total = [], int(79.1 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def hold(share, index):
        assert index == 3  # a device without an index is refused
        held.append(share * 79.1)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", hold)
    cuda = torch.device("cuda")
    assert too_small(96, cuda) == "this card has less than 96 GiB"
    assert [too_small(gib, cuda) for gib in (None, 8, 80)] == [None] * 3  # the last has less than its name says
    for gib in (8, 80, None):
        hold_to(gib, cuda)
    assert held == [pytest.approx(7.4, abs=0.01), pytest.approx(78.5, abs=0.01)]
    assert (usable_gib(8, cuda), usable_gib(80, cuda)) == (8, pytest.approx(79.1))
    assert (too_small(1000, CPU), usable_gib(1000, CPU), hold_to(8, CPU), Peaks(CPU).read()) == (None, 1000, None, None)


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
