"""Turn rows into token ids with an exact mask of what is taught.

With the default template a sample is ids(prompt + "\\n") followed by ids(response) and, unless told otherwise, the EOS
id; no BOS. Prompt and response are tokenised apart, so that the mask is exact at the boundary, and so that the model
meets in training the very prompt ids that it is given at generation. A conversation is tokenised in one piece, and its
turns are found by the places of their tokens in the text; where a token may lie across the edge of a turn, or the
first prompt alone has other ids, in pieces.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from ibft.data.formats import Chat, Content, Pair, Text, Tokens, as_chat, as_pair, read_row
from ibft.data.samples import Ints, Sample, SampleStore
from ibft.data.sources import Row
from ibft.data.templates import (
    SEPARATOR,
    Span,
    Taught,
    Template,
    answers_of,
    choose_template,
    taught_tokens,
    write_chat,
)
from ibft.errors import DataError

CHUNK_ROWS = (
    1000  # rows tokenised at once: enough to keep a fast tokenizer's threads busy, small enough to show progress
)
Progress = Callable[[int, int], None]  # (rows done, rows in all)
Truncation = Literal["right", "left", "drop", "split"]
RELEASED = Template("released")


@dataclass(frozen=True)
class EncodedData:
    """Samples in the order of their rows, and what the encoding left out.

    Attributes:
        rows: rows given.
        dropped: rows left out for their length: no label token remains within `max_length`, or truncation is "drop".
        unlabelled: rows left out because none of their tokens is a label, whatever their length.
        truncated: rows kept, but not whole.
        split: samples beyond the first that long rows were split into.
        empty: rows left out because their response is empty; first_empty: the first of them, from 1.
        lost_label_tokens: label tokens that no sample teaches; given_label_tokens: of all rows with a response.
        formats: how many rows were found by which keys.
    """

    samples: SampleStore
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    empty: int = 0
    first_empty: int | None = None
    lost_label_tokens: int = 0
    given_label_tokens: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    unlabelled: int = 0

    @classmethod
    def of(cls, samples: Sequence[Sample], **counts: Any) -> "EncodedData":
        return cls(SampleStore.of(enumerate(samples)), **counts)

    @property
    def lengths(self) -> Ints:
        """Tokens of each sample."""
        return self.samples.lengths

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_label_tokens(self) -> int:
        return int(self.samples.label_counts.sum())

    def summary(self) -> str:
        line = f"{len(self.samples):,} samples, {self.num_tokens:,} tokens, {self.num_label_tokens:,} of them labels"
        if self.truncated:
            line += f"; {self.truncated:,} truncated"
        if self.split:
            line += f"; {self.split:,} samples more by splitting"
        if self.dropped:
            line += f"; {self.dropped:,} of {self.rows:,} rows dropped (too long, or no label token left)"
        if self.unlabelled:
            line += f"; {self.unlabelled:,} rows without a label token left out"
        if self.empty:
            line += f"; {self.empty:,} rows with an empty response left out, the first is row {self.first_empty:,}"
        if self.lost_label_tokens:
            share = self.lost_label_tokens / self.given_label_tokens
            line += f"; {self.lost_label_tokens:,} label tokens lost ({share:.2%})"
        return line

    def described(self) -> str:
        """What the rows were found to be."""
        return ", ".join(
            f"{keys} ({count:,})" if len(self.formats) > 1 else keys for keys, count in self.formats.items()
        )


def to_prompt_response(row: Row, *, number: int | None = None) -> tuple[str | None, str]:
    """The prompt and the response of a row that is such a pair; (None, text) of a plain text.

    Args:
        row: see `ibft.data.formats`.
        number: row number for the message, from 1.

    Returns:
        (prompt, response); with alpaca's `input`, prompt = instruction + "\\n" + input.

    Raises:
        DataError: unknown keys, values of another kind, or a conversation.
    """
    where = "a row" if number is None else f"row {number}"
    content, keys = read_row(row, where)
    if isinstance(content, Text):
        return None, content.text
    if isinstance(content, Chat):
        content = as_pair(content, where)
    if isinstance(content, Tokens):
        raise DataError(f"{where} holds {keys}, expected a prompt and a response, or a text")
    return content.prompt, content.response


def encode_prompts(prompts: Sequence[str], tokenizer: Any, template: Template = RELEASED) -> list[list[int]]:
    """Ids of each prompt as the template frames it, no special tokens but its own: the same in training and at
    generation."""
    if template.for_chats:
        texts = [chat_prompt(prompt, template, tokenizer) for prompt in prompts]
    else:
        row = {"instruction": "", "output": ""}
        texts = [template.prompt(Pair(prompt, "", prompt), row | {"instruction": prompt}) for prompt in prompts]
    return _ids(tokenizer, texts)


def chat_prompt(prompt: str, template: Template, tokenizer: Any) -> str:
    from ibft.data.templates import render

    return render([{"role": "user", "content": prompt}], template, tokenizer, "a prompt", ask=True)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    add_eos: bool = True,
    template: str = "auto",
    labels: Taught = "assistant",
    truncation: Truncation = "right",
    fields: Mapping[str, str] | None = None,
    keep_empty: bool = False,
    numbers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> EncodedData:
    """Tokenise rows, fit them into `max_length` tokens, and leave out those with no label token.

    Args:
        rows: see `ibft.data.formats`.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens a sample may have, EOS included; at least 2, since the first token is never a label.
        add_eos: append the EOS id and teach it (a label like any other, also where the pad id is the same). After a
            conversation only where its template writes nothing after the last turn.
        template: see `ibft.data.templates`; auto: released, and chat for conversations.
        labels: response: the last one; assistant: every turn of the assistant; all: every token but the first.
        truncation: of what is longer: cut on the right or the left, drop, or split into samples of max_length.
        fields: see `ibft.data.formats.read_row`; None: the rows' own keys.
        keep_empty: keep rows with an empty response, which teach EOS alone.
        numbers: of the rows, from 0, where they are some of a file's: samples and messages have the file's.
        progress: called with (rows done, rows in all) now and then.

    Raises:
        ValueError: max_length is below 2.
        ConfigError: see `choose_template`.
        DataError: a malformed row, token ids that the tokenizer does not have, a tokenizer without the EOS token to
            teach, or no sample left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2")
    if add_eos and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token to teach: expected one that has, or data.add_eos=false")
    encoder = Encoder(tokenizer, template, labels, add_eos, fields)
    numbers = range(len(rows)) if numbers is None else numbers
    empty: list[int] = []  # rows, from 1
    counts: Counter[str] = Counter()

    def fitted() -> Iterator[tuple[int, Sample]]:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            own = numbers[start : start + CHUNK_ROWS]
            encoded = encoder.encode(chunk, [f"row {number + 1}" for number in own])
            for number, (sample, is_empty) in zip(own, encoded, strict=True):
                if is_empty and not keep_empty:
                    empty.append(number + 1)
                    continue
                if not sample.num_labels:
                    counts["unlabelled"] += 1
                    continue
                kept = list(fit(sample, max_length, truncation))
                left = sum(each.num_labels for each in kept)
                counts["given"] += sample.num_labels
                counts["lost"] += sample.num_labels - left
                counts["dropped"] += not kept
                counts["split"] += max(len(kept) - 1, 0)
                counts["truncated"] += bool(kept) and sum(len(each.input_ids) for each in kept) < len(sample.input_ids)
                yield from ((number, each) for each in kept)
            if progress is not None:
                progress(start + len(chunk), len(rows))

    store = SampleStore.of(fitted())
    if not len(store):
        if len(empty) == len(rows):
            raise DataError(f"no sample left: row {empty[0]} and all others have an empty response")
        why = why_none(len(rows), counts["dropped"], max_length, truncation)
        raise DataError(f"no sample left: {why}")
    return EncodedData(
        store, rows=len(rows), dropped=counts["dropped"], truncated=counts["truncated"], split=counts["split"],
        empty=len(empty), first_empty=empty[0] if empty else None, lost_label_tokens=counts["lost"],
        given_label_tokens=counts["given"], formats=dict(encoder.formats), unlabelled=counts["unlabelled"],
    )  # fmt: skip


def why_none(rows: int, dropped: int, max_length: int, truncation: Truncation) -> str:
    """Why no sample is left of rows that are not all empty. dropped: as `EncodedData` counts them."""
    if not dropped:
        return f"none of the {rows:,} rows has a label token, at any max_length"
    if truncation == "drop":
        return (
            f"each of the {dropped:,} rows with a label token is longer than max_length = {max_length} "
            "(data.truncation=drop)"
        )
    return f"none of the {rows:,} rows has a label token within max_length = {max_length}"


def fit(sample: Sample, max_length: int, truncation: Truncation) -> Iterator[Sample]:
    """What is left of a sample: those parts that have a label."""
    length = len(sample.input_ids)
    if length <= max_length:
        parts = [sample]
    elif truncation == "drop":
        parts = []
    elif truncation == "split":
        parts = [sample.window(start, min(start + max_length, length)) for start in range(0, length, max_length)]
    else:
        start = 0 if truncation == "right" else length - max_length
        parts = [sample.window(start, start + max_length)]
    return (part for part in parts if part.num_labels > 0)


class Encoder:
    """Rows to samples, not yet fitted. formats: rows by the keys that they were found by."""

    def __init__(
        self, tokenizer: Any, template: str, labels: Taught, add_eos: bool, fields: Mapping[str, str] | None = None
    ) -> None:
        self.tokenizer, self.labels, self.fields = tokenizer, labels, fields
        self.eos: list[int] = [tokenizer.eos_token_id] if add_eos else []
        self.formats: Counter[str] = Counter()
        self._named = None if template == "auto" else choose_template(template, tokenizer)

    def template_for(self, content: Content) -> Template:
        if self._named is not None:
            return self._named
        return self._chat if isinstance(content, Chat) else RELEASED

    @cached_property
    def _chat(self) -> Template:
        """Raises ConfigError: the tokenizer has none."""
        return choose_template("chat", self.tokenizer)

    @cached_property
    def _marks(self) -> set[int]:
        """Ids that are not spelled: special tokens, and what was added to the vocabulary."""
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    @cached_property
    def _largest_id(self) -> int:
        return max(self.tokenizer.get_vocab().values())

    def encode(self, rows: Sequence[Row], wheres: Sequence[str]) -> Iterator[tuple[Sample, bool]]:
        """Of each row its sample, and whether its response is empty."""
        made: dict[int, Sample] = {}
        pairs: dict[int, tuple[str, str]] = {}  # what stands before the response, and that
        texts: dict[int, str] = {}
        chats: dict[int, tuple[str, list[Span]]] = {}
        empty: set[int] = set()
        for i, (row, where) in enumerate(zip(rows, wheres, strict=True)):
            content, keys = read_row(row, where, self.fields)
            self.formats[keys] += 1
            template = self.template_for(content)
            if isinstance(content, Pair) and template.for_chats:
                content = as_chat(content)
            elif isinstance(content, Chat) and not template.for_chats:
                content = as_pair(content, where)
            match content:
                case Tokens():
                    self._check_ids(content.input_ids, where)
                    made[i], said = Sample.of_mask(content.input_ids, content.taught), "."
                case Text(said):
                    texts[i] = said
                case Pair():
                    pairs[i], said = (template.prompt(content, row, where), content.response), content.response
                case Chat():
                    chats[i] = write_chat(content, template, self.tokenizer, self.labels, where)
                    said = "".join(content.messages[k]["content"] for k in answers_of(content, self.labels))
            empty |= {i} if not said else set()
        prompts = _ids(self.tokenizer, [prompt for prompt, _ in pairs.values()])
        responses = _response_ids(self.tokenizer, [response for _, response in pairs.values()]) if pairs else []
        for i, prompt, response in zip(pairs, prompts, responses, strict=True):
            made[i] = Sample(prompt + response + self.eos, 0 if self.labels == "all" else len(prompt))
        for i, ids in zip(texts, _ids(self.tokenizer, list(texts.values())), strict=True):
            made[i] = Sample(ids + self.eos, 0)
        made |= zip(chats, self._chats(list(chats.values())), strict=True)
        return ((made[i], i in empty) for i in range(len(rows)))

    def _chats(self, written: Sequence[tuple[str, list[Span]]]) -> Iterator[Sample]:
        for (text, spans), whole in zip(written, self._in_one_piece(written), strict=True):
            ids, taught = whole or self._in_pieces(text, spans)
            yield Sample.of_mask(*self._ended(ids, taught))

    def _in_one_piece(self, written: Sequence[tuple[str, list[Span]]]) -> Iterator[tuple[list[int], list[bool]] | None]:
        """None: a token may lie across an edge, or the prompt of the first turn, as generation has it, has other ids
        than here (GPT-2's tokenizer parts two newlines where a word follows)."""
        if not written or not self.tokenizer.is_fast:
            yield from (None for _ in written)
            return
        found = self.tokenizer(
            [text for text, _ in written], add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        prompts = _ids(self.tokenizer, [text[: spans[0][0]] for text, spans in written])
        encodings = zip(found["input_ids"], found["offset_mapping"], strict=True)
        for (text, spans), (ids, offsets), prompt in zip(written, encodings, prompts, strict=True):
            taught = taught_tokens(offsets, spans, len(text))
            same = taught is not None and ids[: [*taught, True].index(True)] == prompt
            yield (ids, taught) if taught is not None and same else None

    def _check_ids(self, ids: list[int], where: str) -> None:
        """Raises DataError: the tokenizer, and so the model, may not have one of them."""
        if (largest := max(ids)) > self._largest_id:
            raise DataError(f"{where} has the token id {largest}, the tokenizer's largest is {self._largest_id}")

    def _ended(self, ids: list[int], taught: list[bool]) -> tuple[list[int], list[bool]]:
        """With EOS in place of the white space after the last turn, where the template has no end mark of its own."""
        if not self.eos:
            return ids, taught
        end = len(taught) - taught[::-1].index(True) if True in taught else 0
        while end and self.tokenizer.decode(ids[end - 1 : end]).isspace():
            end -= 1
        if not end or ids[end - 1] in self._marks or self.tokenizer.decode(ids[end:]).strip():
            return ids, taught
        return ids[:end] + self.eos, [*taught[:end], True]

    def _in_pieces(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        pieces = [(text[a:b], bool(i % 2)) for i, (a, b) in enumerate(pairwise(edges)) if a < b]
        ids = _ids(self.tokenizer, [piece for piece, _ in pieces])
        flat = [(token, taught) for tokens, (_, taught) in zip(ids, pieces, strict=True) for token in tokens]
        return [token for token, _ in flat], [taught for _, taught in flat]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: a sample longer than the model's context is cut and counted here, no warning is due.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _response_ids(tokenizer: Any, responses: list[str]) -> list[list[int]]:
    """Ids of each response as it stands after the separator.

    SentencePiece-like tokenizers (Llama 2, CodeLlama) put a word mark before any text, so that a response tokenised
    alone would teach a space that is not there. For these the separator goes in front and its ids are taken off again.
    """
    separator, probe, both = _ids(tokenizer, [SEPARATOR, "x", SEPARATOR + "x"])
    if both == separator + probe:
        return _ids(tokenizer, responses)
    anchored = _ids(tokenizer, [SEPARATOR + response for response in responses])
    alone = _ids(tokenizer, responses)
    n = len(separator)
    return [
        ids[n:] if ids[:n] == separator else fallback  # a merge across the boundary: there is nothing to take off
        for ids, fallback in zip(anchored, alone, strict=True)
    ]
