import os
import subprocess
import sys
from bisect import bisect_left, insort
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.order import WINDOW_STEPS, epoch_order, group_by_length, pack

LENGTHS = st.lists(st.integers(1, 20), max_size=60)


def skewed_lengths(n, longest, seed=0):
    """Like instruction data: log-normal, most rows short and a few at the limit."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(300), 0.8, n))
    return np.clip(lengths, 30, longest).astype(np.int64)


def pack_slowly(lengths, max_length):
    """`pack` by its definition, one sample at a time."""
    packs, open_packs = [], []  # open_packs: (room left, pack), sorted; full packs are not in it
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
    return sorted(packs, key=lambda members: members[0])


def padding_share(order, lengths, rows_per_step):
    steps = [[lengths[i] for i in order[k : k + rows_per_step]] for k in range(0, len(order), rows_per_step)]
    return 1 - sum(map(sum, steps)) / sum(max(step) * len(step) for step in steps)


@given(n=st.integers(0, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
def test_order_is_a_permutation_of_its_arguments_alone(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert order == epoch_order(n, seed, epoch)


def test_order_differs_by_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_pinned():
    """A change here breaks the resuming of runs that were started before it."""
    assert epoch_order(8, seed=42, epoch=1) == [7, 0, 4, 6, 3, 5, 2, 1]
    assert epoch_order(4, seed=42, epoch=1, shuffle=False) == [0, 1, 2, 3]


def test_order_refuses_negative_arguments():
    with pytest.raises(ValueError, match="got -1 and 0"):
        epoch_order(-1, 0, 0)


@given(LENGTHS)
def test_packs_hold_each_sample_once_whole(lengths):
    packs = pack(lengths, 20)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 20 for members in packs)
    # Best fit never leaves two packs that would fit into one.
    fills = sorted(sum(lengths[i] for i in members) for members in packs)
    assert len(fills) < 2 or fills[0] + fills[1] > 20


@given(LENGTHS, st.randoms())
def test_the_number_of_packs_does_not_depend_on_the_order(lengths, random):
    shuffled = list(lengths)
    random.shuffle(shuffled)
    assert len(pack(shuffled, 20)) == len(pack(lengths, 20))


def test_packing_by_hand():
    assert pack([3, 10, 7, 5, 5, 4], 10) == [[1], [2, 0], [3, 4], [5]]
    # The 4 goes where it fits best (beside the 6), not where there is most room.
    assert pack([5, 6, 4], 10) == [[0], [1, 2]]
    # Of the three packs with 4 left, the first opened is taken, and it stays the best fit until it is full.
    assert pack([6, 6, 6, 2, 2, 2, 2], 10) == [[0, 3, 4], [1, 5, 6], [2]]
    # Both packs come to have 3 left, that of 16 before that of 20; the pack of 20 was opened first.
    assert pack([20, 16, 11, 7, 3], 30) == [[0, 3, 4], [1, 2]]
    assert pack([], 10) == []


@given(LENGTHS, st.integers(20, 100))
def test_packs_are_those_of_the_definition(lengths, max_length):
    assert pack(lengths, max_length) == pack_slowly(lengths, max_length)


@pytest.mark.parametrize("max_length", [2048, 4096, 131072])
@pytest.mark.parametrize("longest", [60, 2048])
def test_packs_of_many_rows_are_those_of_the_definition(longest, max_length):
    lengths = skewed_lengths(5000, longest).tolist()
    assert pack(lengths, max_length) == pack_slowly(lengths, max_length)


@pytest.mark.parametrize("max_length", [256, 131072])
def test_lengths_of_any_size_are_packed(max_length):
    """Up to the limit itself; at 256 many packs have the same room and come to it in any order."""
    lengths = np.random.default_rng(0).integers(1, max_length + 1, 3000).tolist()
    assert pack(lengths, max_length) == pack_slowly(lengths, max_length)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_arrays_are_packed_as_lists_are(dtype):
    lengths = skewed_lengths(500, 2048)
    packs = pack(lengths.astype(dtype), 2048)
    assert packs == pack(lengths.tolist(), 2048)
    assert {type(i) for members in packs for i in members} == {int}


def test_packs_are_not_sorted_by_length():
    lengths = [1 + i % 19 for i in epoch_order(500, 0, 0)]
    firsts = [lengths[members[0]] for members in pack(lengths, 19)]
    half = len(firsts) // 2
    assert abs(sum(firsts[:half]) / half - sum(firsts[half:]) / (len(firsts) - half)) < 2


@pytest.mark.parametrize("of", [list, np.array])
@pytest.mark.parametrize("length", [-1, 0, 11])
def test_a_sample_is_never_split(length, of):
    with pytest.raises(ValueError, match=rf"lengths\[1\]: got {length}, expected 1 to 10"):
        pack(of([3, length, 12]), 10)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 9), st.integers(0, 9))
def test_grouping_keeps_every_sample_once(lengths, rows_per_step, seed, epoch):
    order = epoch_order(len(lengths), seed, epoch)
    grouped = group_by_length(order, lengths, rows_per_step=rows_per_step, seed=seed, epoch=epoch)
    assert sorted(grouped) == list(range(len(lengths)))
    assert grouped == group_by_length(order, np.array(lengths), rows_per_step=rows_per_step, seed=seed, epoch=epoch)


def test_grouping_by_hand():
    order, lengths = [3, 0, 4, 1, 2, 6, 5], [10, 3, 8, 9, 4, 8, 8]
    orders = {tuple(group_by_length(order, lengths, rows_per_step=2, seed=0, epoch=epoch)) for epoch in range(50)}
    # By length 10 9 | 8 8 | 8 4 | 3, the samples of 8 in the order given (2, 6, 5); whole steps come in any order.
    assert orders == {(*a, *b, *c, 1) for a, b, c in permutations([(0, 3), (2, 6), (5, 4)])}


@pytest.mark.parametrize("n", [200, 201, 400, 437])
def test_each_window_keeps_its_rows_and_cuts_them_by_length(n):
    lengths, order = skewed_lengths(n, 2048).tolist(), epoch_order(n, 1, 0)
    grouped = group_by_length(order, lengths, rows_per_step=4, seed=1, epoch=0)
    window_rows = 4 * WINDOW_STEPS
    assert window_rows == 200
    for first in range(0, n, window_rows):
        rows = sorted(order[first : first + window_rows], key=lambda i: -lengths[i])
        by_length = [rows[k : k + 4] for k in range(0, len(rows), 4)]
        window = grouped[first : first + window_rows]
        steps = [window[k : k + 4] for k in range(0, len(window), 4)]
        assert sorted(steps) == sorted(by_length)
        assert steps != by_length or len(steps) == 1
    assert len(steps[-1]) == (n % 4 or 4)  # the smaller step is the epoch's last


def test_windows_are_shuffled_each_in_its_own_way():
    lengths = list(range(200, 100, -1)) * 2
    grouped = group_by_length(range(200), lengths, rows_per_step=2, seed=0, epoch=0)
    assert [lengths[i] for i in grouped[:100]] != [lengths[i] for i in grouped[100:]]


def test_grouping_saves_padding():
    lengths = skewed_lengths(3000, 2048).tolist()
    order = epoch_order(3000, 0, 0)
    grouped = group_by_length(order, lengths, rows_per_step=8, seed=0, epoch=0)
    assert padding_share(order, lengths, 8) > 0.4
    assert padding_share(grouped, lengths, 8) < 0.1


def test_grouping_differs_by_seed_and_epoch():
    lengths = list(range(60))
    orders = {
        tuple(group_by_length(range(60), lengths, rows_per_step=2, seed=seed, epoch=epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize(("rows_per_step", "epoch"), [(0, 0), (1, -1)])
def test_grouping_refuses_settings_out_of_range(rows_per_step, epoch):
    with pytest.raises(ValueError, match=f"got {rows_per_step} and {epoch}, expected 1 or more and 0 or more"):
        group_by_length([0], [1], rows_per_step=rows_per_step, seed=0, epoch=epoch)


def test_grouping_is_pinned():
    """A change here breaks the resuming of runs that were started before it."""
    assert group_by_length(range(9), range(1, 10), rows_per_step=2, seed=42, epoch=1) == [6, 5, 8, 7, 4, 3, 2, 1, 0]


def test_another_process_finds_the_same_order_and_packs():
    code = """
import hashlib, json
from ibft.data.order import epoch_order, group_by_length, pack
lengths = [30 + (i * i) % 2019 for i in range(700)]
order = epoch_order(700, 3, 2)
grouped = group_by_length(order, lengths, rows_per_step=4, seed=3, epoch=2)
packs = pack([lengths[i] for i in order], 2048)
print(hashlib.sha256(json.dumps([order, grouped, packs]).encode()).hexdigest())
"""
    found = []
    for hash_seed in ("1", "77"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    assert len(found[0]) == 64
    assert found[0] == found[1]
