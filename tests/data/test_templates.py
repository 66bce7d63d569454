"""Templates: the texts they write, and where what they teach lies in these."""

import pytest
from transformers import PreTrainedTokenizerFast

from ibft.data.encode import encode_prompts, encode_rows
from ibft.data.formats import Pair
from ibft.data.templates import Template, choose_template
from ibft.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (  # no mark at the end of a turn
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('|')[-1] }}")
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
RAISING = "{{ raise_exception('roles must alternate') }}{{ messages }}"
TALK = {
    "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
}  # fmt: skip


@pytest.fixture
def chatting(tokenizer) -> PreTrainedTokenizerFast:
    """The byte tokenizer with ChatML, its turn's end not the EOS."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


def taught(row, tokenizer, **settings):
    """The decoded runs of what is taught."""
    (sample,) = encode_rows([row], tokenizer, max_length=9999, **settings).samples
    runs, last = [], None
    for position in sample.label_positions().tolist():
        if last is None or position != last + 1:
            runs.append([])
        runs[-1].append(sample.input_ids[position])
        last = position
    return [tokenizer.decode(run) for run in runs]


def whole(row, tokenizer, **settings):
    (sample,) = encode_rows([row], tokenizer, max_length=9999, **settings).samples
    return tokenizer.decode(sample.input_ids)


def test_alpaca():
    template = Template("alpaca")
    assert template.prompt(Pair("add 1\n2", "3", "add", "1\n2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nadd\n\n### Input:\n1\n2\n\n"
        "### Response:\n"
    )
    assert template.prompt(Pair("add", "3", "add")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Response:\n"
    )


@pytest.mark.parametrize("template", ["released", "alpaca"])
def test_only_the_response_is_taught(tokenizer, template):
    row = {"instruction": "p {braces}", "input": "x", "output": "r {x}"}
    assert taught(row, tokenizer, template=template) == ["r {x}<eos>"]
    assert taught(row, tokenizer, template=template, add_eos=False) == ["r {x}"]
    text = whole(row, tokenizer, template=template)
    assert taught(row, tokenizer, template=template, labels="all") == [text[1:]]


def test_a_jinja_file_of_the_prompt(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Q ({{ row.level }}): {{ instruction }}{% if input %} [{{ input }}]{% endif %}\nA: ")
    row = {"instruction": "p", "input": "x", "output": "r", "level": 3}
    assert whole(row, tokenizer, template=str(path)) == "Q (3): p [x]\nA: r<eos>"
    assert taught(row, tokenizer, template=str(path)) == ["r<eos>"]
    with pytest.raises(DataError, match=r"row 1: the template \(.*mine.jinja\) refuses it: 'dict object' has no"):
        whole({"instruction": "p", "output": "r"}, tokenizer, template=str(path))


def test_a_jinja_file_of_conversations(chatting, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(BARE)
    assert whole(TALK, chatting, template=str(path)) == (
        "[system]be brief\n[user]1+1?\n[assistant]2\n[user]2+2?\n[assistant]4<eos>"
    )
    assert taught(TALK, chatting, template=str(path)) == ["2", "4<eos>"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("assistant", ["2<|im_end|>", "4<|im_end|>"]), ("response", ["4<|im_end|>"])],
)
def test_turns_of_a_conversation(chatting, labels, expected):
    assert taught(TALK, chatting, labels=labels) == expected
    text = whole(TALK, chatting)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1?")
    assert text.endswith("4<|im_end|>\n")  # the template's own end: no EOS is added
    assert taught(TALK, chatting, labels="all") == [text.removeprefix("<|im_start|>")]


def test_the_turns_of_a_prompt_are_not_taught(chatting):
    row = {"prompt": TALK["messages"][:4], "completion": TALK["messages"][4:]}
    assert taught(row, chatting) == ["4<|im_end|>"]


def test_a_pair_in_the_chat_template_is_asked_as_it_is_taught(chatting):
    row = {"instruction": "1+1?", "output": "2"}
    template = choose_template("chat", chatting)
    (sample,) = encode_rows([row], chatting, max_length=99, template="chat").samples
    assert sample.input_ids[: sample.prompt_length] == encode_prompts(["1+1?"], chatting, template)[0]
    assert taught(row, chatting, template="chat") == ["2<|im_end|>"]


def test_in_pieces_where_there_are_no_offsets(chatting, monkeypatch):
    expected = encode_rows([TALK], chatting, max_length=999).samples[0]
    monkeypatch.setattr("ibft.data.encode.taught_tokens", lambda *_: None)
    assert encode_rows([TALK], chatting, max_length=999).samples[0] == expected


def test_a_token_across_the_edge_of_a_turn():
    from ibft.data.encode import taught_tokens

    assert taught_tokens([(0, 2), (2, 4), (4, 6)], [(2, 4)]) == [False, True, False]
    assert taught_tokens([(0, 3), (3, 4), (4, 6)], [(2, 4)]) is None
    assert taught_tokens([(0, 2), (2, 5)], [(2, 4)]) is None
    assert taught_tokens([(0, 0), (0, 2)], [(0, 2)]) == [False, True]  # a mark that is no text


def test_trimmed_content_is_found(chatting):
    chatting.chat_template = TRIMMING
    row = {"messages": [{"role": "user", "content": " q "}, {"role": "assistant", "content": " a\n"}]}
    assert taught(row, chatting) == ["a<|im_end|>"]


def test_a_template_that_writes_turns_otherwise_later_is_refused(chatting):
    chatting.chat_template = THINKING
    row = {"messages": [*TALK["messages"][:2], {"role": "assistant", "content": "hm|2"}, *TALK["messages"][3:]]}
    with pytest.raises(DataError, match="row 1: the chat template writes turn 3 otherwise once more turns follow"):
        taught(row, chatting)
    assert taught(row, chatting, labels="response") == ["4<|im_end|>"]


def test_a_template_that_raises_names_the_row(chatting):
    chatting.chat_template = RAISING
    with pytest.raises(DataError, match=r"row 2: the template \(chat\) refuses it: .*roles must alternate"):
        encode_rows([{"text": "fine"}, TALK], chatting, max_length=99)


def test_a_conversation_of_one_answer_can_be_written_as_a_pair(tokenizer):
    row = {"messages": TALK["messages"][:3]}
    assert whole(row, tokenizer, template="released") == "be brief\n1+1?\n2<eos>"
    with pytest.raises(DataError, match=r"row 1 is a conversation \(system, user, assistant, user, assistant\)"):
        whole(TALK, tokenizer, template="released")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chat", "the tokenizer has no chat template"),
        ("alpacca", "got 'alpacca', expected auto, released, alpaca, chat or a .jinja file"),
        ("no.jinja", "no.jinja: No such file or directory"),
        ("broken.jinja", "broken.jinja:2: "),
        ("blind.jinja", "uses neither messages nor prompt, instruction or row"),
    ],
)
def test_templates_refused(tokenizer, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{{ prompt }}\n{% if %}")
    (tmp_path / "blind.jinja").write_text("hello")
    with pytest.raises(ConfigError) as caught:
        choose_template(name, tokenizer)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_token_ids(tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}]
    (sample,) = encode_rows(rows, tokenizer, max_length=99).samples
    assert sample.input_ids == [5, 6, 7, 8]  # as they are: no EOS
    assert sample.label_positions().tolist() == [1, 3]
