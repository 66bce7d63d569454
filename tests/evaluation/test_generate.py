import copy
import warnings

import pytest
import torch

from ibft.data.encode import encode_prompts
from ibft.evaluation.generate import extract_code, generate

PROMPTS = ["a", "write a function", "", "sum\nof two", "bb", "a longer prompt than all of the others"]


def greedy_alone(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The definition: one prompt at a time, no padding, no cache."""
    ids = encode_prompts([prompt], tokenizer)[0]
    start = len(ids)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            next_id = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if next_id == tokenizer.eos_token_id:
                break
            ids = [*ids, next_id]
    return tokenizer.decode(ids[start:])


def random_states():
    import random

    return random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_equals_one_prompt_at_a_time(model, tokenizer, batch_size):
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    model.eval()
    assert found == [greedy_alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(found)) > 1


def test_stops_at_eos(model, tokenizer):
    """With the EOS row of the head set so that EOS is what some prompts choose after a while."""
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = model.lm_head.weight[:64].mean(0) * 12
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=24)
    model.eval()
    assert found == [greedy_alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    lengths = {len(encode) for encode in tokenizer(found)["input_ids"]}
    assert len(lengths) > 1
    assert min(lengths) < 24  # the change above bites


def test_the_models_own_stop_tokens_count_too(model, tokenizer):
    first = tokenizer(generate(model, tokenizer, ["a"], max_new_tokens=6))["input_ids"][0]
    model.generation_config.eos_token_id = [first[3]]
    stopped = generate(model, tokenizer, ["a"], max_new_tokens=6)
    assert tokenizer(stopped)["input_ids"][0] == first[: first.index(first[3])]


def test_the_taught_eos_counts_where_the_model_names_none(model, tokenizer):
    first = tokenizer(generate(model, tokenizer, ["a"], max_new_tokens=6))["input_ids"][0]
    model.generation_config.eos_token_id = None
    taught = copy.deepcopy(tokenizer)
    taught.eos_token = taught.convert_ids_to_tokens(first[3])
    stopped = generate(model, taught, ["a"], max_new_tokens=6)
    assert tokenizer(stopped)["input_ids"][0] == first[: first.index(first[3])]


def test_the_model_is_called_in_evaluation_mode_with_the_positions_of_training(model, tokenizer):
    calls = []
    model.register_forward_pre_hook(
        lambda module, _, kwargs: calls.append((module.training, torch.is_grad_enabled(), kwargs["position_ids"])),
        with_kwargs=True,
    )
    generate(model, tokenizer, ["abc", ""], max_new_tokens=3)
    assert [(training, grad) for training, grad, _ in calls] == [(False, False)] * len(calls)
    assert calls[0][2].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]  # the separator counts; padding's own do not matter
    assert calls[1][2].tolist() == [[4], [1]]


def test_leaves_everything_as_it_was(model, tokenizer):
    model.model.layers[0].mlp.eval()  # flags are mixed on purpose
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    flags = [module.training for module in model.modules()]
    config, generation_config = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    side = tokenizer.padding_side
    states = random_states()
    generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert random_states() == states
    assert [module.training for module in model.modules()] == flags
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation_config)
    assert tokenizer.padding_side == side
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("where", ["progress", "model"])
def test_training_flags_come_back_after_a_fault(model, tokenizer, where):
    def fail(*_):
        raise KeyboardInterrupt

    if where == "model":
        model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, progress=fail if where == "progress" else None)
    assert all(module.training for module in model.modules())


def test_greedy_whatever_the_models_own_settings_and_without_warnings(model, tokenizer, caplog):
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    for name, value in {
        "do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "repetition_penalty": 5.0, "max_length": 20,
        "min_length": 9, "no_repeat_ngram_size": 1, "suppress_tokens": [0, 1],
    }.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    import transformers

    transformers.logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
    finally:
        transformers.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


def test_works_on_a_peft_model(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=8) == plain  # B = 0, and no dropout in evaluation


def test_progress_counts_prompts(model, tokenizer):
    seen = []
    generate(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=4, progress=lambda *a: seen.append(a))
    assert seen == [(4, 6), (6, 6)]


def test_nothing_to_do_and_settings_out_of_range(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=1) == []
    with pytest.raises(ValueError, match="got 0 and 64"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=0)


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("def f():\n    pass\n", "def f():\n    pass\n"),
        ("```python\ndef f():\n    pass\n```\nThat is all.", "def f():\n    pass\n"),
        ("Here:\n```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_extract_code(completion, code):
    assert extract_code(completion) == code
