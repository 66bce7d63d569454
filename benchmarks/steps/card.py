"""A GPU held to a card of some size, and scripts that have it to themselves, in a process of their own."""

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.harness.machine import GIB
from benchmarks.harness.result_rows import ROOT
from benchmarks.steps.step_case import free

# What the driver, the CUDA context and a desktop take of a card, and no allocator sees; `ibft.plan` takes off as much.
CONTEXT_GIB = 0.6
# A card reports up to 1.2 % less than its name says: one of 80 GB has 79.1 GiB.
SHORT = 0.98


def usable_gib(card_gib: int, device: torch.device) -> float:
    """What such a card has, on this device; of its own size all that the device has."""
    if device.type != "cuda":
        return card_gib
    return min(card_gib, torch.cuda.get_device_properties(device).total_memory / GIB)


def too_small(card_gib: int | None, device: torch.device) -> str | None:
    """Why the device cannot stand for such a card."""
    if card_gib is None or usable_gib(card_gib, device) >= SHORT * card_gib:
        return None
    return f"this card has less than {card_gib} GiB"


def hold_to(card_gib: int | None, device: torch.device) -> None:
    """From here on the allocator takes no more than fits on such a card beside the context. None: the whole device."""
    if card_gib is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        share = (usable_gib(card_gib, device) - CONTEXT_GIB) / total
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())  # it asks for an index


class Peaks:
    """Peaks of this process on a GPU since the last `reset`, in MiB: allocated and reserved."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> tuple[float, float] | None:
        """None on a CPU, where a process has no peak that can be told from that of its libraries."""
        if self.device.type != "cuda":
            return None
        stats = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return stats[0] / (1 << 20), stats[1] / (1 << 20)


class ScriptFailed(Exception):
    """The last line of its standard error, and then the end of all of it."""


def said_by(module: str, *arguments: object) -> Any:
    """The JSON that a module of ours, run as a script, prints on its last line. This process first lets go of the
    device's memory.

    Raises:
        ScriptFailed: its exit status is not 0.
    """
    free()
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ScriptFailed("\n".join([lines[-1], *lines[-60:]]))
    return json.loads(done.stdout.splitlines()[-1])
