"""samples.jsonl: what is to be sampled, in which order, and going on after a stop.

All samples stand in one list, temperature by temperature, problem by problem, sample by sample; the list is cut into
batches from its start, and the file is a prefix of it:

    sample  {task_id, sample, temperature, seed, completion, raw, prompt_style}       a line, flushed batch by batch
    seed    the first 8 bytes of sha256("{run seed}:{task_id}:{temperature}:{sample}"), big-endian

On going on, the batch in which the file ends is made again as a whole, and what is missing of it is written: each
sample comes from the very batch that it would have come from without the stop. What the samples depend on besides is
kept in `<out>.json`; a file that was made otherwise is refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.engines import Engine, Request
from ibft.evaluation.prompts import Prompt, Style, extract

Settings = Mapping[str, Any]  # as JSON holds them
Progress = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass(frozen=True)
class Wanted:
    """A sample to be made."""

    task_id: str
    sample: int
    temperature: float
    seed: int

    def head(self) -> dict[str, Any]:
        return {"task_id": self.task_id, "sample": self.sample, "temperature": self.temperature, "seed": self.seed}


def seed_of(run_seed: int, task_id: str, temperature: float, sample: int) -> int:
    text = f"{run_seed}:{task_id}:{temperature}:{sample}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def all_wanted(task_ids: Sequence[str], n: int, temperatures: Sequence[float], run_seed: int) -> list[Wanted]:
    """In the order of the file."""
    return [
        Wanted(task_id, sample, temperature, seed_of(run_seed, task_id, temperature, sample))
        for temperature in temperatures
        for task_id in task_ids
        for sample in range(n)
    ]


@dataclass(frozen=True)
class SampleFile:
    path: Path

    @property
    def settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def begin(self, settings: Settings, wanted: Sequence[Wanted]) -> int:
        """How many samples are there already. A torn last line is cut off; the settings are written where none is.

        Raises:
            ConfigError: it was made with other settings, or holds other samples. DataError: it is no file of samples.
            SetupError: it cannot be read or written.
        """
        with _file_errors(self.path):
            there = self.path.read_bytes() if self.path.exists() else b""
            kept = there[: there.rfind(b"\n") + 1]
            before = self._settings_before()
            if there:
                self._check_settings(before, settings)
                self._check_rows(kept, wanted)
            else:
                self._write_settings(settings)
            if kept != there or not self.path.exists():
                with self.path.open("ab") as file:
                    file.truncate(len(kept))
        return kept.count(b"\n")

    def fill(
        self,
        engine: Callable[[], Engine],
        prompts: Mapping[str, Prompt],
        wanted: Sequence[Wanted],
        done: int,
        *,
        style: Style,
        suite: str,
        batch_size: int,
        progress: Progress | None = None,
    ) -> int:
        """Makes and writes what follows the first `done`; returns how many of these completions are empty.

        engine: makes the engine, if there is anything to do. prompts: by task_id.
        """
        empty = 0
        if done == len(wanted):
            return empty
        made = engine()
        with self.path.open("a", encoding="utf-8") as file:
            for start in range(done - done % batch_size, len(wanted), batch_size):
                batch = wanted[start : start + batch_size]
                texts = made.complete([Request(prompts[w.task_id], w.temperature, w.seed) for w in batch])
                missing = slice(max(done - start, 0), None)
                lines = []
                for each, raw in zip(batch[missing], texts[missing], strict=True):
                    completion = extract(style, suite, raw)
                    empty += not completion.strip()
                    lines.append(
                        json.dumps(each.head() | {"completion": completion, "raw": raw, "prompt_style": style})
                    )
                with _file_errors(self.path):
                    file.write("".join(line + "\n" for line in lines))
                    file.flush()
                if progress is not None:
                    progress(start + len(batch), len(wanted))
        return empty

    def _settings_before(self) -> dict[str, Any] | None:
        if not self.settings_path.exists():
            return None
        try:
            before = json.loads(self.settings_path.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict) or "prompt_style" not in before:  # whatever it is, it is not ours to replace
            raise ConfigError(
                f"--out: {self.settings_path}, where the settings belong, is another file: name another --out"
            )
        return before

    def _check_settings(self, before: dict[str, Any] | None, settings: Settings) -> None:
        if before is None:
            raise ConfigError(
                f"--out: {self.path} is there without its settings ({self.settings_path}): name another file"
            )
        now = json.loads(json.dumps(settings))
        if differ := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            told = "; ".join(f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}" for name in differ)
            raise ConfigError(f"--out: {self.path} was made with other settings ({told}): name another file")

    def _check_rows(self, text: bytes, wanted: Sequence[Wanted]) -> None:
        lines = text.decode("utf-8", "replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{self.path}, line {number}: expected a sample as a JSON object")
            head = wanted[number - 1].head() if number <= len(wanted) else {}
            if not head or any(row.get(name) != value for name, value in head.items()):
                raise ConfigError(
                    f"--out: {self.path}, line {number} is not the sample that belongs there: name another file"
                )

    def _write_settings(self, settings: Settings) -> None:
        fresh = self.settings_path.with_name(self.settings_path.name + ".new")
        fresh.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, self.settings_path)


class _file_errors:
    """Turns a full disk or a missing right into a SetupError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise SetupError(f"--out: {self.path}: {error.strerror or error}") from error


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
