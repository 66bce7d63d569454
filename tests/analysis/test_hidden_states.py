import copy

import pytest
import torch
from tiny_models import random_samples, randomise_lora, tiny_model_config
from torch import nn

from ibft.analysis.hidden_states import pooled_states
from ibft.data.samples import Sample
from ibft.errors import ConfigError

LENGTHS = [9, 23, 4, 17, 17, 2, 30]
SAMPLES = random_samples(LENGTHS).samples
ALL = [0, 1, 2, 3]


def make_model(model_type: str = "llama"):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_model_config(model_type, std=0.1), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # at 1 the final norm would scale alone
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def pooled(model, samples=SAMPLES, **changes):
    settings = {"layers": ALL, "pool": "mean", "batch_size": 3, "pad_id": 0, **changes}
    return pooled_states(model, samples, **settings)


def alone(model, samples, pool: str) -> torch.Tensor:
    """[4, N, D], one unpadded sample at a time, by transformers' own hidden states; without a final norm the last of
    them is the last block's."""
    bare = copy.deepcopy(model).eval()
    bare.model.norm = nn.Identity()
    rows = []
    for sample in samples:
        with torch.no_grad():
            states = bare(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        of_response = torch.stack([state[0, sample.prompt_length :].double() for state in states])
        rows.append(of_response.mean(1) if pool == "mean" else of_response[:, -1])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "deepseek"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_equals_one_sample_at_a_time(model_type, pool):
    model = make_model(model_type)
    found = pooled(model, pool=pool)
    assert (found.shape, found.dtype, found.device.type) == ((4, 7, 64), torch.float64, "cpu")
    torch.testing.assert_close(found, alone(model, SAMPLES, pool), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_batch_size_padding_and_order_change_nothing(model, pool):
    one = pooled(model, pool=pool, batch_size=1)
    assert one.abs().mean() > 0.05
    for size in (2, 4, 7, 50):
        torch.testing.assert_close(pooled(model, pool=pool, batch_size=size), one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled(model, pool=pool, pad_id=5), pooled(model, pool=pool), rtol=1e-6, atol=1e-6)
    order = [5, 2, 6, 0, 1, 4, 3]
    moved = pooled(model, [SAMPLES[i] for i in order], pool=pool)
    torch.testing.assert_close(moved, one[:, order], rtol=1e-5, atol=1e-5)


def test_layers_come_in_the_order_asked_for(model):
    found = pooled(model)
    assert torch.equal(pooled(model, layers=[3, 0]), found[[3, 0]])
    assert torch.equal(pooled(model, layers=[2, 2]), found[[2, 2]])
    assert all((found[a] - found[b]).abs().max() > 0.1 for a in ALL for b in ALL if a < b)


def test_the_first_layer_is_the_embeddings_and_the_last_has_no_final_norm(model):
    """Of a response of one token both are that token's vector, so that a norm can be applied to it."""
    samples = [Sample(sample.input_ids, len(sample.input_ids) - 1) for sample in SAMPLES]
    found = pooled(model, samples)
    last_ids = torch.tensor([sample.input_ids[-1] for sample in samples])
    assert torch.equal(found[0], model.model.embed_tokens.weight[last_ids].double())
    with torch.no_grad():
        theirs = [model(torch.tensor([s.input_ids]), output_hidden_states=True).hidden_states[-1] for s in samples]
    normed = torch.stack([states[0, -1] for states in theirs])
    torch.testing.assert_close(model.model.norm(found[-1].float()), normed, rtol=1e-5, atol=1e-5)
    assert (found[-1] - normed).abs().max() > 0.1


def test_only_the_response_counts_but_it_sees_the_prompt(model):
    ids = SAMPLES[1].input_ids
    whole, part = pooled(model, [Sample(ids, 5), Sample(ids, 12)], pool="mean")[2]
    assert (whole - part).abs().max() > 0.01
    other = [ids[0] ^ 1, *ids[1:]]
    before, after = pooled(model, [Sample(ids, 12), Sample(other, 12)])[[0, 2]].unbind(1)
    assert torch.equal(before[0], after[0])  # embeddings of the response alone
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_an_adapter_changes_all_but_the_embeddings(model):
    from peft import LoraConfig, get_peft_model

    plain = pooled(model)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    wrapped = get_peft_model(copy.deepcopy(model), settings)
    torch.testing.assert_close(pooled(wrapped), plain, rtol=0, atol=0)  # B = 0
    randomise_lora(wrapped)
    found = pooled(wrapped)
    assert torch.equal(found[0], plain[0])
    assert ((found - plain)[1:].abs().amax((1, 2)) > 1e-2).all()
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(found, pooled(merged), rtol=1e-4, atol=1e-4)


def test_low_precision_states_are_pooled_in_float64(model):
    half = copy.deepcopy(model).bfloat16()
    for pool in ("mean", "last"):
        assert torch.equal(pooled(half, pool=pool, batch_size=1), alone(half, SAMPLES, pool))


def test_dropout_is_off_and_no_hook_stays(model):
    def hooks(module: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    training = copy.deepcopy(model).train()
    for layer in training.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = hooks(training)
    assert torch.equal(pooled(training), pooled(model))
    assert hooks(training) == before
    with pytest.raises(IndexError):  # in the forward: an id beyond the vocabulary
        pooled(training, [Sample([1, 9999], 1)])
    assert hooks(training) == before


def test_nothing_is_kept_for_the_backward_or_beside_the_vectors(model):
    found = pooled(copy.deepcopy(model).requires_grad_(True))
    assert not found.requires_grad
    assert found.untyped_storage().nbytes() == 4 * 7 * 64 * 8


def test_progress_reaches_the_end(model):
    seen = []
    pooled(model, progress=lambda *counts: seen.append(counts))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 4]}, r"layers: got 4, expected 0 \.\. 3"),
        ({"layers": [-1]}, r"layers: got -1, expected 0 \.\. 3"),
        ({"pool": "max"}, "pool: got 'max', expected 'mean' or 'last'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"samples": [SAMPLES[0], Sample([3, 4], 2)]}, "samples: number 1 has no token of a response"),
    ],
)
def test_refusals(model, changes, message):
    with pytest.raises(ValueError, match=message):
        pooled(model, **changes)


def test_other_families_are_refused():
    with pytest.raises(ConfigError, match="not of the Llama family"):
        pooled(nn.Linear(2, 2))
