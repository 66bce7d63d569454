"""Rows by their keys."""

import pytest

from ibft.data.formats import ROLES, Chat, Pair, Text, Tokens, is_chat, read_row
from ibft.errors import DataError

TURNS = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize(
    ("row", "content", "keys"),
    [
        ({"instruction": "p", "input": "", "output": "r"}, Pair("p", "r", "p"), "instruction + input + output"),
        (
            {"instruction": "p", "input": "x", "output": "r"},
            Pair("p\nx", "r", "p", "x"),
            "instruction + input + output",
        ),
        ({"instruction": "p", "response": "r"}, Pair("p", "r", "p"), "instruction + response"),
        ({"Instruction": "p", "Response": "r"}, Pair("p", "r", "p"), "Instruction + Response"),
        ({"question": "p", "answer": "r"}, Pair("p", "r", "p"), "question + answer"),
        ({"text": "t", "messages": list(TURNS)}, Chat(TURNS), "messages"),
        ({"text": "t"}, Text("t"), "text"),
        ({"input_ids": [1, 2]}, Tokens([1, 2], [True, True]), "input_ids"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, Tokens([1, 2], [False, True]), "input_ids"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat(TURNS),
            "conversations",
        ),
        (
            {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
            Chat(TURNS, taught_from=1),
            "prompt + completion (messages)",
        ),
    ],
)
def test_what_a_row_says(row, content, keys):
    assert read_row(row) == (content, keys)


def test_roles_of_sharegpt_are_those_of_chat_templates():
    assert set(ROLES.values()) == {"user", "assistant", "system", "tool"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "x"}, "row 7 has the keys query; expected instruction + output|response|completion; "),
        ({"messages": []}, "row 7: messages is a list of 0, expected a list of messages"),
        ({"messages": "hello"}, "row 7: messages is str, expected a list of messages"),
        ({"messages": ["hello"]}, "row 7: messages, message 1 is str, expected an object with role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has the role 'robot', expected one of human, "),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: content is NoneType, expected a string"),
        ({"conversations": [{"from": "gpt"}]}, "message 1: value is NoneType, expected a string"),
        ({"messages": [TURNS[0]]}, "row 7: messages holds no answer of the assistant, so nothing to teach"),
        ({"messages": [TURNS[1]]}, "row 7: messages holds no answer of the assistant, so nothing to teach"),
        ({"input_ids": "abc"}, "row 7: input_ids is str, expected a list of token ids"),
        ({"input_ids": []}, "row 7: input_ids is a list of 0"),
        ({"input_ids": [1, -1]}, "row 7: input_ids is a list of 2, expected a list of token ids, 0 or more"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 7: labels is a list of 1, expected a list as long as input_ids"),
        ({"input_ids": [1, 2], "labels": [2, 3]}, "labels[0] is 2, expected input_ids[0] = 1 or -100 (labels are not"),
        (
            {"text": "ab\ud800"},
            "row 7: text holds '\\ud800' at character 3, half of a surrogate pair; expected Unicode",
        ),
        (
            {"messages": [TURNS[0], {"role": "gpt", "content": "\udc00"}]},
            "row 7: messages, message 2: content holds '\\ud",
        ),
    ],
)
def test_rows_refused(row, said):
    with pytest.raises(DataError) as caught:
        read_row(row, "row 7")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "row", "content", "keys"),
    [
        ({"instruction": "q", "output": "a"}, {"q": "p", "a": "r", "output": "no"}, Pair("p", "r", "p"), "q + a"),
        (
            {"instruction": "q", "input": "x", "output": "a"},
            {"q": "p", "x": "i", "a": "r"},
            Pair("p\ni", "r", "p", "i"),
            "q + x + a",
        ),
        ({"messages": "talk"}, {"talk": list(TURNS), "text": "no"}, Chat(TURNS), "talk (messages)"),
        ({"text": "messages"}, {"messages": "t"}, Text("t"), "messages (text)"),
        (
            {"instruction": "q", "output": "a"},
            {"q": [TURNS[0]], "a": [TURNS[1]]},
            Chat(TURNS, taught_from=1),
            "q + a (messages)",
        ),
    ],
)
def test_named_fields_alone_are_read_and_told(fields, row, content, keys):
    assert read_row(row, fields=fields) == (content, keys)
    assert is_chat(keys) == isinstance(content, Chat)


@pytest.mark.parametrize(
    ("fields", "row", "said"),
    [
        ({"instruction": "q", "output": "a"}, {"q": "p", "b": "r"}, "has no 'a' (data.fields); it has the keys q, b"),
        ({"instruction": "q", "output": "a"}, {"q": "p", "a": 3}, "row 7: a is int, expected a string"),
        ({"messages": "talk"}, {"talk": [TURNS[0]]}, "row 7: talk holds no answer of the assistant"),
        ({"messages": "talk"}, {"talk": [3]}, "row 7: talk, message 1 is int, expected an object"),
        ({"input_ids": "x", "labels": "y"}, {"x": [1, 2], "y": [1, 3]}, "row 7: y[1] is 3, expected x[1] = 2 or -100"),
    ],
)
def test_faults_name_the_keys_of_the_row(fields, row, said):
    with pytest.raises(DataError) as caught:
        read_row(row, "row 7", fields)
    assert said in str(caught.value)
