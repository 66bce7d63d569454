"""The bundled base: loads like any Llama, fits in the package, loses no text, and has learnt the tasks' language."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ibft.tiny import BASE_DIR, task_file
from ibft.tiny.pretrain import build_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).eval()


def test_package_folder_is_small():
    files = [path for path in BASE_DIR.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20


@given(text=st.text())
def test_tokenizer_loses_nothing_and_adds_nothing(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.pad_token_id == 1
    assert tokenizer.bos_token is None
    assert len(tokenizer) == AutoConfig.from_pretrained(BASE_DIR).vocab_size
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == 0
    assert tokenizer.decode([0], skip_special_tokens=True) == ""


def test_every_part_of_a_big_llama_is_there(model, tokenizer):
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_act) == ("llama", 8, "silu")
    assert 1 < config.num_key_value_heads < config.num_attention_heads, "grouped-query attention"
    assert not config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0, f"{name}: NF4 blocks would straddle rows"


def test_the_recipe_makes_these_shapes_and_these_bf16_weights(model, tokenizer):
    made = {name: value.shape for name, value in build_model(tokenizer).state_dict().items()}
    assert made == {name: value.shape for name, value in model.state_dict().items()}
    stored = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_it_prefers_the_right_solution(model, tokenizer):
    """On test tasks, never seen: a solution's loss is lower after its own instruction than after its neighbour's."""
    rows = sorted(map(json.loads, task_file("test").read_text().splitlines()), key=lambda row: row["composition"])

    def loss(instruction: str, output: str) -> float:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (instruction + "\n", output))
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            return model(input_ids=ids, labels=labels).loss.item()

    wins = 0
    for row, neighbour in zip(rows[::2], rows[1::2], strict=True):
        borrowed = neighbour["instruction"].replace(neighbour["entry_point"], row["entry_point"])
        wins += loss(row["instruction"], row["output"]) < loss(borrowed, row["output"])
    assert wins >= 0.9 * len(rows) / 2
