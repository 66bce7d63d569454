"""The ladder's search and its rungs, on a CPU: lengths that do not fit are made up."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.result_rows import append, key, read
from benchmarks.steps import ladder
from benchmarks.steps.card import ScriptFailed
from benchmarks.steps.ladder import CARDS_GIB, LADDER_COLUMNS, Rung, RungFound, climbed, longest
from benchmarks.steps.step_case import Base

CPU = torch.device("cpu")
TINY = Base.of("tiny")


def searched(limit, step=256, most=65536):
    """(what was found, what was asked)"""
    asked = []

    def fits(length):
        asked.append(length)
        return length <= limit

    return longest(fits, step, most), asked


@given(limit=st.integers(0, 200_000), step=st.sampled_from([1, 7, 256]), tops=st.integers(1, 600))
def test_the_longest_that_fits_is_found_in_few_calls(limit, step, tops):
    most = step * tops + step // 2  # need not be a multiple
    found, asked = searched(limit, step, most)
    largest, n = min(limit // step, tops), found // step
    assert found % step == 0
    assert n <= largest < n + max(1, n // 16) if n else largest == 0
    assert len(asked) == len({*asked})
    assert all(length % step == 0 and step <= length <= most for length in asked)
    # doubling up to the first that does not fit, then bisection between that and the last that did
    assert len(asked) <= (1 if n == 0 else 2 * math.floor(math.log2(n)) + 2)


@pytest.mark.parametrize(
    ("limit", "found", "asked"),
    [
        (0, 0, [256]),
        (255, 0, [256]),
        (256, 256, [256, 512]),
        (10**9, 65536, [256 * 2**i for i in range(9)]),
        (6000, 5888, [256, 512, 1024, 2048, 4096, 8192, 6144, 5120, 5632, 5888]),
    ],
)
def test_what_is_asked(limit, found, asked):
    assert searched(limit) == (found, asked)


# --- rungs ----------------------------------------------------------------------------------------


def test_ours_plans_for_the_card_and_the_baseline_recomputes():
    ours, hf = ladder.settings("ours", 512, 24), ladder.settings("hf", 512, 24)
    assert (ours.train.gradient_checkpointing, ours.runtime.memory_budget) == ("auto", 24)
    assert hf.train.gradient_checkpointing is True
    assert ours.data.max_length == hf.data.max_length == 512
    assert ours.ib.alpha == hf.ib.alpha > 0


@pytest.mark.parametrize("provider", ["ours", "hf"])
def test_a_rung_is_climbed_by_whole_steps(provider, monkeypatch):
    taken = []
    whole = ladder.trained

    def trained(base, provider, config, device):
        taken.append(config.data.max_length)
        if config.data.max_length > 640:
            raise torch.OutOfMemoryError
        return whole(base, provider, config, device)

    monkeypatch.setattr(ladder, "trained", trained)
    found = climbed(TINY, provider, 8, CPU, most=1024)
    assert taken == [256, 512, 1024, 768]
    assert (found.result, found.longest, found.peaks) == ("ok", 512, None)
    assert found.tokens_per_s > 0


def test_two_whole_steps_are_taken(monkeypatch):
    steps = []

    class Loop:
        def train_step(self, micro_batches):
            steps.append([batch.inputs["input_ids"].shape for batch in micro_batches])

    monkeypatch.setattr(Base, "loop", lambda self, config, device: Loop())
    ladder.trained(TINY, "hf", ladder.settings("hf", 512, 8), CPU)
    assert steps == [[(1, 512)], [(1, 512)]]


def test_a_card_that_holds_nothing_is_a_row(monkeypatch):
    def trained(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ladder, "trained", trained)
    found = climbed(TINY, "hf", 8, CPU)
    assert (found.result, found.longest) == ("out of memory", 0)
    assert Rung("tiny", "hf", 8, torch.float32).rates(found, CPU) == {}


def test_other_errors_are_not_taken_for_a_full_card(monkeypatch):
    def trained(*_):
        raise TypeError("of another kind")

    monkeypatch.setattr(ladder, "trained", trained)
    with pytest.raises(TypeError):
        climbed(TINY, "hf", 8, CPU)


def test_a_rung_gives_a_row(monkeypatch, capsys, tmp_path):
    """Through the process's own arguments and output, in this process."""

    done, whole = [], ladder.climbed

    def said_by(script, *arguments):
        monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments), "--most", "256"])
        ladder.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(ladder, "said_by", said_by)
    monkeypatch.setattr(ladder, "hold_to", lambda gib, device: done.append(gib))
    monkeypatch.setattr(ladder, "climbed", lambda *a, **k: done.append("climbed") or whole(*a, **k))
    monkeypatch.setattr("benchmarks.harness.result_rows.RESULTS", tmp_path)
    rows = []
    for provider in ("ours", "hf"):
        rung = Rung("tiny", provider, 8, torch.float32)
        assert rung.providers[provider].obstacle(CPU) is None
        found = rung.measure([provider], CPU)[provider]
        rows.append(rung.row(provider) | found.columns() | rung.rates(found, CPU))
    written = read(append("cpu", "ladder", LADDER_COLUMNS, rows))
    assert [(row["provider"], row["result"], row["longest"], row["card_gib"]) for row in written] == [
        ("ours", "ok", "256", "8"), ("hf", "ok", "256", "8")
    ]  # fmt: skip
    assert all(float(row["tokens_per_s"]) > 0 for row in written)
    assert done == [8, "climbed"] * 2  # held to the card first


def test_what_was_found_is_no_part_of_a_rows_key(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.result_rows.RESULTS", tmp_path)
    rung = Rung("tiny", "ours", 24, torch.bfloat16)
    for tokens in (512, 768):
        found = RungFound("ok", longest=tokens, tokens_per_s=1.0, peaks=(1.0, 2.0))
        path = append("gpu", "ladder", LADDER_COLUMNS, [rung.row("ours") | found.columns() | rung.rates(found, CPU)])
    rows = read(path)
    assert [row["longest"] for row in rows] == ["512", "768"]
    assert len({key(row) for row in rows}) == 1
    keys = {Rung("tiny", side, gib, torch.bfloat16).key(CPU) for side in ("ours", "hf") for gib in CARDS_GIB}
    assert len(keys) == 2 * len(CARDS_GIB)


def test_a_rung_that_fails_is_a_row_but_for_ours(monkeypatch):
    def said_by(*_):
        raise ScriptFailed("KeyError: 'q'\nTraceback ...")

    monkeypatch.setattr(ladder, "said_by", said_by)
    found = Rung("tiny", "hf", 8, torch.float32).measure(["hf"], CPU)["hf"]
    assert (found.result, found.note) == ("failed", "ScriptFailed: KeyError: 'q'")
    with pytest.raises(ScriptFailed, match="KeyError"):
        Rung("tiny", "ours", 8, torch.float32).measure(["ours"], CPU)
