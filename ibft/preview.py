"""`ibft-fast preview`: what a run would be taught, before any weight is loaded: samples with their mask, lengths,
packing, and the problems that a reader would otherwise find after a night."""

import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from ibft.config import BUNDLED, Config
from ibft.console import Console
from ibft.data.collate import num_steps_per_epoch
from ibft.data.encode import EncodedData
from ibft.data.order import pack
from ibft.data.samples import Sample
from ibft.data.visible import replace_unknown, visible

if TYPE_CHECKING:
    from ibft.data.prepare import Datasets

BINS = 12
TAUGHT, TAUGHT_ASCII = ("⟦", "⟧"), ("[[", "]]")  # around what is taught, where there are no colours
BAR, BAR_ASCII = "█", "#"
FEW_LABELS = 0.01  # of the tokens


class PreviewConsole(Console):
    """Names the limit of the rows as its user does, where `load_data` takes it for data.max_samples."""

    def data(self, what: str, summary: str) -> None:
        super().data(what, summary.replace("data.max_samples", "--rows"))


def run_preview(config: Config, *, count: int, rows: int, as_json: bool, notices: list[str] | None = None) -> None:
    """Prints, or with `as_json` writes to the standard output alone.

    Args:
        count: samples to show. rows: that are encoded; 0: all.

    Raises:
        IBFTError: what a run would refuse.
    """
    if config.model.name_or_path == BUNDLED:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from ibft.data.prepare import load_data
    from ibft.model import load_tokenizer

    limited = rows > 0 and (config.data.max_samples is None or config.data.max_samples > rows)
    if not as_json:
        replace_unknown(sys.stdout)
    console = PreviewConsole(to_stderr=as_json) if limited else Console(to_stderr=as_json)
    for notice in notices or []:
        console.notice(notice)
    tokenizer = load_tokenizer(config.model)
    seen = config
    if limited:
        seen = config.model_copy(update={"data": config.data.model_copy(update={"max_samples": rows, "cache": False})})
    data = load_data(seen, tokenizer, console)
    found = describe(data, config, tokenizer, count, first=rows if limited and data.train.rows == rows else None)
    if as_json:
        print(json.dumps(found, indent=1))  # ASCII alone: any stdout can write it
    else:
        show(found, console)


def describe(
    data: "Datasets", config: Config, tokenizer: Any, count: int, *, first: int | None = None
) -> dict[str, Any]:
    """All that is shown, as JSON. first: the rows that all of it is of; None: of all."""
    train = data.train
    return {
        "first_rows": first, "rows": train.rows, "samples": len(train.samples), "tokens": train.num_tokens,
        "label_tokens": train.num_label_tokens, "formats": dict(train.formats), "template": config.data.template,
        "labels": config.data.labels, "lengths": lengths_of(train), "packing": packing_of(train, config),
        "problems": list(problems(train, config, tokenizer)),
        "shown": [shown(train.samples[i], int(train.samples.rows[i]) + 1, tokenizer)
                  for i in range(min(count, len(train.samples)))],
    }  # fmt: skip


def lengths_of(data: EncodedData) -> dict[str, Any]:
    """histogram: [from, to, samples] of each bin, both ends within it."""
    lengths = data.lengths
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 1]).round().astype(int).tolist()
    bins = [[int(a), min(int(b) - 1, high), int(n)] for (a, b), n in zip(pairwise(edges), counts, strict=True)]
    return dict(zip(("shortest", "median", "90 %", "longest"), quantiles, strict=True)) | {"histogram": bins}


def packing_of(data: EncodedData, config: Config) -> dict[str, Any]:
    """Rows of an epoch, and the share of their positions that is padding: as configured, and the other way."""
    lengths, longest = data.lengths, config.data.max_length
    packs = len(pack(lengths, longest))
    tokens = data.num_tokens
    batch = config.train.per_device_train_batch_size
    steps = num_steps_per_epoch(
        data, micro_rows=batch, accumulation=config.train.gradient_accumulation_steps, packing=config.data.packing,
        max_length=longest,
    )  # fmt: skip
    return {
        "packing": config.data.packing, "steps_per_epoch": steps,
        "packed": {"rows": packs, "length": longest, "padding": 1 - tokens / (packs * longest)},
        "padded to max_length": {"rows": len(lengths), "padding": 1 - tokens / (len(lengths) * longest)},
    }  # fmt: skip


def problems(data: EncodedData, config: Config, tokenizer: Any) -> Iterator[str]:
    """What a run would go on with, and its user might not want; the most telling first."""
    settings = config.data
    share = data.num_label_tokens / data.num_tokens
    if share < FEW_LABELS:
        yield f"only {share:.2%} of the tokens are labels: is data.labels or the template what you want?"
    if data.lost_label_tokens:
        lost = data.lost_label_tokens / data.given_label_tokens
        yield f"{lost:.1%} of the label tokens are lost at data.max_length={settings.max_length}"
    if data.dropped:
        yield f"{data.dropped:,} of {data.rows:,} rows are left out for their length"
    if data.empty:
        yield f"{data.empty:,} rows have an empty response, the first is row {data.first_empty:,}: left out"
    if settings.add_eos:
        open_ended = int((data.samples.ids[data.samples.ends - 1] != tokenizer.eos_token_id).sum())
        if open_ended:
            yield (
                f"{open_ended:,} samples do not end with the tokenizer's EOS ({tokenizer.eos_token}): cut, or "
                "the chat template ends a turn with another mark"
            )
    if (unknown := tokenizer.unk_token_id) is not None and unknown != tokenizer.eos_token_id:
        count = int((data.samples.ids == unknown).sum())
        if count:
            yield f"{count:,} tokens are the tokenizer's {tokenizer.unk_token}: it cannot spell all of the data"


def shown(sample: Sample, row: int, tokenizer: Any) -> dict[str, Any]:
    """row: from 1, as in all messages. pieces: the decoded text in runs of tokens that are taught or are not."""
    taught = np.zeros(len(sample.input_ids), dtype=bool)
    taught[sample.label_positions()] = True
    edges = [0, *(np.flatnonzero(np.diff(taught)) + 1).tolist(), len(taught)]
    pieces = [
        {"text": tokenizer.decode(sample.input_ids[a:b], skip_special_tokens=False), "taught": bool(taught[a])}
        for a, b in pairwise(edges)
    ]
    return {"row": row, "tokens": len(sample.input_ids), "label_tokens": sample.num_labels, "pieces": pieces}


def show(found: dict[str, Any], console: Console) -> None:
    unicode = console.rich.encoding.lower().startswith("utf")
    for sample in found["shown"]:
        show_sample(sample, console, TAUGHT if unicode else TAUGHT_ASCII)
    console.line("")
    first = found["first_rows"]
    if first is not None:
        console.line(f"of the first {first:,} rows alone (--rows 0: of all):")
    show_lengths(found["lengths"], console, BAR if unicode else BAR_ASCII)
    packing = found["packing"]
    packed, padded = packing["packed"], packing["padded to max_length"]
    console.line(
        f"packing: {found['samples']:,} samples in {packed['rows']:,} rows of {packed['length']:,}, "
        f"{packed['padding']:.1%} padding (a sample a row: {padded['padding']:.1%}); "
        f"{packing['steps_per_epoch']:,} steps an epoch"
        + ("" if first is None else f" of these {first:,} rows")
        + ("" if packing["packing"] else "; data.packing is off")
    )
    for number, problem in enumerate(found["problems"]):
        console.notice(f"{'first problem' if number == 0 else 'problem'}: {problem}")
    if not found["problems"]:
        console.line("no problem found")


def show_sample(sample: dict[str, Any], console: Console, marks: tuple[str, str]) -> None:
    """marks: around what is taught, where there are no colours."""
    coloured = console.rich.is_terminal and not console.rich.no_color
    console.line(f"\n--- row {sample['row']:,}: {sample['tokens']:,} tokens, {sample['label_tokens']:,} taught ---")
    text = Text()
    for piece in sample["pieces"]:
        taught = piece["taught"]
        opening, closing = marks if taught and not coloured else ("", "")
        text.append(f"{opening}{visible(piece['text'])}{closing}", style="green" if taught else "dim")
    console.rich.print(text, soft_wrap=True)


def show_lengths(lengths: dict[str, Any], console: Console, bar: str) -> None:
    quantiles = ", ".join(f"{name} {value:,}" for name, value in lengths.items() if name != "histogram")
    table = Table("tokens", "samples", "", box=SIMPLE, title=f"length: {quantiles}", title_justify="left")
    most = max(count for *_, count in lengths["histogram"])
    for low, high, count in lengths["histogram"]:
        table.add_row(f"{low:,} .. {high:,}", f"{count:,}", bar * round(40 * count / most))
    console.rich.print(table)
