"""Noise and tokens: whose they are, and what they do not depend on."""

import pytest
import torch
from hf_trainers import Rows, as_columns, assert_close, hf_trainer, losses, pad
from tiny_models import random_samples

from ibft.data.collate import collate
from ibft.integrations.batches import kl_mask_of, noise_ids_of


def test_noise_follows_the_sample_or_the_place_in_the_global_batch():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]])}
    by_place = noise_ids_of(batch, epoch=1, step=7, first_row=6)
    assert by_place.dtype == torch.int32
    assert by_place[0].tolist() == [[7, 6, 0], [7, 6, 1], [7, 6, 2], [7, 6, 3]]
    assert by_place[1].tolist() == [[7, 7, 0], [7, 7, 0], [7, 7, 0], [7, 7, 1]]  # pads on the left move nothing
    by_sample = noise_ids_of(batch | {"sample_ids": torch.tensor([40, 8])}, epoch=1, step=7, first_row=6)
    assert by_sample[:, 2:].tolist() == [[[1, 40, 2], [1, 40, 3]], [[1, 8, 0], [1, 8, 1]]]
    given = torch.arange(24).view(2, 4, 3)
    assert noise_ids_of(batch | {"noise_ids": given}, epoch=1, step=7, first_row=6).tolist() == given.tolist()


def test_sample_ids_give_the_noise_that_ibft_fast_train_gives():
    samples = random_samples([5, 9]).samples
    batch = collate([[(3, samples[0])], [(0, samples[1])]], epoch=2, pad_id=0, kl_tokens="real")
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "sample_ids": torch.tensor([3, 0])}
    assert torch.equal(noise_ids_of(columns, epoch=2, step=9, first_row=0), batch.noise_ids)


@pytest.mark.parametrize("tokens", ["real", "response"])
def test_the_tokens_of_the_kl_are_those_of_our_batches(tokens):
    samples = list(enumerate(random_samples([5, 9, 3]).samples))
    batch = collate([[each] for each in samples], epoch=0, pad_id=0, kl_tokens=tokens)
    assert torch.equal(kl_mask_of(as_columns(batch), tokens), batch.kl_mask)
    if tokens == "real":
        assert kl_mask_of({"input_ids": batch.input_ids}, tokens).all()


def test_padding_on_the_left_changes_no_loss(folder, tmp_path):
    def run(side):
        collator = lambda items: pad(items, side) | {"position_ids": positions(pad(items, side))}  # noqa: E731
        trainer = hf_trainer(folder, tmp_path, collator=collator, max_steps=2)
        trainer.train()
        return losses(trainer)

    def positions(batch):
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    assert_close(run("left"), run("right"), 1e-4)


def test_packed_rows_do_not_see_each_other(folder, tmp_path):
    """Position ids that begin anew, and no attention mask, as packing collators give them."""
    samples = list(enumerate(random_samples([9, 20, 5]).samples))
    apart = collate([[each] for each in samples], epoch=0, pad_id=0, kl_tokens="real")
    packed = collate([samples], epoch=0, pad_id=0, kl_tokens="real", packed=True)

    def run(batch):
        columns = {name: value for name, value in as_columns(batch).items() if value is not None}
        trainer = hf_trainer(folder, tmp_path, rows=[columns] * 2, collator=lambda items: items[0], max_steps=2)
        trainer.train()
        return losses(trainer)

    assert_close(run(packed), run(apart), 2e-5)


def test_noise_by_sample_does_not_depend_on_who_is_in_the_batch(folder, tmp_path):
    """The second epoch draws anew; a sample's noise in an epoch is its own. `sample_ids` pass the Trainer's filter."""
    seen = {}
    for size in (2, 4):
        trainer = hf_trainer(
            folder, tmp_path, rows=Rows(sample_ids=10), per_device_train_batch_size=size, max_steps=-1,
            num_train_epochs=2,
        )  # fmt: skip
        keys = seen[size] = set()
        original = trainer.micro_batch_loss

        def spy(inputs, label_tokens, keys=keys, original=original):
            keys.update((int(e), int(s), ids[0].item()) for (e, s, _), ids in zip(
                inputs["noise_ids"][:, 0], inputs["input_ids"], strict=True
            ))  # fmt: skip
            return original(inputs, label_tokens)

        trainer.micro_batch_loss = spy
        trainer.train()
    assert seen[2] == seen[4]
    assert sorted((epoch, sample) for epoch, sample, _ in seen[2]) == [(e, 10 + k) for e in (0, 1) for k in range(8)]
