"""Where one thing ends and the next begins: turns, rows of a chunk, the limit of a length, words across a separator."""

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ibft.data.collate import steps_of_epoch
from ibft.data.encode import EncodedData, encode_rows
from ibft.data.overlap import find_duplicates
from ibft.data.samples import Sample
from ibft.errors import DataError

BARE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def bare(tokenizer, tmp_path) -> str:
    (tmp_path / "bare.jinja").write_text(BARE)
    return str(tmp_path / "bare.jinja")


def talk(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encode_one(row, tokenizer, template) -> tuple[str, str]:
    """The whole text, and what is taught of it."""
    (sample,) = encode_rows([row], tokenizer, max_length=999, template=template).samples
    labels = [sample.input_ids[i] for i in sample.label_positions()]
    return tokenizer.decode(sample.input_ids), tokenizer.decode(labels)


def test_an_assistant_that_opens_the_conversation_is_not_taught(tokenizer, bare):
    row = talk(("assistant", "hello"), ("user", "q"), ("assistant", "a"))
    assert encode_one(row, tokenizer, bare) == ("[assistant]hello\n[user]q\n[assistant]a<eos>", "a<eos>")


def test_what_follows_the_last_answer_stays_and_no_eos_comes_between(tokenizer, bare):
    row = talk(("user", "q"), ("assistant", "a"), ("user", "more"))
    assert encode_one(row, tokenizer, bare) == ("[user]q\n[assistant]a\n[user]more\n", "a")


def test_a_template_that_leaves_the_answer_out_is_refused(tokenizer, tmp_path):
    path = tmp_path / "deaf.jinja"
    path.write_text(BARE.replace("{{ m.content }}", "{{ '' if m.role == 'assistant' else m.content }}"))
    with pytest.raises(DataError, match="row 1: the chat template does not write the content of turn 2 as it is"):
        encode_one(talk(("user", "q"), ("assistant", "a")), tokenizer, str(path))


def test_no_bos_is_put_before_a_prompt_a_response_or_a_turn(tokenizer, bare):
    """Though the tokenizer puts one before any text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    eager = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )  # fmt: skip
    assert eager("a")["input_ids"][0] == bos
    assert encode_one({"prompt": "p", "response": "r"}, eager, "auto") == ("p\nr<eos>", "r<eos>")
    row = talk(("user", "q"), ("assistant", "a"))
    assert encode_one(row, eager, bare) == ("[user]q\n[assistant]a<eos>", "a<eos>")


def test_a_newline_that_ends_a_jinja_file_is_part_of_the_prompt(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Q: {{ prompt }}\nA:\n")
    assert encode_one({"prompt": "p", "response": "r"}, tokenizer, str(path)) == ("Q: p\nA:\nr<eos>", "r<eos>")


def test_a_sample_of_just_the_length_is_not_too_long(tokenizer):
    row = {"prompt": "a", "response": "xyz"}  # 2 + 3 + 1 tokens
    for truncation in ("right", "left", "drop", "split"):
        data = encode_rows([row, row], tokenizer, max_length=6, truncation=truncation)
        assert data.lengths.tolist() == [6, 6]
        assert (data.dropped, data.truncated, data.split, data.lost_label_tokens) == (0, 0, 0, 0)


def test_rows_are_numbered_on_across_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("ibft.data.encode.CHUNK_ROWS", 2)
    rows = [{"prompt": "p", "response": "" if k == 3 else "r"} for k in range(5)]
    data = encode_rows(rows, tokenizer, max_length=9)
    assert (data.samples.rows.tolist(), data.first_empty) == ([0, 1, 2, 4], 4)


def test_a_response_that_joins_the_separator_keeps_all_of_its_text():
    """Two newlines are one token here, so that the separator's ids cannot be taken off again."""
    symbols = ["<unk>", "▁", "\n", "\n\n", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    (sample,) = encode_rows([{"prompt": "p", "response": "\nx"}], tokenizer, max_length=99).samples
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids[sample.prompt_length :])
    assert tokens == ["▁", "\n", "x", "<eos>"]


def test_rows_of_the_same_values_under_other_keys_are_not_equal():
    assert find_duplicates([{"a": "x", "b": "y"}, {"a": "y", "b": "x"}, {"b": "y", "a": "x"}]) == [[0, 2]]


# --- groups of like length ------------------------------------------------------------------------


def lengths_of_steps(data: EncodedData, **changes) -> list[list[int]]:
    settings = {
        "epoch": 0, "seed": 3, "micro_rows": 2, "accumulation": 2, "packing": False, "max_length": 64,
        "kl_tokens": "real", "pad_to": None, "pad_id": 0,
    }  # fmt: skip
    steps = steps_of_epoch(data, **(settings | changes))
    return [[int(row.count_nonzero()) for batch in step for row in batch.input_ids] for step in steps]


@pytest.fixture(scope="module")
def many() -> EncodedData:
    return EncodedData.of([Sample([1] * length, 1) for length in range(2, 42)])


def test_grouped_rows_of_a_step_are_of_like_length(many):
    steps = lengths_of_steps(many, grouped=True)
    assert sorted(length for step in steps for length in step) == list(range(2, 42))
    assert all(max(step) - min(step) == 3 for step in steps)
    assert any(max(step) - min(step) > 10 for step in lengths_of_steps(many))


def test_neither_packing_nor_a_given_order_is_changed_by_groups(many):
    assert lengths_of_steps(many, packing=True, grouped=True) == lengths_of_steps(many, packing=True)
    steps = lengths_of_steps(many, shuffle=False, grouped=True)
    assert [length for step in steps for length in step] == list(range(2, 42))
