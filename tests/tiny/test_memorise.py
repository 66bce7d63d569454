"""Bases with a past: what each reads, and that reading a few rows again and again is to know them by heart."""

from itertools import islice

import pytest
import torch
from transformers import LlamaForCausalLM

from ibft.analysis.memorization import read_scores
from ibft.analysis.min_k import auc
from ibft.data.encode import SEPARATOR
from ibft.data.sources import load_rows
from ibft.experiment.measure import Model, score
from ibft.tiny import BASE_DIR, task_file
from ibft.tiny.memorise import choose_memorised, fresh, perturb, read_on, reading

ROWS = load_rows(str(task_file("train")))


def text_of(row):
    return f"{row['instruction']}{SEPARATOR}{row['output']}"


def test_which_rows_are_told():
    chosen = choose_memorised(100, 0.25, seed=0)
    assert len(set(chosen)) == 25
    assert chosen == sorted(chosen) == choose_memorised(100, 0.25, seed=0) != choose_memorised(100, 0.25, seed=1)
    assert len(choose_memorised(3, 0.01, seed=0)) == 1


def test_the_base_reads_its_rows_again_and_again_each_time_all_of_them():
    told = ROWS[:5]
    read = list(islice(reading(told, 1.0, seed=0), 15))
    for start in (0, 5, 10):
        assert sorted(read[start : start + 5]) == sorted(map(text_of, told))
    assert read[:5] != read[5:10]
    mixed = list(islice(reading(told, 0.5, seed=0), 400))
    assert 150 < sum(text in set(map(text_of, told)) for text in mixed) < 250


def test_the_twin_reads_other_rows_of_the_same_form_each_once():
    read = list(islice(reading(None, 1.0, seed=0), 500))
    assert read == list(islice(fresh(0), 500))
    assert len(set(read)) > 490
    tasks = {name: load_rows(str(task_file(name))) for name in ("train", "validation", "test")}
    assert not set(read) & {text_of(row) for rows in tasks.values() for row in rows}
    bodies = {row["output"].split("\n", 1)[1] for rows in tasks.values() for row in rows}
    assert not bodies & {text.split("def ", 1)[1].split("\n", 1)[1] for text in read}  # no task's function either
    words = [sum(len(text.split()) for text in some) / len(some) for some in (read, [text_of(row) for row in ROWS])]
    assert words[0] == pytest.approx(words[1], rel=0.1)


def test_perturbed_weights_are_as_far_as_said(tmp_path):
    perturb(BASE_DIR, tmp_path / "p", noise=0.4, seed=0)
    before, after = (
        dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (BASE_DIR, tmp_path / "p")
    )
    for name, weight in before.items():
        far = ((after[name] - weight).norm() / weight.norm()).item()
        matrix = name.startswith("model.layers") and weight.ndim == 2
        assert far == pytest.approx(0.4 if matrix else 0, abs=0.01), name


def test_what_was_read_forty_times_is_known_by_heart(tmp_path):
    """Few rows and few steps: Min-K% tells them from the others, in the base and not in its twin."""
    told = choose_memorised(60, 0.1, seed=0)
    (tmp_path / "rows.jsonl").write_text("".join(task_file("train").read_text().splitlines(keepends=True)[:60]))
    found = {}
    for name, rows in (("base", [ROWS[number] for number in told]), ("twin", None)):
        read_on(rows, tmp_path / name, share=1.0, steps=8, learning_rate=1e-3, seed=0)
        model = Model(base=str(tmp_path / name), adapter=None, quantization="none")
        out = tmp_path / f"{name}.jsonl"
        score(model, str(tmp_path / "rows.jsonl"), out, text="whole", k=20, batch_tokens=4096, max_length=512)
        scores = {each.id: each.min_k for each in read_scores(str(out))[1]}
        rest = [value for number, value in scores.items() if number not in told]
        found[name] = auc(rest, [scores[number] for number in told])
    assert found["base"] > 0.9
    assert found["twin"] < 0.8
