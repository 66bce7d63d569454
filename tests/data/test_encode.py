import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.encode import Sample, encode_prompts, encode_rows, to_prompt_response
from ibft.data.sources import load_rows
from ibft.errors import DataError, SetupError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "p", "input": "", "output": "r"}, ("p", "r")),
        ({"instruction": "p", "input": None, "output": "r"}, ("p", "r")),
        ({"instruction": "p", "input": "x", "output": "r"}, ("p\nx", "r")),
        ({"instruction": "p", "response": "r"}, ("p", "r")),
        ({"instruction": "p", "completion": "r"}, ("p", "r")),
        ({"Instruction": "p", "Response": "r"}, ("p", "r")),
        ({"prompt": "p", "completion": "r", "input": "x"}, ("p", "r")),
        ({"prompt": "p", "response": "r"}, ("p", "r")),
        ({"prompt": "no", "instruction": "p", "output": "r"}, ("p", "r")),
        ({"question": "p", "answer": "r"}, ("p", "r")),
        ({"text": "all of it"}, (None, "all of it")),
        ({"prompt": "p", "completion": "r", "text": "not this"}, ("p", "r")),
    ],
)
def test_accepted_formats(row, expected):
    assert to_prompt_response(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "p", "answer": "r"}, r"row 7 has the keys query, answer; expected instruction \+ output"),
        ({"text": 3}, "row 7: text is int, expected a string"),
        ({"instruction": "p"}, "row 7 has the keys instruction; expected"),
        ({"instruction": "p", "output": 3}, "row 7: output is int, expected a string"),
        ({"instruction": None, "output": "r"}, "row 7: instruction is NoneType"),
        ({"instruction": "p", "input": ["x"], "output": "r"}, "row 7: input is list"),
        ({}, r"row 7 has the keys \(none\)"),
    ],
)
def test_refused_rows_name_row_and_keys(row, message):
    with pytest.raises(DataError, match=message):
        to_prompt_response(row, number=7)


def test_row_numbers_go_on_across_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("ibft.data.encode.CHUNK_ROWS", 2)
    rows = [{"prompt": "p", "response": "r"}] * 4 + [{"prompt": "p"}]
    with pytest.raises(DataError, match="row 5"):
        encode_rows(rows, tokenizer, max_length=9)


def test_a_plain_text_is_taught_whole_beside_pairs(tokenizer):
    rows = [{"text": "abc"}, {"question": "p", "answer": "r"}, {"text": "d"}]
    plain, pair, short = encode_rows(rows, tokenizer, max_length=99).samples
    assert tokenizer.decode(plain.input_ids) == "abc<eos>"
    assert (plain.prompt_length, plain.first_label, plain.num_labels) == (0, 1, 3)  # nothing predicts the first token
    assert tokenizer.decode(pair.input_ids) == "p\nr<eos>"
    assert tokenizer.decode(short.input_ids) == "d<eos>"


def test_a_sample_is_prompt_separator_response_eos(tokenizer):
    data = encode_rows([{"prompt": "ab", "response": "xyz"}], tokenizer, max_length=99)
    (sample,) = data.samples
    assert tokenizer.decode(sample.input_ids) == "ab\nxyz<eos>"
    assert sample.prompt_length == 3
    assert sample.input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert (sample.first_label, sample.num_labels) == (3, 4)  # EOS is a label although it is also the padding
    assert (data.rows, data.dropped, data.truncated, data.lost_label_tokens) == (1, 0, 0, 0)


def test_without_eos(tokenizer):
    (sample,) = encode_rows([{"prompt": "ab", "response": "xyz"}], tokenizer, max_length=99, add_eos=False).samples
    assert tokenizer.decode(sample.input_ids) == "ab\nxyz"


def test_the_first_token_is_never_a_label():
    sample = Sample([5, 6, 7], prompt_length=0)
    assert (sample.first_label, sample.num_labels) == (1, 2)


def test_truncation_and_drops_are_counted(tokenizer):
    rows = [
        {"prompt": "abc", "response": "wxyz"},  # 4 + 4 + 1 = 9 tokens: loses y, z and EOS
        {"prompt": "abcdefg", "response": "x"},  # prompt and separator are 8: no label left, x and EOS lost
        {"prompt": "a", "response": "xyz"},  # 2 + 3 + 1 = 6: fits exactly
        {"prompt": "a", "response": "x"},
    ]
    data = encode_rows(rows, tokenizer, max_length=6)
    assert [tokenizer.decode(s.input_ids) for s in data.samples] == ["abc\nwx", "a\nxyz<eos>", "a\nx<eos>"]
    assert (data.rows, data.dropped, data.truncated, data.lost_label_tokens) == (4, 1, 1, 3 + 2)
    assert data.summary() == (
        "3 samples, 16 tokens, 8 of them labels; 1 truncated; 1 of 4 rows dropped (no label token left); "
        "5 label tokens lost"
    )


def test_all_rows_dropped_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no sample left: none of the 1 rows has a label token within max_length = 3"):
        encode_rows([{"prompt": "abc", "response": "x"}], tokenizer, max_length=3)
    with pytest.raises(DataError, match="no sample left"):
        encode_rows([{"prompt": "abc", "response": ""}], tokenizer, max_length=99, add_eos=False)


def test_settings_out_of_range(tokenizer):
    with pytest.raises(ValueError, match="max_length: got 1"):
        encode_rows([{"prompt": "a", "response": "x"}], tokenizer, max_length=1)


def test_eos_needs_a_token(tokenizer, marking_tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(SetupError, match="no EOS token"):
        encode_rows([{"prompt": "a", "response": "x"}], bare, max_length=9)
    assert encode_rows([{"prompt": "a", "response": "x"}], bare, max_length=9, add_eos=False).samples


def test_progress_reaches_the_end(tokenizer, monkeypatch):
    monkeypatch.setattr("ibft.data.encode.CHUNK_ROWS", 2)
    seen = []
    encode_rows([{"prompt": "p", "response": "r"}] * 5, tokenizer, max_length=9, progress=lambda *a: seen.append(a))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@given(prompt=st.text(max_size=20), response=st.text(max_size=20))
def test_prompt_ids_are_those_of_generation_and_text_is_kept(tokenizer, prompt, response):
    (sample,) = encode_rows([{"prompt": prompt, "response": response}], tokenizer, max_length=999).samples
    assert sample.input_ids[: sample.prompt_length] == encode_prompts([prompt], tokenizer)[0]
    assert len(sample.input_ids) == len(f"{prompt}\n{response}".encode()) + 1


@pytest.mark.parametrize("response", ["def", "  return x", " x", "", "a\nb"])
def test_no_word_mark_is_put_before_the_response(marking_tokenizer, response):
    """ids(prompt) + ids(response) must spell the text, not the text with a space in the middle."""
    row = {"prompt": "write", "response": response}
    (sample,) = encode_rows([row], marking_tokenizer, max_length=99).samples
    whole = marking_tokenizer(f"write\n{response}", add_special_tokens=False)["input_ids"]
    assert sample.input_ids == [*whole, marking_tokenizer.eos_token_id]


def test_real_data_keeps_every_response(shared_data, tokenizer):
    rows = load_rows(str(shared_data / "code_alpaca_2k.json.gz"))[:300]
    data = encode_rows(rows, tokenizer, max_length=10_000)
    assert (len(data.samples), data.dropped, data.truncated) == (300, 0, 0)
    for row, sample in zip(rows, data.samples, strict=True):
        assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == row["output"] + "<eos>"


def test_samples_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample([1], 1).prompt_length = 2
