"""The pretraining recipe, in miniature: same seed, same weights; falling loss; a folder that loads."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibft.tiny.corpus import documents
from ibft.tiny.pretrain import Recipe, blocks, build_model, learning_rate_at, pretrain
from ibft.tiny.tokenizer import train_tokenizer

SMALL = Recipe(steps=12, batch=4, block=64, layers=1, warmup=2, vocab_size=300, tokenizer_documents=50)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_training_is_repeatable_learns_and_saves(tmp_path, capsys):
    last = pretrain(SMALL, tmp_path / "a", save_every=6)
    assert last < 0.95 * torch.log(torch.tensor(300.0)).item(), "no better than a uniform guess"
    assert pretrain(SMALL, tmp_path / "b") == last
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    midway = weights(tmp_path / "a" / "step-6")
    assert any(not torch.equal(first[name], midway[name]) for name in first)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == 300
    assert "tokens/s" not in capsys.readouterr().out, "speed is shown each 50 steps"
    other = pretrain(replace(SMALL, seed=1), tmp_path / "c")
    assert other != last


def test_rows_start_with_a_document_and_separate_them():
    tokenizer = train_tokenizer(itertools.islice(documents(5), 200), vocab_size=400)
    texts = [text for text, _ in zip(documents(7), range(40), strict=False)]
    batch = next(blocks(tokenizer, iter(texts), batch=3, block=128))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (3, 128)
    seen = iter(texts)
    for row in batch["input_ids"]:
        *whole, cut = tokenizer.decode(row).split("<|endoftext|>")
        assert whole == [next(seen) for _ in whole]
        assert next(seen).startswith(cut)


def test_a_packed_document_does_not_depend_on_its_neighbours():
    tokenizer = train_tokenizer(itertools.islice(documents(5), 200), vocab_size=400)
    batch = next(blocks(tokenizer, documents(7), batch=1, block=512))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    start, end = starts[1:3].tolist()
    model = build_model(tokenizer, layers=2).eval()
    labels = batch.pop("labels")
    with torch.inference_mode():
        packed = model(**batch).logits[0, start:end]
        alone = model(input_ids=batch["input_ids"][:, start:end]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal((labels[0] == -100).nonzero().flatten(), starts)


def test_schedule_warms_up_and_falls_to_a_tenth():
    recipe = Recipe(steps=1000, warmup=100, learning_rate=1e-3)
    assert learning_rate_at(0, recipe) == pytest.approx(1e-5)
    assert learning_rate_at(99, recipe) == learning_rate_at(100, recipe) == pytest.approx(1e-3)
    assert learning_rate_at(1000, recipe) == pytest.approx(1e-4)
    rates = [learning_rate_at(step, recipe) for step in range(100, 1000)]
    assert rates == sorted(rates, reverse=True)


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="got 257, expected at least 258"):
        train_tokenizer(["text"], vocab_size=257)
