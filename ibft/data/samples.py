"""Token ids of samples and which of them are taught; many of them in a few flat arrays.

A sample is a prompt and then tokens that are taught, but for gaps (a user's later turns). 200,000 samples of Python
lists would take several GiB; as one int32 array they take 4 bytes a token, and they can be cached as they are.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Gap = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """`input_ids[:prompt_length]` is the prompt, the rest the response (with its EOS) but for `gaps`, each
    [start, end), ascending and apart, none of which begins at the prompt's end."""

    input_ids: list[int]
    prompt_length: int
    gaps: tuple[Gap, ...] = ()

    @classmethod
    def of_mask(cls, input_ids: list[int], taught: Sequence[bool]) -> Self:
        """taught: of each token, whether it is to be predicted."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], taught, [False])).astype(np.int8))).tolist()
        starts, ends = edges[::2], edges[1::2]
        if not starts:
            return cls(input_ids, len(input_ids))
        gaps = list(zip(ends, [*starts[1:], len(input_ids)], strict=True))
        return cls(input_ids, starts[0], tuple(gap for gap in gaps if gap[0] < gap[1]))

    @property
    def first_label(self) -> int:
        """Position of the first label. Position 0 is never one: with no BOS nothing predicts it."""
        return max(self.prompt_length, 1)

    @property
    def num_labels(self) -> int:
        inside = sum(end - max(start, self.first_label) for start, end in self.gaps if end > self.first_label)
        return max(len(self.input_ids) - self.first_label, 0) - inside

    def label_positions(self) -> Ints:
        """Of the tokens that are labels, ascending."""
        taught = np.arange(self.first_label, len(self.input_ids))
        for start, end in self.gaps:
            taught = taught[(taught < start) | (taught >= end)]
        return taught

    def window(self, start: int, end: int) -> "Sample":
        """Tokens [start, end) alone."""
        ids = self.input_ids[start:end]
        taught = np.zeros(len(ids), dtype=bool)
        taught[max(self.prompt_length - start, 0) :] = True
        for gap_start, gap_end in self.gaps:
            taught[max(gap_start - start, 0) : max(gap_end - start, 0)] = False
        return Sample.of_mask(ids, taught)  # type: ignore[arg-type]


class SampleStore(Sequence[Sample]):
    """Samples in flat arrays.

    ids      int32, of all samples, one after the other
    ends     int64, where each ends in `ids`
    prompts  int32, tokens of each prompt
    gaps     int32 [G, 3]: sample, start, end
    rows     int32, the row that each sample comes from, from 0
    """

    NAMES = ("ids", "ends", "prompts", "gaps", "rows")

    def __init__(self, ids: Any, ends: Any, prompts: Any, gaps: Any, rows: Any) -> None:
        self.ids, self.ends, self.prompts, self.gaps, self.rows = ids, ends, prompts, gaps, rows
        self._first_gap = np.searchsorted(gaps[:, 0], np.arange(len(ends) + 1))

    @classmethod
    def of(cls, samples: Iterable[tuple[int, Sample]]) -> Self:
        """samples: each with its row. One pass; the samples need not exist at once."""
        ids, prompts, rows, gaps, ends = array("i"), array("i"), array("i"), array("i"), array("q")
        for number, (row, sample) in enumerate(samples):
            ids.extend(sample.input_ids)
            ends.append(len(ids))
            prompts.append(sample.prompt_length)
            rows.append(row)
            for start, end in sample.gaps:
                gaps.extend((number, start, end))
        narrow = [np.frombuffer(values, dtype=np.int32) for values in (ids, prompts, gaps, rows)]
        return cls(
            narrow[0], np.frombuffer(ends, dtype=np.int64), narrow[1], narrow[2].reshape(-1, 3), narrow[3]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self.ends[i - 1]) if i else 0
        gaps = self.gaps[self._first_gap[i] : self._first_gap[i + 1], 1:].tolist()
        return Sample(self.ids[start : self.ends[i]].tolist(), int(self.prompts[i]), tuple(map(tuple, gaps)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Ints:
        return np.diff(self.ends, prepend=0)

    @property
    def label_counts(self) -> Ints:
        lengths, first = self.lengths, np.maximum(self.prompts, 1)
        counts = np.maximum(lengths - first, 0)
        if len(self.gaps):
            of, start, end = self.gaps.T
            np.subtract.at(counts, of, np.maximum(end - np.maximum(start, first[of]), 0))
        return counts

    def select(self, numbers: Sequence[int] | Ints) -> "SampleStore":
        """These samples, in this order; runs of neighbours are copied as one."""
        chosen = np.asarray(numbers, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
        ids, gaps, done = [self.ids[:0]], [self.gaps[:0]], 0
        for run in np.split(chosen, breaks):
            if not len(run):
                continue
            first, last = int(run[0]), int(run[-1])
            ids.append(self.ids[int(self.ends[first - 1]) if first else 0 : int(self.ends[last])])
            own = self.gaps[self._first_gap[first] : self._first_gap[last + 1]]
            gaps.append(own + np.array([done - first, 0, 0], dtype=np.int32))
            done += len(run)
        return SampleStore(
            np.concatenate(ids), np.cumsum(self.lengths[chosen]), self.prompts[chosen], np.concatenate(gaps),
            self.rows[chosen],
        )  # fmt: skip
