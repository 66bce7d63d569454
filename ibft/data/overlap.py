"""Which rows of a data set share a run of words with evaluation problems, and which say the same as each other.

Words are the lower-cased runs of letters, digits and underscores. All else is left out, operators too, as in GPT-3's
analysis (Brown et al. 2020, arXiv 2005.14165, appendix C): a copy that was formatted anew, quoted otherwise or put on
one line is still a copy. The price is that `a & b` and `a | b` are the same words, so that short code says little.

Hence the two lengths, which are GPT-3's bounds of its n:

    N = 13      words that a row must share with a longer text
    LEAST = 8   a text of fewer than N words is looked for whole; one of fewer than LEAST is not looked for

What they rest on here: of 4,535 CodeAlpaca rows 49 share ten words with HumanEval, most of them only a phrase such as
"function that takes a string as input and returns the"; nine share thirteen (or a whole shorter solution): seven times
the loop that tests for a prime, twice a problem's own task (Heron's formula, the greatest common divisor). With LEAST =
5, VerilogEval is found wherever a module ends in `assign out = a & b; endmodule`.

An n-gram in more than MOST problems of one suite is what its problems have in common (a module's header, "you are
given a list of"), and is not looked for. Suites are counted apart, since several hold the same problems.

Not found is what was reworded: renamed variables, a translated task. Text without spaces is one word. Rows of token
ids have no words.

Equal are rows of which the same is read (`ibft.data.formats`), under whatever id; of no known format, whole rows.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ibft.data.formats import Content, read_row
from ibft.data.sources import Row
from ibft.errors import DataError

N, LEAST, MOST = 13, 8, 3

Where = Literal["prompt", "solution", "text"]
Words = tuple[str, ...]

WORD = re.compile(r"\w+")


class Source(NamedTuple):
    """Of a text: suite names what its problem is counted with. where: text, where the two are not told apart."""

    suite: str
    problem: str
    where: Where


@dataclass(frozen=True)
class Index:
    """sources: of each n-gram, where it is from. lengths: of the n-grams that begin with these `least` words.
    too_short, too_common: sources of which nothing is looked for."""

    sources: Mapping[Words, Sequence[Source]]
    lengths: Mapping[Words, Sequence[int]]
    least: int
    too_short: Sequence[Source]
    too_common: Sequence[Source]


@dataclass(frozen=True)
class Overlap:
    """row: its number, from 0. words: the shared ones, a space between them."""

    row: int
    source: Source
    words: str


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def windows(words: Sequence[str], n: int) -> Iterator[Words]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def build_index(texts: Iterable[tuple[Source, str]], n: int = N, *, least: int = LEAST, most: int = MOST) -> Index:
    """Of evaluation texts; a source may have several. It takes about 400 bytes a word of them.

    Raises ValueError: n is less than `least`.
    """
    if not 1 <= least <= n:
        raise ValueError(f"n: got {n}, expected {least} or more")
    found: dict[Words, list[Source]] = defaultdict(list)
    longest: dict[Source, int] = {}
    for source, text in texts:
        words = words_of(text)
        longest[source] = max(longest.get(source, 0), len(words))
        for gram in windows(words, min(n, len(words))) if len(words) >= least else ():
            if source not in found[gram]:
                found[gram].append(source)
    sources = {gram: rare for gram, sharing in found.items() if (rare := without_common(sharing, most))}
    lengths: dict[Words, set[int]] = defaultdict(set)
    for gram in sources:
        lengths[gram[:least]].add(len(gram))
    looked_for = {source for rare in sources.values() for source in rare}
    return Index(
        sources,
        {head: sorted(of_head) for head, of_head in lengths.items()},
        least,
        too_short=[source for source, length in longest.items() if length < least],
        too_common=[source for source, length in longest.items() if length >= least and source not in looked_for],
    )


def without_common(sources: Sequence[Source], most: int) -> Sequence[Source]:
    """Those of suites in which no more than `most` problems share the n-gram."""
    if len(sources) <= most:
        return sources
    sharing = Counter(suite for suite, _ in {(source.suite, source.problem) for source in sources})
    return [source for source in sources if sharing[source.suite] <= most]


def find_overlaps(row_texts: Iterable[str], index: Index) -> list[Overlap]:
    """By row, and there in the order of its words: of each source the first n-gram that the row shares with it."""
    overlaps = []
    for row, text in enumerate(row_texts):
        words = words_of(text)
        first: dict[Source, Words] = {}
        for start, head in enumerate(windows(words, index.least)):
            for length in index.lengths.get(head, ()):
                gram = tuple(words[start : start + length])
                for source in index.sources.get(gram, ()):
                    first.setdefault(source, gram)
        overlaps += [Overlap(row, source, " ".join(gram)) for source, gram in first.items()]
    return overlaps


def read_content(row: Row, fields: Mapping[str, str] | None = None) -> Content | None:
    """What the row says, whatever else it holds; None: it is of no known format. fields: as of `read_row`."""
    try:
        return read_row(row, fields=fields)[0]
    except DataError:
        return None


def find_duplicates(
    rows: Iterable[Row], fields: Mapping[str, str] | None = None, *, whole: bool = False
) -> list[list[int]]:
    """Numbers of rows that say the same: groups of two or more, ascending, by the first of each.

    Args:
        fields: as of `ibft.data.formats.read_row`.
        whole: compare whole rows, whatever the order of their keys, as is done with those of no known format.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        content = None if whole else read_content(row, fields)
        compared = [type(content).__name__, row if content is None else vars(content)]
        text = json.dumps(compared, sort_keys=True, default=str)
        groups[hashlib.sha256(text.encode()).digest()].append(number)
    return [group for group in groups.values() if len(group) > 1]


def strings_of(value: object) -> Iterator[str]:
    """All text in it, however deep in lists and objects (of these the values)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings_of(item)
