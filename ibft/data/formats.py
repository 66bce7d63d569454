"""What a row says, found by its keys: a prompt and its response, a conversation, a plain text, or ready token ids.

    alpaca              instruction, input (optional), output | response | completion
    OriGen              Instruction, Response
    prompt, completion  or response; both may be lists of messages, as TRL has them
    question, answer    GSM8K
    messages            [{"role", "content"}]
    conversations       sharegpt, [{"from", "value"}]
    text                all of it is taught
    input_ids           with labels (-100: not taught) or without

Whatever has other keys is read through `data.fields`, which names the keys to take instead; messages name these.
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


def as_pair(chat: Chat, where: str) -> Pair:
    """A conversation of one question and one answer, with or without a system's message before.

    Raises:
        DataError: another one.
    """
    roles = [message["role"] for message in chat.messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(
            f"{where} is a conversation ({', '.join(roles)}); expected one question and one answer, "
            "or a template of conversations: data.template=chat, or a .jinja file that names messages"
        )
    *asked, answer = (message["content"] for message in chat.messages)
    prompt = "\n".join(asked)
    return Pair(prompt, answer, prompt)


def as_chat(pair: Pair) -> Chat:
    return Chat(({"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}))


def read_row(row: Row, where: str = "a row", fields: Mapping[str, str] | None = None) -> tuple[Content, str]:
    """What the row says, and its keys that it was found by, for people.

    Args:
        where: names the row in messages.
        fields: the name that formats know -> the row's own key (`data.fields`), and no other is looked at; None or
            empty: the row's keys are those names.

    Raises:
        DataError: unknown keys, values of another kind, or a row without one of the fields.
    """
    if fields and (missing := [key for key in fields.values() if key not in row]):
        raise DataError(f"{where} has no {missing[0]!r} (data.fields); it has the keys {', '.join(map(str, row))}")
    keys = fields or {key: key for key in row}
    for prompt_name, response_names in PAIRS:
        response_name = next((name for name in response_names if name in keys), None)
        if prompt_name in keys and response_name is not None:
            extra = keys.get("input") if prompt_name == "instruction" else None
            return read_pair(row, keys[prompt_name], keys[response_name], extra, where)
    for name in ("messages", "conversations"):
        if name in keys:
            key = keys[name]
            return chat_of(read_messages(row, key, where), key, where), key if key == name else f"{key} (messages)"
    if "text" in keys:
        key = keys["text"]
        return Text(text_of(row, key, where)), key if key == "text" else f"{key} (text)"
    if "input_ids" in keys:
        return read_tokens(row, keys["input_ids"], keys.get("labels"), where), keys["input_ids"]
    raise DataError(f"{where} has the keys {', '.join(map(str, row)) or '(none)'}; expected {ACCEPTED_KEYS}")


def read_pair(row: Row, asked: str, answered: str, extra: str | None, where: str) -> tuple[Pair | Chat, str]:
    """The keys of the prompt, of the response and of alpaca's `input`. Two lists of messages are a conversation."""
    found = f"{asked} + {answered}"
    if isinstance(row[asked], list) and isinstance(row[answered], list):
        before = read_messages(row, asked, where)
        messages = (*before, *read_messages(row, answered, where))
        return chat_of(messages, answered, where, taught_from=len(before)), f"{found} (messages)"
    prompt, response = text_of(row, asked, where), text_of(row, answered, where)
    if extra is None or row[extra] is None:  # parquet writes absent fields as null
        return Pair(prompt, response, prompt), found
    more = text_of(row, extra, where)
    return Pair(f"{prompt}\n{more}" if more else prompt, response, prompt, more), f"{asked} + {extra} + {answered}"


def is_chat(found: str) -> bool:
    """Whether the keys, as `read_row` names them, are those of a conversation."""
    return found in ("messages", "conversations") or found.endswith("(messages)")


def text_of(row: Row, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {type(value).__name__}, expected a string")
    return whole_text(value, f"{where}: {key}")


def whole_text(text: str, place: str) -> str:
    """The text itself. Raises DataError: it holds half a surrogate pair (JSON can), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds {text[error.start]!a} at character {error.start + 1}, half of a surrogate pair; "
            "expected Unicode text"
        ) from None
    return text


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
        found.append({"role": ROLES[role], "content": whole_text(content, f"{place}: {text_key}")})
    return tuple(found)


def chat_of(messages: tuple[Mapping[str, str], ...], key: str, where: str, *, taught_from: int = 0) -> Chat:
    """Raises DataError: there is nothing to teach."""
    if not any(message["role"] == "assistant" for message in messages[max(taught_from, 1) :]):
        raise DataError(f"{where}: {key} holds no answer of the assistant, so nothing to teach")
    return Chat(messages, taught_from)


def read_tokens(row: Row, key: str, labels_key: str | None, where: str) -> Tokens:
    """labels_key: None where all is taught."""
    ids, labels = row[key], row[labels_key] if labels_key is not None else None
    if not _all_whole(ids) or not ids or min(ids) < 0:
        raise DataError(f"{where}: {key} is {_kind(ids)}, expected a list of token ids, 0 or more")
    if labels is None:
        return Tokens(list(ids), [True] * len(ids))
    if not _all_whole(labels) or len(labels) != len(ids):
        raise DataError(f"{where}: {labels_key} is {_kind(labels)}, expected a list as long as {key}")
    wrong = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORED)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: {labels_key}[{wrong}] is {labels[wrong]}, expected {key}[{wrong}] = {ids[wrong]} or {IGNORED} "
            "(labels are not shifted)"
        )
    return Tokens(list(ids), [label != IGNORED for label in labels])


def _all_whole(values: object) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _kind(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
