import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.collate import steps_of_epoch
from ibft.data.encode import encode_prompts, encode_rows, to_prompt_response
from ibft.data.order import epoch_order
from ibft.data.samples import Sample
from ibft.data.sources import load_rows
from ibft.errors import DataError


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
        "3 samples, 16 tokens, 8 of them labels; 1 truncated; "
        "1 of 4 rows dropped (too long, or no label token left); 5 label tokens lost (38.46%)"
    )


MASKED = {"input_ids": [1, 2, 3], "labels": [-100] * 3}


def test_all_rows_dropped_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no sample left: none of the 1 rows has a label token within max_length = 3"):
        encode_rows([{"prompt": "abc", "response": "x"}], tokenizer, max_length=3)
    with pytest.raises(DataError, match="no sample left: row 1 and all others have an empty response"):
        encode_rows([{"prompt": "abc", "response": ""}], tokenizer, max_length=99)
    with pytest.raises(DataError, match="no sample left: none of the 1 rows has a label token, at any max_length"):
        encode_rows([MASKED], tokenizer, max_length=99, truncation="drop")
    too_long = [{"prompt": "a", "response": "x"}, {"prompt": "ab", "response": "x"}, MASKED]  # 4 and 5 tokens
    with pytest.raises(DataError, match="each of the 2 rows with a label token is longer than max_length = 3"):
        encode_rows(too_long, tokenizer, max_length=3, truncation="drop")


def test_rows_without_a_label_are_not_called_too_long(tokenizer):
    data = encode_rows([MASKED, {"prompt": "a", "response": "x"}, MASKED], tokenizer, max_length=99)
    assert (len(data.samples), data.unlabelled, data.dropped, data.truncated) == (1, 2, 0, 0)
    assert data.samples.rows.tolist() == [1]
    assert data.summary() == "1 samples, 4 tokens, 2 of them labels; 2 rows without a label token left out"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a\ud800", "response": "x"}, r"row 2: prompt holds '\\ud800' at character 2"),
        ({"prompt": "a", "response": "\udc00x"}, r"row 2: response holds '\\udc00' at character 1"),
        ({"input_ids": [1, 2, 2**31]}, "row 2 has the token id 2147483648, the tokenizer's largest is 256"),
        ({"input_ids": [1, 2**70, 2]}, "row 2 has the token id 1180591620717411303424"),
        ({"input_ids": [257, 1]}, "row 2 has the token id 257"),
    ],
)
def test_what_no_tokenizer_or_model_reads_names_the_row(tokenizer, row, said):
    with pytest.raises(DataError, match=said):
        encode_rows([{"input_ids": [256, 255]}, row], tokenizer, max_length=99)


def test_empty_responses_are_left_out_and_counted(tokenizer):
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": ""}, {"text": ""}]
    data = encode_rows(rows, tokenizer, max_length=99)
    assert (len(data.samples), data.empty, data.first_empty) == (1, 2, 2)
    assert "2 rows with an empty response left out, the first is row 2" in data.summary()
    kept = encode_rows(rows, tokenizer, max_length=99, keep_empty=True)
    assert tokenizer.decode(kept.samples[1].input_ids) == "b\n<eos>"


LONG = {"prompt": "abc", "response": "uvwxyz"}  # 4 + 6 + 1 = 11 tokens


@pytest.mark.parametrize(
    ("truncation", "texts", "counts"),
    [
        ("right", ["abc\nuvw"], (0, 1, 0, 4)),
        ("left", ["uvwxyz<eos>"], (0, 1, 0, 1)),  # nothing predicts the u
        ("split", ["abc\nuvw", "xyz<eos>"], (0, 0, 1, 1)),  # nor the x
    ],
)
def test_what_is_too_long(tokenizer, truncation, texts, counts):
    data = encode_rows([LONG], tokenizer, max_length=7, truncation=truncation)
    assert [tokenizer.decode(sample.input_ids) for sample in data.samples] == texts
    assert (data.dropped, data.truncated, data.split, data.lost_label_tokens) == counts
    assert data.num_label_tokens == 7 - data.lost_label_tokens
    assert data.samples.rows.tolist() == [0] * len(texts)


def test_what_is_too_long_can_be_dropped(tokenizer):
    rows = [LONG, {"prompt": "a", "response": "x"}]
    data = encode_rows(rows, tokenizer, max_length=7, truncation="drop")
    assert (len(data.samples), data.dropped, data.truncated, data.lost_label_tokens) == (1, 1, 0, 7)
    assert data.samples.rows.tolist() == [1]


def test_one_huge_row(tokenizer):
    data = encode_rows([{"prompt": "p", "response": "x" * 300_000}], tokenizer, max_length=64, truncation="split")
    assert len(data.samples) == -(-300_003 // 64)
    assert data.num_tokens == 300_003


@given(
    pairs=st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=30)), min_size=1, max_size=6),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_response_token_is_a_label_once_an_epoch(tokenizer, pairs, packing, seed):
    """In any packing: the targets of an epoch, sample by sample, spell each response and its EOS."""
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    data = encode_rows(rows, tokenizer, max_length=200)
    steps = steps_of_epoch(
        data, epoch=1, seed=seed, micro_rows=2, accumulation=1, packing=packing, max_length=200, kl_tokens="real",
        pad_to=None, pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    taught: dict[int, list[int]] = {}
    for batch in (batch for step in steps for batch in step):
        places = batch.noise_ids.flatten(0, 1)[batch.label_rows]  # (epoch, place of the sample, position)
        follows = batch.input_ids.flatten()[batch.label_rows + 1]
        assert torch.equal(follows, batch.targets)
        for (_, place, position), target in zip(places.tolist(), batch.targets.tolist(), strict=True):
            taught.setdefault(place, []).append((position, target))
    order = epoch_order(len(rows), seed, 1)
    assert {order[place] for place in taught} == set(range(len(rows)))
    for place, labels in taught.items():
        positions, targets = zip(*sorted(labels), strict=True)
        assert len(set(positions)) == len(positions)
        assert tokenizer.decode(list(targets)) == pairs[order[place]][1] + "<eos>"


def test_threads_of_the_tokenizer_change_nothing(tmp_path):
    """Other processes with other numbers of threads give the same ids, order and packs."""
    code = """
import hashlib, json, sys
from transformers import AutoTokenizer
from ibft.data.encode import encode_rows
from ibft.data.order import epoch_order, pack
from ibft.tiny import BASE_DIR, task_file
from ibft.data.sources import load_rows
data = encode_rows(load_rows(str(task_file("train"))), AutoTokenizer.from_pretrained(BASE_DIR), max_length=256)
order = epoch_order(len(data.samples), 3, 2)
packs = pack(data.lengths[order], 256)
print(hashlib.sha256(json.dumps([data.samples.ids.tolist(), order, packs]).encode()).hexdigest())
"""
    found = []
    for threads, seed in (("1", "1"), ("2", "77")):
        environment = os.environ | {
            "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": seed,
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip().splitlines()[-1])
    assert found[0] == found[1]


def test_settings_out_of_range(tokenizer):
    with pytest.raises(ValueError, match="max_length: got 1"):
        encode_rows([{"prompt": "a", "response": "x"}], tokenizer, max_length=1)


def test_eos_needs_a_token(tokenizer, marking_tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"no EOS token to teach: expected one that has, or data\.add_eos=false"):
        encode_rows([{"prompt": "a", "response": "x"}], bare, max_length=9)
    assert encode_rows([{"prompt": "a", "response": "x"}], bare, max_length=9, add_eos=False).samples


def test_progress_reaches_the_end(tokenizer, monkeypatch):
    monkeypatch.setattr("ibft.data.encode.CHUNK_ROWS", 2)
    seen = []
    encode_rows([{"prompt": "p", "response": "r"}] * 5, tokenizer, max_length=9, progress=lambda *a: seen.append(a))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@given(prompt=st.text(max_size=20), response=st.text(min_size=1, max_size=20))
def test_prompt_ids_are_those_of_generation_and_text_is_kept(tokenizer, prompt, response):
    (sample,) = encode_rows([{"prompt": prompt, "response": response}], tokenizer, max_length=999).samples
    assert sample.input_ids[: sample.prompt_length] == encode_prompts([prompt], tokenizer)[0]
    assert len(sample.input_ids) == len(f"{prompt}\n{response}".encode()) + 1


@pytest.mark.parametrize("response", ["def", "  return x", " x", "a\nb"])
def test_no_word_mark_is_put_before_the_response(marking_tokenizer, response):
    """ids(prompt) + ids(response) must spell the text, not the text with a space in the middle."""
    row = {"prompt": "write", "response": response}
    (sample,) = encode_rows([row], marking_tokenizer, max_length=99).samples
    whole = marking_tokenizer(f"write\n{response}", add_special_tokens=False)["input_ids"]
    assert sample.input_ids == [*whole, marking_tokenizer.eos_token_id]


def test_real_data_keeps_every_response(shared_data, tokenizer):
    rows = load_rows(str(shared_data / "code_alpaca_2k.json.gz"))[:300]
    data = encode_rows(rows, tokenizer, max_length=10_000)
    assert (len(data.samples), data.dropped, data.truncated, data.empty, data.first_empty) == (299, 0, 0, 1, 238)
    rows = [row for row in rows if row["output"]]
    for row, sample in zip(rows, data.samples, strict=True):
        assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == row["output"] + "<eos>"


def test_samples_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample([1], 1).prompt_length = 2
