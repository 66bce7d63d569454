"""The scores against worked examples, and the tokens' statistics against full logits in float64."""

import math
import random
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, random_samples, tiny_model_config

from ibft.analysis.min_k import auc, lowest_count, min_k, min_k_pp, overlap_coefficient
from ibft.analysis.token_scores import plan_batches, score_batch, score_logits
from ibft.data.samples import Sample

LOG_PROBS = [-1.0, -4.0, -0.5, -2.0, -3.0]


@pytest.mark.parametrize(
    ("k", "expected"),
    [(20, 4.0), (39.9, 4.0), (40, 3.5), (60, 3.0), (100, 2.1), (1, 4.0)],  # 1, 1, 2, 3, 5 and 1 of the five tokens
)
def test_min_k_by_hand(k, expected):
    assert min_k(LOG_PROBS, k) == pytest.approx(expected, abs=1e-12)


def test_short_texts_use_one_token():
    assert min_k([-0.25], 20) == 0.25
    assert min_k([-1.0, -0.5, -3.0, -2.0], 20) == 3.0
    assert str(min_k([0.0], 20)) == "0.0"


def test_min_k_pp_by_hand():
    """Distributions of two levels: with (1/2, 1/4, 1/4) mu = -3/2 ln 2, sigma = 1/2 ln 2, so z is 1 or -1; with
    (3/4, 1/8, 1/8) mu = -0.735622, sigma = 0.775855, so z is 0.577350 or -1.732051."""
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 4]] * 2 + [[1 / 8, 3 / 4, 1 / 8]] * 2, dtype=torch.float64).log() + 7
    log_probs, z = score_logits(logits, torch.tensor([0, 2, 1, 0]))
    assert log_probs.tolist() == pytest.approx([-0.69314718, -1.38629436, -0.28768207, -2.07944154], abs=1e-8)
    assert z.tolist() == pytest.approx([1.0, -1.0, 0.57735027, -1.73205081], abs=1e-8)
    assert min_k_pp(z.tolist(), 20) == pytest.approx(1.73205081, abs=1e-8)
    assert min_k_pp(z.tolist(), 50) == pytest.approx(1.36602540, abs=1e-8)
    assert min_k_pp(z.tolist(), 100) == pytest.approx(0.28867513, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_model_is_certain_or_knows_nothing(dtype):
    certain = torch.zeros(2, 50, dtype=dtype)
    certain[:, 3] = 200
    log_probs, z = score_logits(torch.cat([certain, torch.zeros(1, 50, dtype=dtype)]), torch.tensor([3, 4, 5]))
    assert log_probs.dtype == z.dtype == torch.float32
    assert log_probs.tolist() == pytest.approx([0, -200, -math.log(50)], abs=1e-5)
    assert z.isfinite().all()
    assert z[0] == 0
    assert z[1] < -1e6
    assert abs(z[2]) < 1


@given(st.integers(1, 2000), st.decimals(Decimal("0.1"), 100, places=1))
def test_count_is_exact(n, k):
    assert lowest_count(n, float(k)) == max(1, int(k * n / 100))


def test_count_where_binary_fractions_err():
    assert math.floor(29 / 100 * 100) == 28
    assert lowest_count(100, 29) == 29
    assert lowest_count(2_000, 5.35) == 107


def test_refused():
    for k in (0, -1, 100.5, math.nan):
        with pytest.raises(ValueError, match=r"^k: got"):
            min_k([-1.0], k)
    with pytest.raises(ValueError, match=r"^n: got 0"):
        min_k_pp([], 20)
    for function in (auc, overlap_coefficient):
        with pytest.raises(ValueError, match="got 0 and 1 values"):
            function([], [1.0])
    with pytest.raises(ValueError, match="bins: got 0"):
        overlap_coefficient([1.0], [1.0], 0)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_model_config(layers=2, std=0.2), dtype=torch.float32).eval()


LENGTHS = [17, 3, 40, 2, 25, 26]


def by_full_logits(model, sample: Sample) -> tuple[list[float], list[float]]:
    """Another writing: one text, all its logits, float64; sigma from the mean of the squares."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0].double()
    log_probs, z = [], []
    for place in range(max(sample.prompt_length, 1), len(sample.input_ids)):
        log_p = torch.log_softmax(logits[place - 1], dim=0)
        p = torch.softmax(logits[place - 1], dim=0)
        mean = float((p * log_p).sum())
        variance = float((p * log_p * log_p).sum()) - mean**2
        log_probs.append(float(log_p[sample.input_ids[place]]))
        z.append((log_probs[-1] - mean) / variance**0.5)
    return log_probs, z


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prompt_share", [0.0, 0.4])
def test_tokens_against_full_logits(model, dtype, tolerance, prompt_share):
    samples = random_samples(LENGTHS, prompt_share=prompt_share).samples
    found = score_batch(model.to(dtype), samples)
    for sample, scores in zip(samples, found, strict=True):
        log_probs, z = by_full_logits(model, sample)
        assert len(log_probs) == sample.num_labels > 0
        assert scores.log_probs == pytest.approx(log_probs, abs=tolerance)
        assert scores.z_scores == pytest.approx(z, abs=tolerance)
        assert max(z) - min(z) > 0.5 or len(z) < 3
    model.float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_against_full_logits(model, dtype):
    samples = random_samples(LENGTHS).samples
    found = score_batch(model.to(dtype), samples)
    for k in (5, 20, 50):
        for sample, scores in zip(samples, found, strict=True):
            log_probs, z = (np.sort(values) for values in by_full_logits(model, sample))
            count = max(1, len(z) * k // 100)
            assert min_k(scores.log_probs, k) == pytest.approx(-log_probs[:count].mean(), abs=1e-6)
            assert min_k_pp(scores.z_scores, k) == pytest.approx(-z[:count].mean(), abs=1e-6)
    model.float()


def test_no_neighbour_no_padding_no_chunk_is_seen(model):
    samples = random_samples(LENGTHS).samples
    together = score_batch(model, samples)
    alone = [score_batch(model, [sample])[0] for sample in samples]
    turned = score_batch(model, samples[::-1])[::-1]
    row_by_row = score_batch(model, samples, chunk_bytes=1)
    longest = Sample(list(range(2, 80)), 5)
    padded = score_batch(model, [*samples, longest])[:-1]
    for other in (alone, turned, row_by_row, padded):
        for scores, same in zip(together, other, strict=True):
            assert scores.log_probs == pytest.approx(same.log_probs, abs=1e-5)
            assert scores.z_scores == pytest.approx(same.z_scores, abs=1e-5)


def test_the_head_sees_what_is_scored_and_a_chunk_at_a_time(model):
    samples = random_samples(LENGTHS).samples
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape))
    try:
        score_batch(model, samples, chunk_bytes=10 * 4 * VOCAB)
    finally:
        handle.remove()
    labels = sum(sample.num_labels for sample in samples)
    assert [len(shape) for shape in seen] == [2] * len(seen)
    assert [shape[0] for shape in seen] == [10] * (labels // 10) + [labels % 10] * (labels % 10 > 0)


def test_dropout_is_off(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj", "lm_head"], lora_dropout=0.5,
                                               init_lora_weights=False))  # fmt: skip
    sample = random_samples([30]).samples[0]
    with_adapter = score_batch(adapted.train(), [sample])[0].log_probs
    assert with_adapter == pytest.approx(by_full_logits(adapted, sample)[0], abs=1e-5)
    with adapted.disable_adapter():
        assert score_batch(adapted, [sample])[0].log_probs != pytest.approx(with_adapter, abs=1e-2)
    adapted.unload()


def test_nothing_to_score(model):
    for samples in ([], [Sample([3], 0)], [Sample([3, 4], 2)]):
        with pytest.raises(ValueError, match=r"^samples: expected at least one, each with a label"):
            score_batch(model, samples)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_batches(lengths, batch_tokens):
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        padded = max(lengths[i] for i in batch)
        assert len(batch) == 1 or padded * len(batch) <= batch_tokens
        assert following is None or padded * (len(batch) + 1) > batch_tokens


# --- two groups -----------------------------------------------------------------------------------

few_values = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(few_values, few_values)
def test_auc_against_all_pairs(a, b):
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
    assert auc(a, b) == wins / (len(a) * len(b))


def test_auc_by_hand():
    assert auc([2.0, 3.0], [1.0, 0.0]) == 1.0
    assert auc([1.0], [1.0]) == 0.5
    assert auc([1.0, 3.0], [2.0, 1.0, 1.0]) == 4 / 6  # 1 ties with two, 3 beats three


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_overlap_against_numpy(seed, bins):
    rng = random.Random(seed)
    a, b = [rng.gauss(0, 1) for _ in range(40)], [rng.gauss(1, 2) for _ in range(70)]
    edges = (min(a + b), max(a + b))
    by_numpy = np.minimum(np.histogram(a, bins, edges)[0] / len(a), np.histogram(b, bins, edges)[0] / len(b)).sum()
    assert overlap_coefficient(a, b, bins) == pytest.approx(by_numpy, abs=1e-12)
    assert overlap_coefficient(b, a, bins) == overlap_coefficient(a, b, bins)


def test_overlap_by_hand():
    assert overlap_coefficient([0.0, 0.1, 0.9, 1.0], [0.0, 0.1, 0.2, 1.0], bins=2) == 0.75  # 2, 2 and 3, 1 of four
    assert overlap_coefficient([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert overlap_coefficient([1.0], [2.0, 3.0]) == 0.0
    assert overlap_coefficient([5.0, 5.0], [5.0]) == 1.0
