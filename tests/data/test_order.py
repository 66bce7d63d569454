import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.order import epoch_order, pack

LENGTHS = st.lists(st.integers(1, 20), max_size=60)


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


def test_packs_are_not_sorted_by_length():
    lengths = [1 + i % 19 for i in epoch_order(500, 0, 0)]
    firsts = [lengths[members[0]] for members in pack(lengths, 19)]
    half = len(firsts) // 2
    assert abs(sum(firsts[:half]) / half - sum(firsts[half:]) / (len(firsts) - half)) < 2


@pytest.mark.parametrize("length", [0, 11])
def test_a_sample_is_never_split(length):
    with pytest.raises(ValueError, match=rf"lengths\[1\]: got {length}, expected 1 to 10"):
        pack([3, length], 10)
