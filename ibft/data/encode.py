"""Turn rows into token ids with an exact prompt/response boundary.

A sample is ids(prompt + "\\n") followed by ids(response) and, unless told otherwise, the EOS id; no BOS. The two parts
are tokenised apart, so that the loss mask is exact at the boundary, and so that the model meets in training the very
prompt ids that it is given at generation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ibft.data.sources import Row
from ibft.errors import DataError, SetupError

SEPARATOR = "\n"
CHUNK_ROWS = (
    1000  # rows tokenised at once: enough to keep a fast tokenizer's threads busy, small enough to show progress
)

# (prompt key, response keys), tried in this order; alpaca's `input` goes with `instruction`.
FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("instruction", ("output", "response", "completion")),
    ("Instruction", ("Response",)),
    ("prompt", ("completion", "response")),
    ("question", ("answer",)),  # GSM8K
)
ACCEPTED_KEYS = "; ".join([*(f"{prompt} + {'|'.join(responses)}" for prompt, responses in FORMATS), "or text"])

Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(frozen=True, slots=True)
class Sample:
    """`input_ids[:prompt_length]` is the prompt, the rest the response (with its EOS)."""

    input_ids: list[int]
    prompt_length: int

    @property
    def first_label(self) -> int:
        """Position of the first label. Position 0 is never one: with no BOS nothing predicts it."""
        return max(self.prompt_length, 1)

    @property
    def num_labels(self) -> int:
        return max(len(self.input_ids) - self.first_label, 0)


@dataclass(frozen=True)
class EncodedData:
    """Samples in the order of their rows, and what the encoding left out.

    Attributes:
        rows: rows given.
        dropped: rows left out because no label token remains within `max_length`.
        truncated: rows kept, but cut on the right.
        lost_label_tokens: label tokens cut away, in dropped and truncated rows together.
    """

    samples: list[Sample]
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    lost_label_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def num_label_tokens(self) -> int:
        return sum(sample.num_labels for sample in self.samples)

    def summary(self) -> str:
        line = f"{len(self.samples):,} samples, {self.num_tokens:,} tokens, {self.num_label_tokens:,} of them labels"
        if self.truncated:
            line += f"; {self.truncated:,} truncated"
        if self.dropped:
            line += f"; {self.dropped:,} of {self.rows:,} rows dropped (no label token left)"
        if self.lost_label_tokens:
            line += f"; {self.lost_label_tokens:,} label tokens lost"
        return line


def to_prompt_response(row: Row, *, number: int | None = None) -> tuple[str | None, str]:
    """Find the prompt and the response of a row in any accepted format.

    Args:
        row: alpaca (`instruction`, optional `input`, `output`), `Instruction`/`Response`, `prompt`/`completion`,
            `question`/`answer`, or a plain `text`.
        number: row number for the message, from 1.

    Returns:
        (prompt, response); with alpaca's `input`, prompt = instruction + "\\n" + input. (None, text) of a plain text.

    Raises:
        DataError: the keys are missing or their values are no strings.
    """
    where = "a row" if number is None else f"row {number}"
    for prompt_key, response_keys in FORMATS:
        response_key = next((key for key in response_keys if key in row), None)
        if prompt_key not in row or response_key is None:
            continue
        prompt, response = (_text(row, key, where) for key in (prompt_key, response_key))
        if prompt_key == "instruction" and row.get("input") is not None:  # parquet writes absent fields as null
            extra = _text(row, "input", where)
            prompt += "\n" + extra if extra else ""
        return prompt, response
    if "text" in row:
        return None, _text(row, "text", where)
    raise DataError(f"{where} has the keys {', '.join(map(str, row)) or '(none)'}; expected {ACCEPTED_KEYS}")


def _text(row: Row, key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {type(value).__name__}, expected a string")
    return value


def encode_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each prompt + "\\n", no special tokens: the same in training and at generation."""
    return _ids(tokenizer, [prompt + SEPARATOR for prompt in prompts])


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    add_eos: bool = True,
    progress: Progress | None = None,
) -> EncodedData:
    """Tokenise rows, cut them on the right to `max_length` tokens, and leave out those with no label token.

    Args:
        rows: see `to_prompt_response`.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens a sample may have, EOS included; at least 2, since the first token is never a label.
        add_eos: append the EOS id and teach it (a label like any other, also where the pad id is the same).
        progress: called with (rows done, rows in all) now and then.

    Raises:
        ValueError: max_length is below 2.
        SetupError: add_eos with a tokenizer that has no EOS token.
        DataError: a malformed row, or no sample left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2")
    eos = [] if not add_eos else [tokenizer.eos_token_id]
    if None in eos:
        raise SetupError("the tokenizer has no EOS token to teach: give it one, or turn EOS off")

    samples: list[Sample] = []
    dropped = truncated = lost = 0
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        texts = [to_prompt_response(row, number=start + offset) for offset, row in enumerate(chunk, start=1)]
        for prompt, response in _encode_texts(texts, tokenizer):
            whole = Sample(prompt + response + eos, len(prompt))
            sample = Sample(whole.input_ids[:max_length], len(prompt))
            lost += whole.num_labels - sample.num_labels
            if sample.num_labels == 0:
                dropped += 1
                continue
            truncated += len(whole.input_ids) > max_length
            samples.append(sample)
        if progress is not None:
            progress(start + len(chunk), len(rows))
    if not samples:
        raise DataError(
            f"no sample left: none of the {len(rows):,} rows has a label token within max_length = {max_length}"
        )
    return EncodedData(samples, rows=len(rows), dropped=dropped, truncated=truncated, lost_label_tokens=lost)


def _encode_texts(texts: Sequence[tuple[str | None, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of prompt and response of each; a plain text is all response, and nothing stands before it."""
    pairs = [(prompt, response) for prompt, response in texts if prompt is not None]
    prompts = iter(encode_prompts([prompt for prompt, _ in pairs], tokenizer))
    responses = iter(_response_ids(tokenizer, [response for _, response in pairs]))
    plain = iter(_ids(tokenizer, [response for prompt, response in texts if prompt is None]))
    for prompt, _ in texts:
        yield ([], next(plain)) if prompt is None else (next(prompts), next(responses))


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
