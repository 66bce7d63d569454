"""How a prompt and its response become the text that a model reads, and which of it is taught.

    released   the prompt, a newline, the response: the released code's, and the default
    alpaca     Stanford Alpaca's frame, with an "### Input:" where the row has one
    chat       the tokenizer's own chat template; the default for conversations
    PATH       a Jinja file: a chat template (it names `messages`), or one of a prompt alone, which sees `prompt`,
               `instruction`, `input` and `row`, and ends where the response is to begin

A prompt is tokenised apart from its response, so that the mask is exact and the model meets in training the very ids
that it is given at generation. A chat template writes both, so that its turns are found in its text: what it writes
before a turn, with the mark that asks for an answer, must be what the text begins with, and the turn must follow.
Where that fails the row is refused: a mask is checked, never guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from ibft.data.formats import Chat, Pair, is_chat, whole_text
from ibft.data.sources import Row
from ibft.errors import ConfigError, DataError

SEPARATOR = "\n"
Taught = Literal["response", "assistant", "all"]
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
Span = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """name: as the setting has it. source: of a Jinja file, or of the tokenizer's chat template; None: not Jinja.

    for_chats: whether it writes whole conversations; others write what stands before the response.
    """

    name: str
    source: str | None = None
    for_chats: bool = False

    @cached_property
    def _prompt(self) -> Any:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        assert self.source is not None
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(self.source)

    def prompt(self, pair: Pair, row: Row | None = None, where: str = "a prompt") -> str:
        """What stands before the response. Raises DataError: a Jinja file that refuses the row."""
        if self.name == "released":
            return pair.prompt + SEPARATOR
        if self.name == "alpaca":
            extra = f"### Input:\n{pair.input}\n\n" if pair.input else ""
            with_input = ", paired with an input that provides further context" if pair.input else ""
            return ALPACA.format(with_input=with_input, instruction=pair.instruction, input=extra)
        values = {"prompt": pair.prompt, "instruction": pair.instruction, "input": pair.input, "row": row or {}}
        try:
            text = str(self._prompt.render(values))
        except Exception as error:  # whatever a template's own code raises
            raise refused(where, self.name, error) from error
        return whole_text(text, f"{where}: what the template ({self.name}) writes")  # of any key of the row


def template_in_use(name: str, formats: Mapping[str, int]) -> str:
    """What `auto` comes to for rows that were found by such keys (`EncodedData.formats`): a model is asked as it was
    taught."""
    if name != "auto":
        return name
    return "chat" if formats and all(is_chat(keys) for keys in formats) else "released"


def choose_template(name: str, tokenizer: Any) -> Template:
    """Of the setting `data.template`, but for `auto`.

    Raises:
        ConfigError: no such template or file, one that is no Jinja, or a tokenizer without a chat template.
    """
    if name in ("released", "alpaca"):
        return Template(name)
    if name == "chat":
        source = getattr(tokenizer, "chat_template", None)
        if not isinstance(source, str):
            raise ConfigError(
                "data.template=chat: the tokenizer has no chat template; expected a .jinja file that names messages "
                "(docs/data.md has one), or for single answers released or alpaca"
            )
        return Template(name, source, for_chats=True)
    if Path(name).suffix not in (".jinja", ".jinja2", ".j2"):
        raise ConfigError(f"data.template: got {name!r}, expected auto, released, alpaca, chat or a .jinja file")
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template: {name}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    names = undeclared(name, source)
    chat = "messages" in names
    if not chat and not names & {"prompt", "instruction", "row"}:
        raise ConfigError(f"data.template: {name} uses neither messages nor prompt, instruction or row")
    return Template(name, source, for_chats=chat)


def undeclared(name: str, source: str) -> set[str]:
    """Variables that a Jinja source asks for. Raises ConfigError: it is none."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        # tags of chat templates, as transformers has them
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(without_generation_tags(source))
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.template: {name}:{error.lineno}: {error.message}") from error
    return set(meta.find_undeclared_variables(parsed))


def without_generation_tags(source: str) -> str:
    import re

    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)


# --- conversations --------------------------------------------------------------------------------


def answers_of(chat: Chat, taught: Taught) -> list[int]:
    """The turns that are taught, from 0; of "all" those that answer."""
    # what opens a conversation answers nothing
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= max(chat.taught_from, 1)]
    return turns[-1:] if taught == "response" else turns


def write_chat(chat: Chat, template: Template, tokenizer: Any, taught: Taught, where: str) -> tuple[str, list[Span]]:
    """The whole text, and where the turns that are taught lie in it.

    A turn is taught with what the template ends it with (its end mark), but for white space after that.

    Raises:
        DataError: the template refuses the conversation; writes a turn otherwise once others follow, so that its
            place in the text is not known; or would have the mark taught that asks for an answer.
    """
    messages = chat.messages
    whole = render(messages, template, tokenizer, where)
    if taught == "all":
        return whole, [(0, len(whole))]
    return whole, [place_of(i, messages, whole, template, tokenizer, where) for i in answers_of(chat, taught)]


def place_of(
    i: int, messages: Sequence[Mapping[str, str]], whole: str, template: Template, tokenizer: Any, where: str
) -> Span:
    """Where turn i lies in the whole text, with its end mark. Raises DataError: see `write_chat`."""
    before = render(messages[:i], template, tokenizer, where, ask=True)
    after = whole if i == len(messages) - 1 else render(messages[: i + 1], template, tokenizer, where)
    if not whole.startswith(before) or not whole.startswith(after.rstrip()) or len(after) < len(before):
        raise DataError(
            f"{where}: the chat template writes turn {i + 1} otherwise once more turns follow, so that its place "
            "is not known; expected data.labels=response, or a template that writes a turn once and for all"
        )
    content, written = messages[i]["content"].strip(), whole[len(before) : len(after)]
    if content not in written:
        raise DataError(f"{where}: the chat template does not write the content of turn {i + 1} as it is")
    opening = written[: written.index(content)].strip()
    # rendered once more only where something stands before the content: a mark of thinking, or the role
    if opening and before == render(messages[:i], template, tokenizer, where):
        raise DataError(
            f"{where}: the chat template does not heed add_generation_prompt, so that turn {i + 1} would be taught "
            f"with the mark before it: {written[:40]!r}; expected a template that writes that mark where it asks"
        )
    return len(before), len(after.rstrip())


def taught_tokens(offsets: Sequence[Span], spans: Sequence[Span], length: int) -> list[bool] | None:
    """Of each token, whether it lies within one of the spans; None where an edge of one is not seen to lie between two
    tokens.

    Tokenizers may give the place of a token without the white space that it begins or ends with (`trim_offsets`, as
    GPT-2's and Llama 3's do). So a token must end at the edge and the next one begin there: that another begins or
    ends there proves nothing.

    offsets: of each token, its first character and the one after its last. length: characters of the text.
    """
    ends = [0, *map(itemgetter(1), offsets)]
    starts = [*map(itemgetter(0), offsets), length]
    # edge -> tokens before it; the last of these, as a token of white space alone is trimmed to nothing at its end
    before = {0: 0, length: len(offsets)}
    before |= {end: k for k, (end, start) in enumerate(zip(ends, starts, strict=True)) if end == start}
    taught = [False] * len(offsets)
    for start, end in spans:
        if start not in before or end not in before:
            return None
        taught[before[start] : before[end]] = [True] * (before[end] - before[start])
    return taught


def render(
    messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Any, where: str, *, ask: bool = False
) -> str:
    """ask: with the mark that asks the assistant for an answer."""
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=template.source, tokenize=False,
                add_generation_prompt=ask,
            )
        )  # fmt: skip
    except Exception as error:  # whatever a template's own code raises
        raise refused(where, template.name, error) from error


def refused(where: str, name: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{where}: the template ({name}) refuses it: {reason}")
