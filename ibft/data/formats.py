"""What a row says, found by its keys: a prompt and its response, a conversation, a plain text, or ready token ids.

    alpaca              instruction, input (optional), output | response | completion
    OriGen              Instruction, Response
    prompt, completion  or response; both may be lists of messages, as TRL has them
    question, answer    GSM8K
    messages            [{"role", "content"}]
    conversations       sharegpt, [{"from", "value"}]
    text                all of it is taught
    input_ids           with labels (-100: not taught) or without

Whatever has other keys is read through `data.fields`, which names the keys to take instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ibft.data.sources import Row
from ibft.errors import DataError

PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (  # (prompt key, response keys), tried in this order
    ("instruction", ("output", "response", "completion")),
    ("Instruction", ("Response",)),
    ("prompt", ("completion", "response")),
    ("question", ("answer",)),
)
ACCEPTED_KEYS = "; ".join([
    *(f"{prompt} + {'|'.join(responses)}" for prompt, responses in PAIRS),
    "messages; conversations; text; or input_ids (data.fields names other keys)",
])  # fmt: skip
ROLES = {  # of sharegpt and of chat templates
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
IGNORED = -100  # label of a token that is not taught


@dataclass(frozen=True)
class Pair:
    """instruction: the prompt without alpaca's `input`, where the row has one."""

    prompt: str
    response: str
    instruction: str
    input: str = ""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Chat:
    """messages: role and content of each turn. taught_from: the first turn that may be taught."""

    messages: tuple[Mapping[str, str], ...]
    taught_from: int = 0


@dataclass(frozen=True)
class Tokens:
    input_ids: list[int]
    taught: list[bool]


Content = Pair | Text | Chat | Tokens


def read_row(row: Row, where: str = "a row") -> tuple[Content, str]:
    """What the row says, and the keys that it was found by, for people.

    where: names the row in messages.

    Raises:
        DataError: unknown keys, or values of another kind.
    """
    for prompt_key, response_keys in PAIRS:
        response_key = next((key for key in response_keys if key in row), None)
        if prompt_key not in row or response_key is None:
            continue
        found = f"{prompt_key} + {response_key}"
        if isinstance(row[prompt_key], list) and isinstance(row[response_key], list):
            asked = read_messages(row, prompt_key, where)
            answered = read_messages(row, response_key, where)
            return chat_of((*asked, *answered), response_key, where, taught_from=len(asked)), f"{found} (messages)"
        prompt, response = (text_of(row, key, where) for key in (prompt_key, response_key))
        if prompt_key == "instruction" and row.get("input") is not None:  # parquet writes absent fields as null
            extra = text_of(row, "input", where)
            whole = f"{prompt}\n{extra}" if extra else prompt
            return Pair(whole, response, prompt, extra), f"instruction + input + {response_key}"
        return Pair(prompt, response, prompt), found
    for key in ("messages", "conversations"):
        if key in row:
            return chat_of(read_messages(row, key, where), key, where), key
    if "text" in row:
        return Text(text_of(row, "text", where)), "text"
    if "input_ids" in row:
        return read_tokens(row, where), "input_ids"
    raise DataError(f"{where} has the keys {', '.join(map(str, row)) or '(none)'}; expected {ACCEPTED_KEYS}")


def is_chat(found: str) -> bool:
    """Whether the keys, as `read_row` names them, are those of a conversation."""
    return found in ("messages", "conversations") or found.endswith("(messages)")


def rename(row: Row, fields: Mapping[str, str], where: str) -> Row:
    """The row with the keys that `data.fields` names under the names that formats know, and no other.

    Raises:
        DataError: the row lacks one of them.
    """
    if missing := [key for key in fields.values() if key not in row]:
        raise DataError(f"{where} has no {missing[0]!r} (data.fields); it has the keys {', '.join(map(str, row))}")
    return {name: row[key] for name, key in fields.items()}


def text_of(row: Row, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {type(value).__name__}, expected a string")
    return value


def read_messages(row: Row, key: str, where: str) -> tuple[Mapping[str, str], ...]:
    """Of either spelling: role and content, or from and value."""
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {key} is {_kind(turns)}, expected a list of messages")
    found = []
    for number, turn in enumerate(turns, 1):
        place = f"{where}: {key}, message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} is {type(turn).__name__}, expected an object with role and content")
        role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
        role, content = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place} has the {role_key} {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{place}: {text_key} is {type(content).__name__}, expected a string")
        found.append({"role": ROLES[role], "content": content})
    return tuple(found)


def chat_of(messages: tuple[Mapping[str, str], ...], key: str, where: str, *, taught_from: int = 0) -> Chat:
    """Raises DataError: there is nothing to teach."""
    if not any(message["role"] == "assistant" for message in messages[max(taught_from, 1) :]):
        raise DataError(f"{where}: {key} holds no answer of the assistant, so nothing to teach")
    return Chat(messages, taught_from)


def read_tokens(row: Row, where: str) -> Tokens:
    ids, labels = row["input_ids"], row.get("labels")
    if not _all_whole(ids) or not ids or min(ids) < 0:
        raise DataError(f"{where}: input_ids is {_kind(ids)}, expected a list of token ids, 0 or more")
    if labels is None:
        return Tokens(list(ids), [True] * len(ids))
    if not _all_whole(labels) or len(labels) != len(ids):
        raise DataError(f"{where}: labels is {_kind(labels)}, expected a list as long as input_ids")
    wrong = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORED)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: labels[{wrong}] is {labels[wrong]}, expected input_ids[{wrong}] = {ids[wrong]} or {IGNORED} "
            "(labels are not shifted)"
        )
    return Tokens(list(ids), [label != IGNORED for label in labels])


def _all_whole(values: object) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _kind(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
