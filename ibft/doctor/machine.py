"""The machine: memory, disk where training writes, and threads."""

import os
import shutil
from pathlib import Path

from ibft.doctor.finding import Finding

GIB = 1 << 30
LEAST_MEMORY = 2 * GIB  # libraries and the bundled model
LEAST_HERE = 5 * GIB  # a run of a 7B base: adapters and two checkpoints with their optimizer states
LEAST_MODELS = 20 * GIB  # a 7B base in 16 bits
LEAST_ENCODED = 1 * GIB  # 4 bytes a token


def memory() -> Finding:
    import torch

    from ibft.memory import free_memory

    free = free_memory(torch.device("cpu"))
    if free is None:
        return Finding("note", "this system does not say what is free")
    found = f"{free / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        return Finding("warning", found, f"the bundled model wants {LEAST_MEMORY // GIB} GiB: close other programs")
    return Finding("ok", found)


def threads() -> Finding:
    """Of a run on the CPU; a GPU waits for one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, named = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    found = f"torch computes with {count} on {cores} cores" + (f" (OMP_NUM_THREADS={named})" if named else "")
    if count > cores:
        return Finding("warning", found, f"more threads than cores wait for each other: OMP_NUM_THREADS={cores}")
    if named and 2 * count < cores and not torch.cuda.is_available():
        return Finding("warning", found, f"training on the CPU would use more: OMP_NUM_THREADS={cores}")
    return Finding("ok", found)


def here() -> Finding:
    return room(Path.cwd(), LEAST_HERE, "a run of a 7B base", "train -o puts a run elsewhere")


def hub_cache() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    return room(Path(HF_HUB_CACHE), LEAST_MODELS, "a 7B base", "HF_HOME puts downloaded models elsewhere")


def encoded_data() -> Finding:
    from ibft.data.cache import cache_folder

    return room(
        cache_folder(), LEAST_ENCODED, "a data set of 250 million tokens",
        "IBFT_CACHE puts it elsewhere; --no-cache does without",
    )  # fmt: skip


def room(folder: Path, least: int, what: str, elsewhere: str) -> Finding:
    """What is free in a folder, or in the one above that will hold it, and whether one may write there.

    least: bytes that `what` takes there. elsewhere: how to have it somewhere else.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return Finding("warning", f"{folder}: no right to write in {above}", elsewhere)
    free = shutil.disk_usage(above).free
    found = f"{folder}: {free / GIB:.1f} GiB free"
    if free < least:
        return Finding("warning", found, f"{what} wants {least // GIB} GiB; {elsewhere}")
    return Finding("ok", found)
