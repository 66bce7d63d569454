"""What a step is fed: rows of tokens in one of the layouts that are compared, collated as a run collates them.

Legend: N real tokens of a step, T length of the longest row, B rows of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import torch

from ibft.config import Config
from ibft.data.collate import Batch, IndexedSample, collate
from ibft.data.encode import EncodedData
from ibft.data.order import epoch_order
from ibft.data.samples import Sample
from ibft.loop import Trainer

PAD_ID = 0  # pads are masked by position: any id serves
Steps = Sequence[list[Batch]]  # of each step its micro-batches


@dataclass(frozen=True)
class Rows:
    """The steps that a provider takes over and over, and how their samples are laid out."""

    layout: str
    steps: Steps

    @cached_property
    def columns(self) -> dict[str, object]:
        """N is a middle step's; T, B the largest; labelled, the share of real tokens that are labels."""
        batches = self.batches
        labels = sum(batch.num_label_tokens for batch in batches)
        return {
            "layout": self.layout,
            "N": round(median(sum(batch.num_tokens for batch in step) for step in self.steps)),
            "T": max(batch.input_ids.shape[1] for batch in batches),
            "B": max(batch.input_ids.shape[0] for batch in batches),
            "labelled": f"{labels / self.tokens:.2f}",
        }

    @property
    def batches(self) -> list[Batch]:
        return [batch for step in self.steps for batch in step]

    @property
    def tokens(self) -> int:
        """Real tokens of all steps."""
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def padding(self) -> float:
        """The share of positions that hold no token."""
        return 1 - self.tokens / sum(batch.input_ids.numel() for batch in self.batches)


def batches_of(data: EncodedData, config: Config, *, epoch: int = 0) -> list[list[Batch]]:
    """The steps of an epoch as the trainer makes them, without a trainer."""
    train = config.train
    settings = SimpleNamespace(
        config=config, pad_id=PAD_ID, micro_rows=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
    )  # fmt: skip
    return list(Trainer.batches(settings, data, epoch=epoch))  # type: ignore[arg-type]


def random_samples(vocab: int, length: int, count: int, *, labelled: float = 0.5) -> EncodedData:
    """`count` samples of `length` random ids; of each the last share `labelled` is a response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (count, length), generator=generator).tolist()
    return EncodedData.of([Sample(row, length - max(1, round(labelled * length))) for row in ids], rows=count)


def regrouped(steps: Steps, data: EncodedData, config: Config) -> list[list[IndexedSample]]:
    """The samples of packed steps of one epoch in its order, in as many groups of like count: what meets in a step
    without packing, which puts samples of like length together."""
    ids = torch.cat([batch.noise_ids.view(-1, 3) for step in steps for batch in step])
    order = epoch_order(len(data.samples), config.runtime.seed, int(ids[0, 0]))
    samples = [(place, data.samples[order[place]]) for place in ids[:, 1].unique().tolist()]
    bounds = [round(i * len(samples) / len(steps)) for i in range(len(steps) + 1)]
    return [samples[first:last] for first, last in pairwise(bounds)]


def typical(groups: Sequence[Sequence[IndexedSample]], count: int) -> list[IndexedSample]:
    """Those whose lengths are nearest to the mean: few, for steps that take long."""
    samples = [pair for group in groups for pair in group]
    mean = sum(len(sample.input_ids) for _, sample in samples) / len(samples)
    return sorted(samples, key=lambda pair: abs(len(pair[1].input_ids) - mean))[:count]


def in_pairs(samples: Sequence[IndexedSample]) -> list[Sequence[IndexedSample]]:
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def padded(samples: Sequence[IndexedSample], pad_to: int | None = None) -> Batch:
    """One micro-batch, a sample a row; padded to the longest, or to a length."""
    return collate([[pair] for pair in samples], epoch=0, pad_id=PAD_ID, kl_tokens="real", pad_to=pad_to)


def squares(batch: Batch) -> int:
    """The sum of the squared lengths of its samples, by which attention's work goes. The KL has to count real tokens:
    its mask then says which those are."""
    assert batch.num_kl_tokens == batch.num_tokens, "expected ib.kl_tokens=real"
    _, lengths = batch.noise_ids[..., 1][batch.kl_mask].unique(return_counts=True)
    return int(lengths.square().sum())
