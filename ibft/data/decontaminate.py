"""`ibft-fast decontaminate`: rows of training data that give evaluation problems away, and rows that are there twice.

Of a suite's problem two things are looked for: what a model is asked (task, module header, MBPP's asserts) and the
reference solution; hidden tests are not. The statements of VerilogEval v1 are in a file of their own
(VerilogDescription_*.jsonl), which can be given as rows. How texts and rows are compared: `ibft.data.overlap`.

The file of `--out` can be given to a training run as data.drop_ids. It is one JSON object:

    {"kind": "ibft-fast overlap", "data": path or hub id, "split": its split, "data_sha256": of all rows of the data (as
     in a run's manifest), "rows": how many these are, "n": words of an n-gram, "against": [as given],
     "ids": [numbers of rows to drop, from 0, ascending: the contaminated ones, and of equal rows all but the first],
     "overlaps": [{"row", "against", "problem", "where": prompt, solution or text, "words": shared}],
     "duplicates": [[numbers of equal rows]]}
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ibft.config import BUNDLED
from ibft.data.formats import Tokens
from ibft.data.ids import hash_rows
from ibft.data.overlap import (
    LEAST,
    MOST,
    Index,
    N,
    Overlap,
    Source,
    Where,
    build_index,
    find_duplicates,
    find_overlaps,
    read_content,
    strings_of,
)
from ibft.data.sources import Row
from ibft.data.visible import replace_unknown, visible
from ibft.errors import ConfigError, DataError
from ibft.evaluation.suites import SUITES, Problem, Suite, load_problems, suite_of

if TYPE_CHECKING:
    from ibft.console import Console

OPTION = "--against"
# what a problem asks, in any suite
ASKED = ("prompt", "instruction", "input", "text", "question", "detail_description")
SHOWN = 5  # examples of each entry


@dataclass(frozen=True)
class Against:
    """One entry of --against. suite: None for rows, whose keys are not known."""

    entry: str
    suite: Suite | None
    path: str | None


@dataclass(frozen=True)
class Found:
    """sources: of the texts of each entry of --against, by entry. tokenised: rows of token ids, which have no words to
    compare with those."""

    index: Index
    sources: dict[str, set[Source]]
    overlaps: list[Overlap]
    duplicates: list[list[int]]
    tokenised: int = 0

    @property
    def contaminated(self) -> set[int]:
        return {overlap.row for overlap in self.overlaps}

    @property
    def surplus(self) -> set[int]:
        return {row for group in self.duplicates for row in group[1:]}


@dataclass(frozen=True)
class Drops:
    """Numbers of rows, from 0; a row can be in both. duplicates: of equal rows all but the first. summary: one line."""

    contaminated: set[int]
    duplicates: set[int]
    summary: str


def run_decontaminate(
    data: str, against: Sequence[str] = (), *, split: str = "train", n: int = N, out: str | None = None
) -> None:
    """Prints which rows overlap with which problems and how many are there twice; writes the rows to drop to `out`.

    Args:
        data: file, hub id or `bundled:tiny`. split: of a hub data set or the bundled one.
        against: SUITE (its problems on the hub), SUITE=PATH, or a file, hub id (its split `test`) or `bundled:tiny`
            of rows, all of whose text is looked for.
        n: words that a row must share with a problem.
        out: file of ids; not written where there is nothing to drop.

    Raises:
        ConfigError: an argument is malformed or out of range; `out` is there already.
        DataError: rows or problems cannot be read; `out` cannot be written.
        SetupError: a hub id cannot be read.
    """
    from ibft.console import Console

    if out is not None and exists(out):
        raise ConfigError(f"--out: {out} is there already: name another file")
    entries = read_against(against, OPTION)
    check_n(n)
    rows = load(data, split)
    replace_unknown(sys.stdout)
    console = Console()
    console.line(f"decontaminate: {len(rows):,} rows of {data}, rows count from 0")
    with console.progress("rows", len(rows)) as advance:
        found = search(rows, entries, n, deduplicate=True, advance=advance)
    if found.tokenised:
        console.notice(
            f"{found.tokenised:,} of {len(rows):,} rows are token ids, which cannot be compared with problems: give "
            "the text that they were made of"
        )
    show(found, n, console)
    if not against:
        console.notice("contamination was not looked for: name problems with --against")
    drop = found.contaminated | found.surplus
    console.line(
        f"to drop: {len(drop):,} of {len(rows):,} rows ({len(found.contaminated):,} contaminated, "
        f"{len(found.surplus):,} equal to an earlier one)"
    )
    if out is None:
        return
    if not drop:
        console.notice(f"nothing to drop: {out} is not written, since training refuses an empty list of ids")
        return
    about = {"kind": "ibft-fast overlap", "data": data, "split": split, "data_sha256": hash_rows(rows)}
    write_ids(out, about | {"rows": len(rows), "n": n, "against": list(found.sources)}, found)
    console.line(f"ids: {out}, for data.drop_ids")


def rows_to_drop(
    rows: Sequence[Row],
    against: Sequence[str],
    n: int = N,
    *,
    deduplicate: bool = True,
    option: str = OPTION,
    fields: Mapping[str, str] | None = None,
    whole: bool = False,
) -> Drops:
    """Rows that a training run leaves out.

    Args:
        against: as of `run_decontaminate`; empty: no row is contaminated. deduplicate: False: none is a duplicate.
        option: names `against` in messages.
        fields, whole: as of `find_duplicates`.

    Raises:
        ConfigError: an entry of `against` is malformed; n is out of range. DataError, SetupError: one cannot be read.
    """
    check_n(n)
    found = search(rows, read_against(against, option), n, deduplicate=deduplicate, fields=fields, whole=whole)
    said = []
    if against:
        said.append(
            f"{len(found.contaminated):,} share words with {', '.join(labels_of(list(found.sources)).values())}"
        )
    if deduplicate:
        said.append(f"{len(found.surplus):,} are equal to an earlier one")
    summary = f"of {len(rows):,} rows {' and '.join(said) or 'none is looked at'}"
    if found.tokenised:
        summary += f"; {found.tokenised:,} are token ids, which cannot be compared with problems"
    return Drops(found.contaminated, found.surplus, summary)


def check_n(n: int) -> None:
    if n < LEAST:
        raise ConfigError(f"--n: got {n}, expected {LEAST} or more: shorter runs of words are shared by chance")


# --- what to look for -----------------------------------------------------------------------------


def read_against(entries: Sequence[str], option: str) -> list[Against]:
    """Each once, in their order. option: names them in messages.

    Raises:
        ConfigError: one is neither SUITE, SUITE=PATH nor a possible file or hub id; or a suite that needs a file has
            none.
    """
    return [_read_entry(entry, option) for entry in dict.fromkeys(entries)]


def _read_entry(entry: str, option: str) -> Against:
    name, equals, path = entry.partition("=")
    if name in SUITES:
        suite = suite_of(name)
        if equals and not path:
            raise ConfigError(f"{option}: got {entry}, expected a file after the =")
        if not path and suite.hub is None:
            raise ConfigError(f"{option}: {name} needs a file: {name}=PATH")
        return Against(entry, suite, path or None)
    # a bare word is a misspelt suite sooner than a file or one of the hub's few ids without an owner
    is_rows = entry == BUNDLED or exists(entry) or (not equals and ("/" in entry or "." in entry))
    if not is_rows:
        raise ConfigError(
            f"{option}: got {entry or 'nothing'}, expected SUITE or SUITE=PATH ({', '.join(SUITES)}), a file, "
            "or a hub id (owner/name)"
        )
    return Against(entry, None, entry)


def exists(path: str) -> bool:
    """Without the errors of pathlib, which raises for what is too long for a path or names nobody's home."""
    return os.path.exists(os.path.expanduser(path))


def load(data: str, split: str) -> list[Row]:
    from ibft.analysis.memorization import load_data

    return load_data(data, split)[0]


def texts_of(against: Against) -> list[tuple[Source, str]]:
    """All texts to look for. A row's name is its task_id, where it has one."""
    if against.suite is not None:
        problems = load_problems(against.suite, against.path).values()
        return [text for problem in problems for text in texts_of_problem(against.entry, against.suite, problem)]
    texts = []
    for number, row in enumerate(load(against.entry, "test")):
        name = f"row {number}" if row.get("task_id") is None else str(row["task_id"])
        own = [text for key, value in row.items() if key != "task_id" for text in strings_of(value)]
        texts += [(Source(against.entry, name, "text"), text) for text in own or [""]]
    return texts


def texts_of_problem(entry: str, suite: Suite, problem: Problem) -> Iterator[tuple[Source, str]]:
    """A problem without a reference solution has an empty one, which is counted with the short ones."""
    shown = [problem[key] for key in ASKED if isinstance(problem.get(key), str)]
    if "test_list" in suite.lists:
        shown.append("\n".join(problem["test_list"]))
    solution = problem.get(suite.canonical, problem.get("ref"))
    wheres: tuple[tuple[Where, list[str]], ...] = (
        ("prompt", shown),
        ("solution", [solution if isinstance(solution, str) else ""]),
    )
    for where, texts in wheres:
        for text in texts:
            yield Source(entry, problem["task_id"], where), text


def search(
    rows: Sequence[Row],
    against: Sequence[Against],
    n: int,
    *,
    deduplicate: bool,
    fields: Mapping[str, str] | None = None,
    whole: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Found:
    """fields, whole: as of `find_duplicates`. advance: called with the number of rows done."""

    def row_texts() -> Iterator[str]:
        for number, row in enumerate(rows):
            if advance is not None and number % 1000 == 0:
                advance(number)
            yield "\n".join(strings_of(row))

    texts = {entry.entry: texts_of(entry) for entry in against}
    index = build_index(chain.from_iterable(texts.values()), n)
    sources = {entry: {source for source, _ in own} for entry, own in texts.items()}
    overlaps = find_overlaps(row_texts(), index) if against else []
    duplicates = find_duplicates(rows, fields, whole=whole) if deduplicate else []
    tokenised = sum(isinstance(read_content(row, fields), Tokens) for row in rows) if against else 0
    return Found(index, sources, overlaps, duplicates, tokenised)


# --- what was found -------------------------------------------------------------------------------


def show(found: Found, n: int, console: "Console") -> None:
    labels = labels_of(list(found.sources))
    for entry, label in labels.items():
        show_unmatched(found.index, entry, label, console)
    if labels:
        show_counts(found, labels, n, console)
    for entry, label in labels.items():
        show_examples([overlap for overlap in found.overlaps if overlap.source.suite == entry], label, console)
    groups, surplus = len(found.duplicates), len(found.surplus)
    console.line(f"duplicates: {groups:,} groups of equal rows, {surplus:,} rows besides the first of each")
    for group in found.duplicates[:SHOWN]:
        rest = f" and {len(group) - SHOWN:,} more" if len(group) > SHOWN else ""
        console.line(f"  rows {', '.join(map(str, group[:SHOWN]))}{rest}")


def labels_of(entries: Sequence[str]) -> dict[str, str]:
    """The entries without folders, where that leaves them apart."""
    short = {entry: without_folders(entry) for entry in entries}
    return {entry: label if list(short.values()).count(label) == 1 else entry for entry, label in short.items()}


def without_folders(entry: str) -> str:
    name, equals, path = entry.rpartition("=")
    return f"{name}{equals}{Path(path).name if exists(path) else path}"


def show_unmatched(index: Index, entry: str, label: str, console: "Console") -> None:
    for sources, why in (
        (index.too_short, f"with fewer than {LEAST} words"),
        (index.too_common, f"of which every run of words is in more than {MOST} problems"),
    ):
        count = Counter(source.where for source in sources if source.suite == entry)
        for where, number in sorted(count.items()):
            console.notice(f"{label}: not looked for: {number:,} {where}{'s' if number > 1 else ''} {why}")


def show_counts(found: Found, labels: dict[str, str], n: int, console: "Console") -> None:
    """A column for each kind of text that was looked for, empty where the entry has none of it."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    kinds = {entry: {source.where for source in sources} for entry, sources in found.sources.items()}
    wheres = [where for where in get_args(Where) if any(where in kind for kind in kinds.values())]
    table = Table("", "problems", "found", *(f"{where} rows" for where in wheres), box=SIMPLE)
    table.columns[0].overflow = "fold"
    for entry, label in labels.items():
        own = [overlap for overlap in found.overlaps if overlap.source.suite == entry]
        rows = {where: len({overlap.row for overlap in own if overlap.source.where == where}) for where in kinds[entry]}
        table.add_row(
            escape(label),
            f"{len({source.problem for source in found.sources[entry]}):,}",
            f"{len({overlap.source.problem for overlap in own}):,}",
            *(f"{rows[where]:,}" if where in rows else "" for where in wheres),
        )
    console.line(f"found: problems that share {n} words, or a whole shorter text, with a row; in how many rows:")
    console.rich.print(table, soft_wrap=False)


def show_examples(overlaps: Sequence[Overlap], label: str, console: "Console") -> None:
    """Of different problems, a line each, cut to the width."""
    first: dict[str, Overlap] = {}
    for overlap in overlaps:
        first.setdefault(overlap.source.problem, overlap)
    if first:
        console.line(f"{label}, for example:")
    for overlap in list(first.values())[:SHOWN]:
        line = visible(f"  row {overlap.row}, {overlap.source.problem}, {overlap.source.where}: {overlap.words}")
        width = console.rich.width
        console.line(line if len(line) <= width else line[: width - 1] + "…")


def write_ids(out: str, about: dict[str, Any], found: Found) -> None:
    """Raises DataError: it cannot be written."""
    overlaps = [
        {"row": overlap.row, "against": overlap.source.suite, "problem": overlap.source.problem,
         "where": overlap.source.where, "words": overlap.words}
        for overlap in found.overlaps
    ]  # fmt: skip
    ids = sorted(found.contaminated | found.surplus)
    content = {**about, "ids": ids, "overlaps": overlaps, "duplicates": found.duplicates}
    path = Path(os.path.expanduser(out))
    fresh = path.with_name(f".{path.name}.new")  # whoever finds the file finds all of it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise DataError(f"--out: {out}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            fresh.unlink()
