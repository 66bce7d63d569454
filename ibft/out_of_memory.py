"""Memory that runs out in a run becomes one line: how much there was, in what step, and the mildest change."""

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ibft.errors import OutOfMemoryError
from ibft.memory import peak_memory_mib
from ibft.plan import Choice, Setup, less_memory

if TYPE_CHECKING:
    from ibft.loop import Trainer


@dataclass
class OutOfMemoryAdvice:
    """Around a run; what it is about is told as it becomes known.

    Raises:
        OutOfMemoryError: in the place of torch's.
    """

    setup: Setup | None = None
    choice: Choice | None = None
    trainer: "Trainer | None" = None

    def __enter__(self) -> "OutOfMemoryAdvice":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
        if cpu or isinstance(error, torch.OutOfMemoryError):
            device = self.trainer.accelerator.device if self.trainer else torch.device("cpu" if cpu else "cuda")
            peak = peak_memory_mib(device) / 2**10
            raise OutOfMemoryError(f"out of memory after {peak:.1f} GiB{self.where()}: {self.what_to_do()}") from error

    def where(self) -> str:
        if self.trainer is None or self.trainer.shape is None:
            return ""
        rows, length = self.trainer.shape
        return f", in step {self.trainer.step + 1}, {rows} x {length} tokens"

    def what_to_do(self) -> str:
        ways = []
        if self.setup is not None and self.choice is not None:
            if change := self.choice.change or less_memory(self.setup, self.choice):
                ways.append(" ".join(change))
            train = self.setup.config.train
            if train.per_device_train_batch_size > 1 and not train.auto_micro_batch:
                ways.append("train.auto_micro_batch=true")
        ways.append("`ibft-fast estimate` with the same arguments, which shows what takes the memory")
        return "try " + ", or ".join(ways)
