"""The order of samples in an epoch, and how samples are packed into rows: pure functions of their arguments."""

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW_STEPS = 50  # steps whose rows `group_by_length` sorts together

Lengths = Sequence[int] | NDArray[np.integer[Any]]


def epoch_order(n: int, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
    """A permutation of range(n): element i is the sample that comes i-th in this epoch.

    It depends on (n, seed, epoch) alone, so that a resumed run sees the order of an uninterrupted one. It sorts by
    `random.random()`, the one method whose sequence Python guarantees from version to version.
    """
    if n < 0 or epoch < 0:
        raise ValueError(f"n and epoch: got {n} and {epoch}, expected neither below 0")
    if not shuffle:
        return list(range(n))
    rng = random.Random(f"epoch order, seed {seed}, epoch {epoch}")
    keys = [rng.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def group_by_length(order: Sequence[int], lengths: Lengths, *, rows_per_step: int, seed: int, epoch: int) -> list[int]:
    """Reorder an epoch so that rows of like length meet in a step, where a row is padded to the longest of its batch.

    The order is cut into windows of `WINDOW_STEPS` steps. A window's rows are sorted by length, longest first and
    equal ones in the order given, cut into steps again, and these steps are shuffled.

    It costs randomness: a sample meets only samples of about its length in a step, so that a step's gradient is that
    of long rows or of short ones and varies more from step to step. If the epoch ends in a smaller step, that step
    stays last and holds the shortest rows of the last window. Hugging Face calls the setting group_by_length too.

    Args:
        order: indices into `lengths`, see `epoch_order`.
        lengths: tokens of each sample, by index (not in the epoch's order).
        rows_per_step: rows of an optimizer step.
        seed, epoch: choose, with the number of the window, the order of its steps.

    Returns:
        The elements of `order`, each once; a function of the arguments alone.

    Raises:
        ValueError: rows_per_step is below 1, or epoch below 0.
    """
    if rows_per_step < 1 or epoch < 0:
        raise ValueError(f"rows_per_step and epoch: got {rows_per_step} and {epoch}, expected 1 or more and 0 or more")
    tokens: list[int] = np.asarray(lengths, dtype=np.int64).tolist()
    window_rows = WINDOW_STEPS * rows_per_step
    grouped: list[int] = []
    for window, first in enumerate(range(0, len(order), window_rows)):
        rows = sorted(order[first : first + window_rows], key=tokens.__getitem__, reverse=True)  # reverse is stable
        whole = len(rows) // rows_per_step  # without the epoch's smaller step
        rng = random.Random(f"group by length, seed {seed}, epoch {epoch}, window {window}")
        keys = [rng.random() for _ in range(whole)]
        for step in [*sorted(range(whole), key=keys.__getitem__), whole]:
            grouped += rows[step * rows_per_step : (step + 1) * rows_per_step]
    return grouped


def pack(lengths: Lengths, max_length: int) -> list[list[int]]:
    """Best-fit decreasing: put each length, longest first, into the fullest pack that still has room for it.

    Of equally full packs it takes the one that was opened first. The number of packs depends on the multiset of lengths
    only, so every epoch has the same number of steps. Equal lengths are placed in the order given, so that partners
    change from epoch to epoch; packs come back in the order of their longest member, so that a shuffled input gives
    shuffled packs and not the longest first.

    Args:
        lengths: tokens of each sample, in the epoch's order.
        max_length: tokens that a pack holds.

    Returns:
        Packs of indices into `lengths`; each index in exactly one pack. O(n log n), plus n shifts of a list of the
        different rooms that packs have left, at most max_length of them.

    Raises:
        ValueError: a length is below 1 or above max_length (samples are never split).
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((tokens < 1) | (tokens > max_length))
    if wrong.size:
        raise ValueError(f"lengths[{wrong[0]}]: got {tokens[wrong[0]]}, expected 1 to {max_length}")
    indices: list[int] = np.argsort(-tokens, kind="stable").tolist()
    different, counts = (found.tolist() for found in np.unique(tokens, return_counts=True))  # ascending
    packs: list[list[int]] = []
    rooms: list[int] = []  # tokens left in the open packs, ascending, each once
    open_packs: defaultdict[int, list[int]] = defaultdict(list)  # room -> heap of its packs
    start = 0
    for length, count in zip(reversed(different), reversed(counts), strict=True):
        end = start + count
        while start < end:
            fit = bisect_left(rooms, length)
            if fit < len(rooms):
                room = rooms[fit]
                number = heappop(open_packs[room])
                if not open_packs[room]:
                    del rooms[fit]
            else:
                room, number = max_length, len(packs)
                packs.append([])
            # A pack with room for several of one length stays the best fit until it has them.
            stop = min(start + room // length, end)
            packs[number] += indices[start:stop]
            room -= length * (stop - start)
            start = stop
            if room >= different[0]:  # or else nothing fits any more
                if not open_packs[room]:
                    insort(rooms, room)
                heappush(open_packs[room], number)
    return sorted(packs, key=lambda members: members[0])  # members[0] is the longest: it opened the pack
