from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.collate import Batch, collate, num_steps_per_epoch, steps_of_epoch
from ibft.data.encode import EncodedData
from ibft.data.samples import Sample

PAD = 0
MAX_LENGTH = 12


@st.composite
def datasets(draw) -> EncodedData:
    """Samples whose ids are all different, so that every token of a batch can be traced to its place."""
    sizes = draw(st.lists(st.integers(2, MAX_LENGTH).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))))
    samples, next_id = [], 1
    for length, prompt_length in sizes:
        samples.append(Sample(list(range(next_id, next_id + length)), prompt_length))
        next_id += length
    return EncodedData.of(samples)


def epoch_steps(data: EncodedData, *, micro_rows=2, accumulation=2, packing=False, **changes) -> list[list[Batch]]:
    settings = {"epoch": 1, "seed": 7, "max_length": MAX_LENGTH, "kl_tokens": "real", "pad_to": None, "pad_id": PAD}
    settings |= {"micro_rows": micro_rows, "accumulation": accumulation, "packing": packing} | changes
    return list(steps_of_epoch(data, **settings))


def expected_labels(data: EncodedData) -> Counter:
    """(token before, label) pairs: the ids are unique, so each pair names one place."""
    return Counter(
        (sample.input_ids[t - 1], sample.input_ids[t])
        for sample in data.samples
        for t in range(max(sample.prompt_length, 1), len(sample.input_ids))
    )


def real_positions(batch: Batch) -> torch.Tensor:
    return batch.input_ids != PAD  # no sample of these tests holds the pad id


# --- what a batch holds, by hand -----------------------------------------------------------------------------------


def test_unpacked_batch_by_hand():
    rows = [[(4, Sample([11, 12, 13, 14], 2))], [(9, Sample([21, 22, 23], 1))]]
    batch = collate(rows, epoch=3, pad_id=PAD, kl_tokens="real")
    assert batch.input_ids.tolist() == [[11, 12, 13, 14], [21, 22, 23, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.label_rows.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [13, 14, 22, 23]
    assert batch.kl_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.noise_ids[1].tolist() == [[3, 9, 0], [3, 9, 1], [3, 9, 2], [3, 9, 3]]
    assert (batch.num_label_tokens, batch.num_kl_tokens, batch.num_tokens) == (4, 7, 7)
    assert batch.segments is None
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.attention_mask)} == {torch.int64}
    assert (batch.label_rows.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert (batch.kl_mask.dtype, batch.noise_ids.dtype) == (torch.bool, torch.int32)


def test_packed_batch_by_hand():
    rows = [[(4, Sample([11, 12, 13], 0)), (9, Sample([21, 22], 1))]]
    batch = collate(rows, epoch=3, pad_id=PAD, kl_tokens="response", pad_to=7, packed=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.attention_mask is None
    assert batch.label_rows.tolist() == [0, 1, 3]  # 21 is the first token of its sample: 13 does not predict it
    assert batch.targets.tolist() == [12, 13, 22]
    assert batch.kl_mask.tolist() == [[True, True, False, True, False, False, False]]
    assert batch.noise_ids[0, :, 1].tolist() == [4, 4, 4, 9, 9, 9, 9]
    assert batch.noise_ids[0, :, 2].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert (batch.num_label_tokens, batch.num_kl_tokens, batch.num_tokens) == (3, 3, 5)
    assert batch.segments is not None
    assert batch.segments.lengths == (3, 2, 2)  # the padding last
    assert batch.segments.cu_seqlens.tolist() == [0, 3, 5, 7]


def test_kl_tokens_all_counts_the_padding():
    batch = collate([[(0, Sample([1, 2], 1))]], epoch=0, pad_id=PAD, kl_tokens="all", pad_to=5)
    assert batch.kl_mask.all()
    assert batch.num_kl_tokens == 5


def test_the_padding_id_may_be_a_label():
    batch = collate([[(0, Sample([5, 6, PAD], 1))]], epoch=0, pad_id=PAD, kl_tokens="response", pad_to=5)
    assert batch.targets.tolist() == [6, PAD]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0]]


def test_to_moves_every_tensor_and_keeps_the_counts():
    batch = collate([[(0, Sample([5, 6], 1))]], epoch=0, pad_id=PAD, kl_tokens="real")
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.num_label_tokens, moved.num_kl_tokens, moved.num_tokens) == (1, 2, 2)


def test_to_moves_the_segments():
    moved = collate([[(0, Sample([5, 6], 1))]], epoch=0, pad_id=PAD, kl_tokens="real", packed=True).to("meta")
    assert moved.segments is not None
    assert moved.segments.cu_seqlens.device.type == "meta"
    assert moved.segments.lengths == (2,)  # a full row has no padding


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, r"rows: got \[\] samples a row"),
        ([[]], {"packed": True}, r"rows: got \[0\] samples a row"),
        ([[(0, Sample([1, 2], 1))] * 2], {}, "expected one each when not packed"),
        ([[(0, Sample([1, 2], 1))] * 2], {"packed": True, "pad_to": 3}, "got a row of 4 tokens, expected at most"),
        ([[(0, Sample([1, 2], 1))]], {"kl_tokens": "all"}, "fixed length: got packed=False, pad_to=None"),
        ([[(0, Sample([1, 2], 1))]], {"kl_tokens": "all", "packed": True, "pad_to": 3}, "fixed length"),
        ([[(0, Sample([1, 2], 1))]], {"kl_tokens": "some"}, "kl_tokens: got 'some'"),
    ],
)
def test_collate_refuses(rows, settings, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, **({"epoch": 0, "pad_id": PAD, "kl_tokens": "real"} | settings))


# --- what holds for every data set ---------------------------------------------------------------------------------


@given(data=datasets(), packing=st.booleans(), micro_rows=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_every_response_token_is_a_label_exactly_once(data, packing, micro_rows, accumulation):
    seen: Counter = Counter()
    for step in epoch_steps(data, packing=packing, micro_rows=micro_rows, accumulation=accumulation):
        for batch in step:
            before = batch.input_ids.flatten()[batch.label_rows].tolist()
            seen.update(zip(before, batch.targets.tolist(), strict=True))
            assert batch.num_label_tokens == len(before) == len(batch.targets)
            assert batch.label_rows.tolist() == sorted(batch.label_rows.tolist())
    assert seen == expected_labels(data)


@given(data=datasets(), packing=st.booleans(), micro_rows=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_noise_follows_the_token_not_the_batch(data, packing, micro_rows, accumulation):
    """Whatever the packing and the split, a token has the noise ids that it has one sample at a time, unpacked."""

    def noise_by_token(steps) -> dict[int, list[int]]:
        pairs = []
        for batch in (batch for step in steps for batch in step):
            real = real_positions(batch)
            pairs += zip(batch.input_ids[real].tolist(), batch.noise_ids[real].tolist(), strict=True)
        assert len(pairs) == len(dict(pairs)) == data.num_tokens
        return dict(pairs)

    batches = epoch_steps(data, packing=packing, micro_rows=micro_rows, accumulation=accumulation)
    assert noise_by_token(batches) == noise_by_token(epoch_steps(data, micro_rows=1, accumulation=1))


@given(data=datasets(), pad_to=st.sampled_from([None, MAX_LENGTH + 3]), packing=st.booleans())
def test_noise_ids_are_distinct_within_an_epoch(data, pad_to, packing):
    ids = [
        tuple(key)
        for step in epoch_steps(data, packing=packing, pad_to=pad_to)
        for batch in step
        for key in batch.noise_ids.flatten(0, 1).tolist()
    ]
    assert len(ids) == len(set(ids))


@given(data=datasets(), packing=st.booleans())
def test_the_samples_of_a_step_do_not_depend_on_the_split(data, packing):
    def tokens(**split):
        steps = epoch_steps(data, packing=packing, **split)
        return [[row[row != PAD].tolist() for batch in step for row in batch.input_ids] for step in steps]

    assert tokens(micro_rows=1, accumulation=8) == tokens(micro_rows=8, accumulation=1)
    assert tokens(micro_rows=4, accumulation=2) == tokens(micro_rows=8, accumulation=1)


@given(data=datasets())
def test_a_packed_row_holds_whole_samples_within_the_length(data):
    samples = Counter(tuple(sample.input_ids) for sample in data.samples)
    for batch in (batch for step in epoch_steps(data, packing=True) for batch in step):
        assert batch.input_ids.shape[1] <= MAX_LENGTH
        for ids, positions, real in zip(batch.input_ids, batch.position_ids, real_positions(batch), strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            segments = [ids[a:b] for a, b in pairwise(starts) if real[a]]
            samples.subtract(Counter(tuple(segment.tolist()) for segment in segments))
    assert not +samples
    assert not -samples


@given(data=datasets(), pad_to=st.sampled_from([None, MAX_LENGTH, MAX_LENGTH + 3]))
def test_segments_are_the_runs_of_the_positions(data, pad_to):
    """One segment a sample and one for each row's padding: where transformers would see a new one from position_ids."""
    for batch in (batch for step in epoch_steps(data, packing=True, pad_to=pad_to) for batch in step):
        assert batch.segments is not None
        starts = (batch.position_ids.flatten() == 0).nonzero().flatten().tolist()
        assert batch.segments.cu_seqlens.tolist() == [*starts, batch.input_ids.numel()]
        assert batch.segments.lengths == tuple(b - a for a, b in pairwise(batch.segments.cu_seqlens.tolist()))
        assert batch.segments.max_length == max(batch.segments.lengths)
    assert all(batch.segments is None for step in epoch_steps(data, pad_to=pad_to) for batch in step)


@given(data=datasets(), packing=st.booleans(), kl_tokens=st.sampled_from(["real", "response"]))
def test_counts_of_an_epoch_do_not_depend_on_packing(data, packing, kl_tokens):
    batches = [batch for step in epoch_steps(data, packing=packing, kl_tokens=kl_tokens) for batch in step]
    assert sum(batch.num_tokens for batch in batches) == data.num_tokens
    assert sum(batch.num_label_tokens for batch in batches) == data.num_label_tokens
    kl = data.num_tokens if kl_tokens == "real" else data.num_label_tokens
    assert sum(batch.num_kl_tokens for batch in batches) == sum(int(batch.kl_mask.sum()) for batch in batches) == kl


@given(data=datasets(), packing=st.booleans(), micro_rows=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_number_and_size_of_steps(data, packing, micro_rows, accumulation):
    split = {"micro_rows": micro_rows, "accumulation": accumulation, "packing": packing}
    steps = epoch_steps(data, **split)
    for epoch in range(3):
        assert len(epoch_steps(data, epoch=epoch, **split)) == len(steps)
    assert len(steps) == num_steps_per_epoch(data, max_length=MAX_LENGTH, **split)
    for step in steps[:-1]:
        assert [len(batch.input_ids) for batch in step] == [micro_rows] * accumulation


@given(data=datasets(), packing=st.booleans(), start=st.integers(0, 6))
def test_resuming_gives_the_same_steps(data, packing, start):
    def content(steps):
        return [[(b.input_ids.tolist(), b.noise_ids.tolist(), b.targets.tolist()) for b in step] for step in steps]

    assert (
        content(epoch_steps(data, packing=packing, start=start)) == content(epoch_steps(data, packing=packing))[start:]
    )


def test_epochs_differ_and_evaluation_keeps_the_order():
    data = EncodedData.of([Sample([i, i], 1) for i in range(1, 30)])

    def firsts(**changes):
        return [b.input_ids[0, 0].item() for step in epoch_steps(data, micro_rows=1, **changes) for b in step]

    assert firsts(epoch=0) != firsts(epoch=1)
    steps = epoch_steps(data, micro_rows=1)
    assert [b.noise_ids[0, 0].tolist() for step in steps for b in step] == [[1, place, 0] for place in range(29)]
    assert firsts(shuffle=False) == list(range(1, 30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_rows": 0}, "micro_rows and accumulation: got 0 and 2"),
        ({"accumulation": 0}, "micro_rows and accumulation: got 2 and 0"),
        ({"start": -1}, "start: got -1"),
    ],
)
def test_steps_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        epoch_steps(EncodedData.of([Sample([1, 2], 1)]), **changes)


def test_transformers_keeps_packed_samples_apart():
    """The promise behind attention_mask=None: logits of a packed sample are those of the sample alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    samples = [Sample(torch.randint(1, 50, (n,)).tolist(), 1) for n in (5, 2, 1, 4)]
    rows = [list(enumerate(samples)), [(4, samples[0])]]
    batch = collate(rows, epoch=0, pad_id=PAD, kl_tokens="real", pad_to=16, packed=True)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        start = 0
        for sample in samples:
            alone = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[0, start : start + len(alone)], alone, rtol=0, atol=1e-12)
            start += len(alone)
