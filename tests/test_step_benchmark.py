"""How steps are judged and timed: the gate, a comparison, a process of its own. A GPU's figures rest on these."""

import json
import math
import re
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.result_rows import STEP_COLUMNS, append, read
from benchmarks.steps import real_data, step_comparison, step_gate, step_process, step_sweep
from benchmarks.steps.card import Peaks, ScriptFailed, hold_to, said_by, too_small, usable_gib
from benchmarks.steps.random_base import SHAPES
from benchmarks.steps.step_case import Base, shape_config
from benchmarks.steps.step_comparison import SIDES, StepComparison, StepProvider, step_flop, step_providers
from benchmarks.steps.step_gate import wrong_step
from benchmarks.steps.step_process import NAMES, measured
from benchmarks.steps.step_rows import Rows, batches_of, random_samples

CPU = torch.device("cpu")
TINY = Base.of("tiny")
V = SHAPES["tiny"]["vocab_size"]


def tiny_rows(*lengths):
    """A step of each length."""
    steps = [batches_of(random_samples(V, length, 1), shape_config(length))[0] for length in lengths]
    return Rows("one sample", steps)


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


@pytest.mark.skipif(not real_data.FILE.is_file(), reason="needs new_codealpaca.jsonl.gz (see IBFT_DATA)")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_real_rows_are_the_same_in_every_layout(kind):
    comparison = real_data.comparison(torch.device(kind), "qwen2.5-coder-1.5b")
    rows = {name: provider.rows for name, provider in comparison.providers.items()}
    assert rows["ours"] is rows["hf"]
    assert rows["ours, padded to longest"] is rows["hf, padded to longest"]
    assert rows["ours"].tokens == rows["hf, padded to longest"].tokens
    assert rows["ours"].padding < 0.01 < rows["hf, padded to longest"].padding < 0.8 < rows["released"].padding
    if kind == "cuda":
        assert rows["released"].tokens == rows["ours"].tokens
        assert max(int(batch.input_ids.max()) for batch in rows["ours"].batches) < comparison.base.sizes.vocab_size
    each = comparison.row("released")
    assert (each["provider"], each["layout"], each["T"], each["B"]) == ("released", "padded to 2048", 2048, 2)


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


@pytest.mark.parametrize("card_gib", [None, 8])
def test_a_process_is_told_its_card(card_gib, monkeypatch):
    given = []
    monkeypatch.setattr(step_process, "said_by", lambda _, *arguments: given.extend(arguments) or {"result": "ok"})
    step_process.step_process("tiny", "hf", 64, card_gib, CPU).measure(["hf"], CPU)
    assert given[given.index("--device") + 2 :] == ([] if card_gib is None else ["--card-gib", card_gib])


@pytest.mark.parametrize("name", SIDES)
def test_a_case_in_a_process_gives_a_row(name, in_here, monkeypatch):
    monkeypatch.setattr(step_comparison, "matmul_rate", lambda device, dtype: 1e12)
    gated_with, whole = [], step_process.wrong_step

    def gate(base, config, *rest):
        gated_with.append(config.ib.alpha)
        return whole(base, config, *rest)

    held, steps = [], step_process.measured
    monkeypatch.setattr(step_process, "wrong_step", gate)
    monkeypatch.setattr(step_process, "hold_to", lambda gib, device: held.append(gib))
    monkeypatch.setattr(step_process, "measured", lambda *a, **k: held.append("steps") or steps(*a, **k))
    comparison = step_process.step_process("tiny", name, 64, 8, CPU)
    (found,) = comparison.measure([name], CPU, rounds=2).values()
    assert ["--gate" in arguments for arguments in in_here] == ([True, False] if "ours" in name else [False])
    assert held == [8, "steps"]
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
