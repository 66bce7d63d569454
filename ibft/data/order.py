"""The order of samples in an epoch, and how samples are packed into rows: pure functions of their arguments."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence


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


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: put each length, longest first, into the fullest pack that still has room for it.

    The number of packs depends on the multiset of lengths only, so every epoch has the same number of steps. Equal
    lengths are placed in the order given, so that partners change from epoch to epoch; packs come back in the order
    of their longest member, so that a shuffled input gives shuffled packs and not the longest first.

    Args:
        lengths: tokens of each sample, in the epoch's order.
        max_length: tokens that a pack holds.

    Returns:
        Packs of indices into `lengths`; each index in exactly one pack. O(n log n).

    Raises:
        ValueError: a length is below 1 or above max_length (samples are never split).
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"lengths[{index}]: got {length}, expected 1 to {max_length}")
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room left, pack), sorted; full packs are not in it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fit = bisect_left(open_packs, (length, -1))
        if fit < len(open_packs):
            room, number = open_packs.pop(fit)
        else:
            room, number = max_length, len(packs)
            packs.append([])
        packs[number].append(index)
        if room > length:
            insort(open_packs, (room - length, number))
    return sorted(packs, key=lambda members: members[0])  # members[0] is the longest: it opened the pack
