"""Templates: the texts they write, and where what they teach lies in these."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ibft.data.encode import encode_prompts, encode_rows
from ibft.data.formats import Pair
from ibft.data.templates import Template, choose_template, taught_tokens
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
COLON = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PARTED = COLON.replace(": ", ":\n\n")
DEAF = CHATML.split("{% if")[0]  # to add_generation_prompt
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
    fields = {"instruction": "q", "output": "a"}  # keys that these do not name are there too
    assert (
        whole({"q": "p", "a": "r", "level": 3}, tokenizer, template=str(path), fields=fields) == "Q (3): p\nA: r<eos>"
    )
    with pytest.raises(DataError, match=r"row 1: what the template \(.*mine.jinja\) writes holds '\\ud800'"):
        whole(row | {"level": "\ud800"}, tokenizer, template=str(path))


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
    assert taught_tokens([(0, 2), (2, 4), (4, 6)], [(2, 4)], 6) == [False, True, False]
    assert taught_tokens([(0, 3), (3, 4), (4, 6)], [(2, 4)], 6) is None
    assert taught_tokens([(0, 2), (2, 5)], [(2, 4)], 5) is None
    assert taught_tokens([(0, 0), (0, 2)], [(0, 2)], 2) == [False, True]  # a mark that is no text


def test_edges_within_the_white_space_that_offsets_leave_out():
    assert taught_tokens([(0, 2), (3, 4)], [(3, 4)], 4) is None  # "ab", " c": nothing ends where the c begins
    assert taught_tokens([(0, 2), (3, 4)], [(2, 4)], 4) is None  # nor begins where the b ends
    assert taught_tokens([(0, 2), (3, 3), (6, 6), (7, 8)], [(3, 8)], 8) is None  # "ab", "\n", three spaces, " c"
    assert taught_tokens([(0, 2), (3, 3), (3, 4)], [(3, 4)], 4) == [False, False, True]  # "ab", "\n", "c"
    assert taught_tokens([(0, 2), (2, 3)], [(2, 3)], 5) is None  # "ab", ";\n\n": it ends behind the edge
    assert taught_tokens([(0, 2), (2, 3), (5, 5)], [(2, 5)], 5) == [False, True, True]
    assert taught_tokens([(1, 2), (2, 3)], [(0, 4)], 4) == [True, True]  # the ends of a text are no token's inside


@pytest.fixture(scope="module")
def trimming() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: words with the space before them are tokens, which their offsets leave out."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["def f(x):\n    return x\n    return y\n" * 20, *["assistant:\n\n"] * 20], trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


@pytest.mark.parametrize("response", ["return x", "    return x", "return x\n\nreturn y"])
@pytest.mark.parametrize("template", [CHATML, COLON, PARTED])
def test_trimmed_offsets_move_no_label(trimming, tmp_path, template, response):
    path = tmp_path / "t.jinja"
    path.write_text(template)
    (sample,) = encode_rows(
        [{"prompt": "q", "response": response}], trimming, max_length=99, template=str(path)
    ).samples
    end = "<|im_end|>" if template == CHATML else "<eos>"
    assert trimming.decode([sample.input_ids[i] for i in sample.label_positions()]) == response + end
    asked = encode_prompts(["q"], trimming, choose_template(str(path), trimming))[0]
    assert sample.input_ids[: sample.prompt_length] == asked


def test_several_turns_in_pieces(trimming, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(COLON)
    assert taught(TALK, trimming, template=str(path)) == ["2", "4<eos>"]


@pytest.mark.parametrize(
    ("contents", "labels", "empty"),
    [
        (("a", ""), "response", 1),
        (("a", ""), "assistant", 0),
        (("", "a"), "response", 0),
        (("", ""), "assistant", 1),
        (("", ""), "all", 1),
    ],
)
def test_a_conversation_is_empty_where_the_turns_that_are_taught_are(chatting, contents, labels, empty):
    first, last = contents
    turns = [("user", "q"), ("assistant", first), ("user", "r"), ("assistant", last)]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = encode_rows([row, TALK], chatting, max_length=99, labels=labels)
    assert (len(data.samples), data.empty) == (2 - empty, empty)


def test_what_stands_before_an_empty_completion_is_no_answer(chatting):
    row = {"prompt": TALK["messages"][:4], "completion": [{"role": "assistant", "content": ""}]}
    assert encode_rows([row, TALK], chatting, max_length=99).first_empty == 1


def test_a_template_that_does_not_ask_is_refused_where_it_would_teach_the_role(chatting):
    chatting.chat_template = DEAF
    with pytest.raises(DataError, match=r"row 1: .* add_generation_prompt, .* before it: '<\|im_start\|>assist"):
        taught(TALK, chatting)
    assert taught(TALK, chatting, labels="all")


def test_what_a_template_writes_before_an_answer_may_be_taught_where_it_is_not_the_role(chatting):
    # as Llama 2's, which has nothing to ask with: the answer follows the question at once
    chatting.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>{% else %}[{{ m.content }}]"
        "{% endif %}{% endfor %}"
    )
    assert taught(TALK, chatting) == [" 2<|im_end|>", " 4<|im_end|>"]
    chatting.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ '<think>' if m.role == 'assistant' }}{{ m.content }}"
    )
    assert taught(TALK, chatting) == ["<think>2<|im_end|>", "<think>4<|im_end|>"]


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
