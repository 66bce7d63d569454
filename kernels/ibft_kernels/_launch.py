"""Launch shapes (block sizes, warps, stages) as data: launch/<architecture>.json, one entry a kernel.

    {"ib_kl": {"TILE": 1024, "num_warps": 4, "num_stages": 1, "measured": null}, ...}

`measured` says where a search chose the shape (device, versions, date); null: unmeasured, a choice that the AOT table
shows to compile without a spill and to fit the architecture. A key may end in "/16" or "/32" (bits of an element); that
entry wins over the plain one. Lengths are no part of a key: no batch looks anything up anew or compiles anew. An
interpreted program costs milliseconds whatever its size, so the interpreter's file has few and large ones.

Search is opt-in: IBFT_AUTOTUNE=1 searches at a kernel's first use in a process, `python -m ibft_kernels.tune` searches
every kernel and writes the file.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "ARCHITECTURES",
    "LAUNCH_FOLDER",
    "architecture_of",
    "chosen",
    "launch_shape",
    "shape_key",
    "shapes_of",
    "stored_shape",
    "tile_blocks",
]

LAUNCH_FOLDER = Path(__file__).parent / "launch"
# Turing, Ampere (A100, consumer), Ada, Hopper, Blackwell (data centre, consumer)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

chosen: dict[tuple[str, str], dict[str, Any]] = {}  # (architecture, key): what a search in this process found


def architecture_of(device: torch.device) -> str:
    """The name of a device's file: sm_ and the nearest capability that is not newer; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    known = [a for a in ARCHITECTURES if a <= 10 * major + minor]
    return f"sm_{max(known, default=ARCHITECTURES[0])}"


@cache
def shapes_of(architecture: str) -> dict[str, dict[str, Any]]:
    return json.loads((LAUNCH_FOLDER / f"{architecture}.json").read_text(encoding="utf-8"))


def shape_key(kernel: str, architecture: str, dtype: torch.dtype) -> str:
    """The key of one kernel's entry: with the bits of an element, where the file tells them apart."""
    by_bits = f"{kernel}/{8 * dtype.itemsize}"
    return by_bits if by_bits in shapes_of(architecture) else kernel


def stored_shape(architecture: str, key: str) -> dict[str, Any]:
    """The file's entry as launch arguments, a new dict."""
    return {name: value for name, value in shapes_of(architecture)[key].items() if name != "measured"}


def launch_shape(kernel: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The shape of one kernel as launch arguments: its block sizes, num_warps and num_stages. A new dict."""
    architecture = architecture_of(device)
    key = shape_key(kernel, architecture, dtype)
    found = chosen.get((architecture, key))
    if found is None and architecture != "interpreter" and os.environ.get("IBFT_AUTOTUNE") == "1":
        from .tune import search

        found = search(key, device)
    return stored_shape(architecture, key) if found is None else dict(found)


def tile_blocks(tile: int, n_columns: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_C): `tile` elements whatever the width, 256 columns at most; wider rows are walked or cut."""
    block_c = min(256, max(16, 1 << (n_columns - 1).bit_length()))
    return max(1, tile // block_c), block_c
