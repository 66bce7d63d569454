"""`ibft-fast analyze memorization`: Min-K% and Min-K%++ of each row of a data set, in a file that a stop leaves usable.

scores.jsonl, JSON lines:

    line 1      the header: what the scores depend on; `data_sha256` is that of all rows, as in a run's manifest,
                `texts` the number of rows that the whole file has
    the others  {id, n_tokens, min_k, min_k_pp, log_probs, z_scores}: id = number of the row in the data, from 0,
                ascending; log_probs (nats) and z_scores of its n_tokens tokens, to 6 decimals, of which min_k and
                min_k_pp are made, so that another K needs no model (`rescore_file`)

The rows are cut into windows of WINDOW rows, a window into batches of like length, and its rows are written when all of
it is done. On going on, the window in which the file ends is made again as a whole, and what is missing of it is
written: each row comes from the very batch that it would have come from without the stop.

The end-of-sequence token is taught, but no part of the scores: it says nothing of the text, is the easiest of all
tokens after some steps of training, and plain texts and other models' data have none.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.analysis.min_k import min_k, min_k_pp
from ibft.config import BUNDLED
from ibft.data.encode import encode_rows, to_prompt_response
from ibft.data.ids import hash_rows
from ibft.data.samples import Sample
from ibft.data.sources import Row, load_rows
from ibft.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError
from ibft.evaluation.samples import lines_of

if TYPE_CHECKING:
    from ibft.console import Console

KIND = "ibft-fast memorization scores"
TEXTS = ("response", "whole")
WINDOW = 256  # rows
DECIMALS = 6
READ_SO = "lower = more memorised, rows count from 0"
Header = dict[str, Any]
Progress = Callable[[int], None]  # rows done
ScoreAll = Callable[[Sequence[Sample]], Iterator[tuple[int, list[float], list[float]]]]  # index, log_probs, z_scores


@dataclass(frozen=True)
class Score:
    """A row of the file without its tokens."""

    id: int
    n_tokens: int
    min_k: float
    min_k_pp: float


def run_memorization(
    *, model: str | None, data: str | None, adapter: str | None = None, out: str, text: str = "response",
    k: float = 20, quantization: str = "none", device: str = "auto", batch_tokens: int = 8192, max_length: int = 2048,
    split: str = "train", limit: int | None = None, rescore: str | None = None,
) -> None:  # fmt: skip
    """Scores each row of `data`, written to `out`; a file that a stop left is gone on with.

    Args:
        model: folder, hub id or `bundled:tiny`. adapter: folder of a PEFT adapter, as a run saves it.
        data: file, hub id or `bundled:tiny`: rows as training takes them, rows of question and answer, or of text.
        text: response: its tokens, given the prompt; whole: all tokens but the first.
        k: percent of the tokens. quantization, device: as `evaluate generate`.
        batch_tokens: of a batch, padding included. max_length: longer texts are cut on the right, as in training.
        split: of a hub data set or the bundled one. limit: only the first rows.
        rescore: a file of scores that gets another `k`, written to `out`, instead of model and data.

    Raises:
        ConfigError: an argument is out of range, missing or contradicts another.
        DataError: the data or a file of scores cannot be read or written, or `out` was made with other settings.
        SetupError: no such model or device. NonFiniteError: the model gives NaN. OutOfMemoryError.
    """
    check_numbers(k=k, batch_tokens=batch_tokens, max_length=max_length, limit=limit)
    k = float(k)  # one writing in the file, whoever calls
    from ibft.evaluation.generate_samples import DEVICES, QUANTIZATIONS, check_choice, check_out, versions

    path = check_out(out)
    if rescore is not None:
        if any(option is not None for option in (model, data, adapter)):
            raise ConfigError("--rescore needs no model and no data: leave out --model, --adapter and --data")
        from ibft.console import Console

        console, scores = Console(), rescore_file(rescore, path, k)
        show(scores, k, console)
        console.line(f"scores: {len(scores):,} in {out}, of the tokens of {rescore}; {READ_SO}")
        return
    if model is None or data is None:
        raise ConfigError("analyze memorization: name --model and --data; or --rescore FILE for another K")
    check_choice("--text", text, TEXTS)
    check_choice("--quantization", quantization, QUANTIZATIONS)
    check_choice("--device", device, DEVICES)
    rows, on_disk = load_data(data, split)
    if model == BUNDLED and on_disk:
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is on disk: no library need ask the network for anything

    from ibft.console import Console
    from ibft.evaluation.local_model import LocalModel, check_adapter

    adapter_hash = None if adapter is None else check_adapter(adapter)
    here = LocalModel.of(model, adapter, quantization, device)
    texts = load_texts(rows[:limit], here.tokenizer, text=text, max_length=max_length)
    header: Header = {
        "kind": KIND, "model": model, "adapter": adapter, "adapter_sha256": adapter_hash, "data": data, "split": split,
        "data_sha256": hash_rows(rows), "rows": len(rows), "limit": limit, "texts": len(texts.samples), "text": text,
        "k": k, "max_length": max_length, "batch_tokens": batch_tokens, "quantization": quantization,
        "device": here.name(), "versions": versions(),
    }  # fmt: skip
    file = ScoreFile(path)
    scores = file.begin(header, list(texts.samples))
    console = Console()
    by = f"{model} + {adapter}" if adapter else model
    where = here.name() if quantization == "none" else f"{quantization}, {here.name()}"
    console.line(f"memorization: {data}, {len(texts.samples):,} of {len(rows):,} rows ({text}); {by} ({where})")
    for notice in texts.notices(max_length, here.positions):
        console.notice(notice)
    if scores:
        console.notice(f"{out} holds {len(scores):,} of them already")
    if new := len(texts.samples) - len(scores):
        loaded = here.load()

        def score_all(samples: Sequence[Sample]) -> Iterator[tuple[int, list[float], list[float]]]:
            return score_in_batches(loaded, samples, batch_tokens)

        with console.progress("scoring", len(texts.samples)) as advance:
            scores += file.fill(score_all, texts.samples, len(scores), k, advance)
    show(scores, k, console)
    console.line(f"scores: {len(scores):,} in {out}, {new:,} of them new; {READ_SO}")


def check_numbers(*, k: float, batch_tokens: int, max_length: int, limit: int | None) -> None:
    if not 0 < k <= 100:
        raise ConfigError(f"--k: got {k:g}, expected more than 0 and at most 100 (percent)")
    for option, value, least in (
        ("--batch-tokens", batch_tokens, 1),
        ("--max-length", max_length, 2),
        ("--limit", limit, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option}: got {value}, expected {least} or more")


# --- rows to samples ------------------------------------------------------------------------------


def load_data(data: str, split: str) -> tuple[list[Row], bool]:
    """All rows, and whether they are on this disk. Raises ConfigError: the bundled tasks have no such split."""
    from ibft.tiny import SPLITS, task_file

    if data != BUNDLED:
        rows = load_rows(data, split=split)
        return rows, Path(data).expanduser().exists()
    if split not in SPLITS:
        raise ConfigError(f"--split: got {split}, expected {', '.join(SPLITS)} of {BUNDLED}")
    return load_rows(str(task_file(split))), True


@dataclass(frozen=True)
class Texts:
    """samples: by row number, ascending. empty: rows without a token to score. cut: rows cut at max_length."""

    samples: dict[int, Sample]
    empty: int
    cut: int

    def notices(self, max_length: int, positions: int | None) -> Iterator[str]:
        if self.empty:
            yield f"rows without a token to score, left out: {self.empty:,}"
        if self.cut:
            yield f"texts cut to {max_length:,} tokens: {self.cut:,}"
        beyond = sum(len(sample.input_ids) > positions for sample in self.samples.values()) if positions else 0
        if beyond:
            yield f"texts beyond the model's {positions:,} positions: {beyond:,}"


def load_texts(rows: Sequence[Row], tokenizer: Any, *, text: str, max_length: int) -> Texts:
    """What is scored of each row: its labels (`Sample.num_labels`).

    Raises:
        DataError: a row of unknown kind, or with a value that is no string; a plain text where the response is asked
            for; nothing to score at all.
    """
    given: dict[int, Row] = {}
    for number, row in enumerate(rows):
        prompt, response = to_prompt_response(row, number=number + 1)
        if prompt is None and text == "response":
            raise DataError(f"row {number + 1} is a text without a response: score it with --text whole")
        if prompt is not None or response:
            given[number] = row
    # with its EOS and uncut no row that holds anything is without a label, so that the numbers stay right
    encoded = encode_rows(list(given.values()), tokenizer, max_length=sys.maxsize, keep_empty=True) if given else None
    found = {
        number: Sample(sample.input_ids[:-1], 0 if text == "whole" else sample.prompt_length)
        for number, sample in zip(given, encoded.samples if encoded else (), strict=True)
    }
    fitted = {number: Sample(found[number].input_ids[:max_length], found[number].prompt_length) for number in found}
    samples = {number: fitted[number] for number in sorted(fitted) if fitted[number].num_labels > 0}
    if not samples:
        raise DataError(f"none of the {len(rows):,} rows has a token to score within --max-length {max_length}")
    cut = sum(len(found[number].input_ids) > max_length for number in samples)
    return Texts(samples, empty=len(rows) - len(samples), cut=cut)


# --- samples to scores ----------------------------------------------------------------------------


def score_in_batches(
    model: Any, samples: Sequence[Sample], batch_tokens: int
) -> Iterator[tuple[int, list[float], list[float]]]:
    """(index into samples, log_probs, z_scores), in the order of the batches."""
    import torch

    from ibft.analysis.token_scores import plan_batches, score_batch

    try:
        for batch in plan_batches([len(sample.input_ids) for sample in samples], batch_tokens):
            found = score_batch(model, [samples[i] for i in batch])
            yield from ((i, one.log_probs, one.z_scores) for i, one in zip(batch, found, strict=True))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise OutOfMemoryError("out of memory: try a smaller --batch-tokens, or --quantization nf4") from error
        raise


def make_row(number: int, log_probs: Sequence[float], z_scores: Sequence[float], k: float) -> dict[str, Any]:
    """Rounds first: what is made of the written numbers later must be the same."""
    if not all(map(math.isfinite, (*log_probs, *z_scores))):
        raise NonFiniteError(f"row {number}: the model gives it a log-probability that is not finite")
    log_probs = [round(value, DECIMALS) + 0.0 for value in log_probs]  # -0.0 + 0.0 is 0.0
    z_scores = [round(value, DECIMALS) + 0.0 for value in z_scores]
    return {
        "id": number, "n_tokens": len(log_probs),
        "min_k": round(min_k(log_probs, k), 9), "min_k_pp": round(min_k_pp(z_scores, k), 9),
        "log_probs": log_probs, "z_scores": z_scores,
    }  # fmt: skip


def as_line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


def score_of(row: Mapping[str, Any]) -> Score:
    return Score(row["id"], row["n_tokens"], row["min_k"], row["min_k_pp"])


@dataclass(frozen=True)
class ScoreFile:
    path: Path

    def begin(self, header: Header, ids: Sequence[int]) -> list[Score]:
        """The scores that are there already, in order: those of the first `ids`. Half a last line is cut off; a new
        file gets its header.

        Raises:
            DataError: it was made with other settings, holds something else, or cannot be read or written.
        """
        first = as_line(header).encode()
        try:
            there = self.path.read_bytes() if self.path.exists() else b""
            kept = there[: there.rfind(b"\n") + 1]
            lines = kept.decode("utf-8", "replace").split("\n")[:-1]
            if not lines and not first.startswith(there):
                raise DataError(f"--out: {self.path} holds something else than scores: name another file")
            scores = self._check(lines, header, ids) if lines else []
            with self.path.open("ab") as file:
                file.truncate(len(kept))
                if not lines:
                    file.write(first)
        except OSError as error:
            raise DataError(f"--out: {self.path}: {error.strerror or error}") from error
        return scores

    def fill(
        self, score_all: ScoreAll, samples: Mapping[int, Sample], done: int, k: float, progress: Progress
    ) -> list[Score]:
        """Makes and writes what follows the first `done` of `samples`; returns their scores."""
        scores: list[Score] = []
        ids = list(samples)
        with self.path.open("a", encoding="utf-8") as file:
            for start in range(done - done % WINDOW, len(ids), WINDOW):
                window = ids[start : start + WINDOW]
                made: dict[int, dict[str, Any]] = {}
                for index, log_probs, z_scores in score_all([samples[number] for number in window]):
                    made[index] = make_row(window[index], log_probs, z_scores, k)
                    progress(max(done, start + len(made)))
                rows = [made[index] for index in range(max(done - start, 0), len(window))]
                try:
                    file.write("".join(map(as_line, rows)))
                    file.flush()
                except OSError as error:
                    raise DataError(f"--out: {self.path}: {error.strerror or error}") from error
                scores += map(score_of, rows)
        return scores

    def _check(self, lines: Sequence[str], header: Header, ids: Sequence[int]) -> list[Score]:
        before = parse_header(lines[0], str(self.path))
        now = json.loads(as_line(header))
        if differ := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            told = "; ".join(f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}" for name in differ)
            hint = "" if differ != ["k"] else " (for another K alone --rescore it)"
            raise DataError(f"--out: {self.path} was made with other settings ({told}): name another file{hint}")
        scores = []
        for number, line in enumerate(lines[1:], start=2):
            score = score_of(parse_row(line, f"{self.path}, line {number}"))
            if number - 2 >= len(ids) or score.id != ids[number - 2]:
                where = f"{self.path}, line {number}"
                raise DataError(f"--out: {where} is not the row that belongs there: name another file")
            scores.append(score)
        return scores


# --- files of scores, read ------------------------------------------------------------------------


def read_scores(path: str) -> tuple[Header, list[Score]]:
    """Raises DataError: not a whole file of scores."""
    rows = rows_of(path)
    header = next(rows)
    return header, [score_of(row) for row in rows]


def rescore_file(source: str, out: Path, k: float) -> list[Score]:
    """Writes to `out` what a run with this K would have written, from the log-probabilities in `source`.

    Raises:
        ConfigError: `out` is there already. DataError: `source` is no whole file of scores, or `out` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} is there already: name another file")
    rows = rows_of(source)
    header = next(rows)
    fresh = out.with_name(out.name + ".new")
    scores = []
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(as_line(header | {"k": k}))
            for row in rows:
                rescored = make_row(row["id"], row["log_probs"], row["z_scores"], k)
                file.write(as_line(rescored))
                scores.append(score_of(rescored))
        os.replace(fresh, out)
    except OSError as error:
        raise DataError(f"--out: {out}: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return scores


def rows_of(path: str) -> Iterator[dict[str, Any]]:
    """The header, then row after row. Raises DataError: it cannot be read, is no file of scores, or not all of one."""
    last, count, header = -1, -1, None
    for number, line in lines_of(path):
        if not line.endswith("\n"):  # half a line: a run was stopped
            break
        if header is None:
            header = parse_header(line, path)
            yield header
        else:
            row = parse_row(line, f"{path}, line {number}")
            if row["id"] <= last:
                raise DataError(f"{path}, line {number}: row {row['id']} after row {last}, expected them ascending")
            last = row["id"]
            yield row
        count += 1
    if header is None or count != header["texts"]:
        of = "" if header is None else f" of {header['texts']:,}"
        raise DataError(f"{path}: holds {max(count, 0):,}{of} scores; let `analyze memorization` go on with it")


def parse_header(line: str, path: str) -> Header:
    header = _parse(line)
    if not isinstance(header, dict) or header.get("kind") != KIND or not isinstance(header.get("texts"), int):
        raise DataError(f"{path}: not a file of scores as `analyze memorization` writes it (its first line)")
    return header


def parse_row(line: str, where: str) -> dict[str, Any]:
    row = _parse(line)
    if (
        not isinstance(row, dict)
        or not all(isinstance(row.get(name), int) for name in ("id", "n_tokens"))
        or not all(_is_number(row.get(name)) for name in ("min_k", "min_k_pp"))
        or not all(isinstance(row.get(name), list) for name in ("log_probs", "z_scores"))
        or not row["n_tokens"] == len(row["log_probs"]) == len(row["z_scores"]) > 0
        or not all(map(_is_number, (*row["log_probs"], *row["z_scores"])))
    ):
        raise DataError(f"{where}: not a row of scores (id, n_tokens, min_k, min_k_pp, log_probs, z_scores)")
    return row


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def show(scores: Sequence[Score], k: float, console: "Console") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("", "lowest", "10 %", "median", "90 %", "highest", box=SIMPLE)
    for name, values in (
        (f"Min-{k:g}%, nats", sorted(score.min_k for score in scores)),
        (f"Min-{k:g}%++", sorted(score.min_k_pp for score in scores)),
    ):
        places = [round(share * (len(values) - 1)) for share in (0, 0.1, 0.5, 0.9, 1)]
        table.add_row(name, *(f"{values[place]:.4f}" for place in places))
    console.rich.print(table)
