"""Samples, their masks, and many of them in flat arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.samples import Sample, SampleStore

masks = st.lists(st.booleans(), min_size=1, max_size=12)


def of(mask):
    return Sample.of_mask(list(range(100, 100 + len(mask))), mask)


@given(masks)
def test_a_mask_comes_back_but_for_the_first_token(mask):
    sample = of(mask)
    expected = [i for i, taught in enumerate(mask) if taught and i > 0]
    assert sample.label_positions().tolist() == expected
    assert sample.num_labels == len(expected)


def test_by_hand():
    sample = of([False, True, True, False, True, False])
    assert (sample.prompt_length, sample.gaps, sample.num_labels) == (1, ((3, 4), (5, 6)), 3)
    assert of([False, False]).num_labels == 0
    assert Sample([1, 2, 3], 1).label_positions().tolist() == [1, 2]


@given(masks, st.integers(0, 12), st.integers(1, 12))
def test_a_window_has_its_part_of_the_mask(mask, start, length):
    end = min(start + length, len(mask))
    if start >= end:
        return
    part = of(mask).window(start, end)
    assert part.input_ids == list(range(100 + start, 100 + end))
    assert part.label_positions().tolist() == [i for i in range(1, end - start) if mask[start + i]]


@given(st.lists(masks, max_size=6))
def test_a_store_gives_back_its_samples(all_masks):
    samples = [of(mask) for mask in all_masks]
    store = SampleStore.of((7 * i, sample) for i, sample in enumerate(samples))
    assert list(store) == samples == [store[i] for i in range(len(store))]
    assert store[1:3] == samples[1:3]
    assert store.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert store.label_counts.tolist() == [sample.num_labels for sample in samples]
    assert store.rows.tolist() == [7 * i for i in range(len(samples))]


def test_a_store_ends_where_it_ends():
    store = SampleStore.of([(0, of([False, True]))])
    assert store[-1] == store[0]
    with pytest.raises(IndexError):
        store[1]


def test_a_token_takes_four_bytes():
    store = SampleStore.of((i, Sample([1] * 500, 20)) for i in range(100))
    arrays = [getattr(store, name) for name in SampleStore.NAMES]
    assert sum(array.nbytes for array in arrays) <= 100 * (500 * 4 + 20)
    assert store.ids.dtype == np.int32


@given(st.lists(masks, min_size=1, max_size=12), st.data())
def test_a_selection_holds_its_samples_in_their_order(all_masks, data):
    samples = [of(mask) for mask in all_masks]
    store = SampleStore.of((7 * i, sample) for i, sample in enumerate(samples))
    numbers = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=15))
    chosen = store.select(numbers)
    assert list(chosen) == [samples[number] for number in numbers]
    assert chosen.rows.tolist() == [7 * number for number in numbers]
    assert chosen.label_counts.tolist() == [samples[number].num_labels for number in numbers]
