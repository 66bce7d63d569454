"""The data of a run: rows chosen, encoded, split into training and held-out samples; from the cache if it has them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibft.config import BUNDLED, Config, DataConfig
from ibft.console import Console
from ibft.data import cache
from ibft.data.encode import EncodedData, encode_rows
from ibft.data.ids import choose_numbers, hash_rows
from ibft.data.sources import Row, files_of, load_rows, open_hub
from ibft.data.templates import choose_template
from ibft.errors import DataError
from ibft.hashes import hash_file

MAX_HELD_OUT = 512
# settings of data that decide what `encode_rows` is given and does
DECIDING = (
    "max_length", "add_eos", "template", "labels", "truncation", "max_samples", "decontaminate", "deduplicate",
)  # fmt: skip


@dataclass
class Datasets:
    """sha256: of the training rows (`ibft.data.ids.hash_rows`)."""

    train: EncodedData
    held_out: EncodedData | None
    sha256: str


def load_data(config: Config, tokenizer: Any, console: Console) -> Datasets:
    """Training and held-out rows, encoded.

    Raises:
        DataError: missing, malformed, empty, or no row with a label.
    """
    from ibft.tiny import task_file

    settings = config.data
    train_path = str(task_file("train")) if settings.path == BUNDLED else settings.path
    train, digest = prepare(train_path, settings, tokenizer, console, "training data", chosen=True)
    held_out = None
    if settings.eval_path is not None or settings.path == BUNDLED:
        path = str(task_file("validation")) if settings.eval_path in (None, BUNDLED) else str(settings.eval_path)
        of = settings.model_copy(update={"split": settings.eval_split or settings.split})
        held_out, _ = prepare(path, of, tokenizer, console, "held-out data")
    elif settings.val_size > 0 and (rows := len(np.unique(train.samples.rows))) > 1:
        train, held_out = hold_out(train, min(max(1, round(settings.val_size * rows)), MAX_HELD_OUT, rows - 1))
        console.data("held-out data", f"{len(held_out.samples)} of these samples, drawn at random (data.val_size)")
    return Datasets(train, held_out, digest)


def prepare(
    path: str, settings: DataConfig, tokenizer: Any, console: Console, what: str, *, chosen: bool = False
) -> tuple[EncodedData, str]:
    """The rows of a file or hub id, encoded, and their hash. chosen: those that `data` keeps of the training rows."""
    bundled = settings.path == BUNDLED
    key = None if bundled or not settings.cache else key_for(path, settings, tokenizer, chosen=chosen)
    found = None
    if key is None:
        data, more = encode(path, settings, tokenizer, console, what, chosen=chosen)
    else:
        waiting = partial(console.notice, f"another process prepares this {what}: waiting for it")
        with cache.turn(key, waiting):
            found = cache.read(key)
            data, more = found or encode(path, settings, tokenizer, console, what, chosen=chosen)
            if found is None and (fault := cache.write(key, data, more)):
                console.notice(f"the encoded data could not be cached: {fault}")
    for note in more["notes"]:
        console.data("rows", note)
    cached = " (cached)" if found is not None else ""
    if chosen:
        console.data("format", f"{data.described()}; template {settings.template}, labels: {settings.labels}")
    console.data(what, data.summary() + cached)
    return data, more["sha256"]


def encode(
    path: str, settings: DataConfig, tokenizer: Any, console: Console, what: str, *, chosen: bool
) -> tuple[EncodedData, dict[str, Any]]:
    """As `prepare`, without the cache; with the data what the cache keeps beside it: "notes" and "sha256"."""
    rows = load_rows(path, split=settings.split)
    notes: list[str] = []
    numbers = None
    if chosen:
        numbers, notes = choose(rows, settings)
        rows = [rows[number] for number in numbers]
    digest = hash_rows(rows)
    try:
        with console.progress(f"tokenising {what}", len(rows)) as advance:
            data = encode_rows(
                rows, tokenizer, max_length=settings.max_length, add_eos=settings.add_eos,
                template=settings.template, labels=settings.labels, truncation=settings.truncation,
                fields=settings.fields.given(), numbers=numbers, progress=advance,
            )  # fmt: skip
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return data, {"notes": notes, "sha256": digest}


def choose(rows: Sequence[Row], settings: DataConfig) -> tuple[list[int], list[str]]:
    """Numbers, from 0, of the rows that are left by ids, duplicates, decontamination and max_samples; and what there is
    to say."""
    left = choose_numbers(rows, settings.path, keep=settings.keep_ids, drop=settings.drop_ids)
    notes = []
    if settings.decontaminate or settings.deduplicate:
        from ibft.data.decontaminate import rows_to_drop

        drops = rows_to_drop(
            [rows[number] for number in left], settings.decontaminate, deduplicate=settings.deduplicate,
            option="data.decontaminate", fields=settings.fields.given(),
            whole=settings.template not in ("auto", "released", "alpaca", "chat"),  # a file may read any key
        )  # fmt: skip
        gone = drops.contaminated | drops.duplicates
        if len(gone) == len(left):
            raise DataError(f"data.decontaminate and data.deduplicate leave no row of {settings.path}")
        left = [number for place, number in enumerate(left) if place not in gone]
        notes.append(drops.summary)
    kept = left[: settings.max_samples]
    if len(kept) < len(rows):
        names = [name for name in ("keep_ids", "drop_ids", "decontaminate", "deduplicate") if getattr(settings, name)]
        by = [f"data.{name}" for name in [*names, *(["max_samples"] if len(kept) < len(left) else [])]]
        notes.insert(0, f"{len(kept):,} of {len(rows):,} rows ({', '.join(by)})")
    return kept, notes


def key_for(path: str, settings: DataConfig, tokenizer: Any, *, chosen: bool) -> str:
    """Of the cache: all that `prepare` depends on.

    Raises:
        DataError, SetupError: as `load_rows`, of a folder without data, or of a hub id.
    """
    ids = {"data.keep_ids": settings.keep_ids, "data.drop_ids": settings.drop_ids} if chosen else {}
    problems = []
    if chosen and settings.decontaminate:
        from ibft.data.decontaminate import read_against

        problems = [each.path for each in read_against(settings.decontaminate, "data.decontaminate")]
    template = None if settings.template == "auto" else choose_template(settings.template, tokenizer).source
    return cache.key_of({
        "content": content_of(path, settings.split), "split": settings.split,
        "tokenizer": cache.tokenizer_key(tokenizer), "settings": {name: getattr(settings, name) for name in DECIDING},
        "fields": settings.fields.given(), "chosen": chosen, "template": template,
        "ids": [None if file is None else content_of_file(option, file) for option, file in ids.items()],
        "against": [content_of_problems(path) for path in problems if path is not None],
    })  # fmt: skip


def content_of(path: str, split: str) -> list[Any]:
    """What tells the rows of a file, folder or hub id from others without parsing them: kinds and hashes of files."""
    files = files_of(path, split=split)
    if files is None:
        return [open_hub(path, split)._fingerprint]
    return [("".join(file.suffixes).lower(), hash_file(file)) for file in files]


def content_of_file(option: str, file: str) -> str:
    """Raises DataError: it cannot be read. Cached rows must not hide that."""
    digest = hash_file(file)
    if digest is None:
        reason = "No such file" if not Path(file).expanduser().exists() else "cannot be read"
        raise DataError(f"{option}: {file}: {reason}")
    return digest


def content_of_problems(path: str) -> Any:
    """Of a file, or of all files of a folder, whatever their kind; a hub id tells itself apart."""
    place = Path(path).expanduser()
    if place.is_dir():
        return [(str(file.relative_to(place)), hash_file(file)) for file in sorted(place.rglob("*")) if file.is_file()]
    return [path, hash_file(place)]


def hold_out(data: EncodedData, count: int) -> tuple[EncodedData, EncodedData]:
    """Samples split into (the rest, those of `count` rows drawn at random); always the same draw, whatever the run's
    seed. What a long row was split into stays together."""
    rows = np.unique(data.samples.rows)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].numpy()
    out = np.isin(data.samples.rows, rows[drawn])
    return tuple(  # type: ignore[return-value]
        dataclasses.replace(data, samples=data.samples.select(np.flatnonzero(numbers))) for numbers in (~out, out)
    )
