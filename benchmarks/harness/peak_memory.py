"""Peak memory of one call above what was there before it, in MiB."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ibft_kernels._workspace import release_logits_buffer

MIB = 1 << 20


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """On a GPU what torch's allocator handed out at the most; on a CPU (Linux) the high-water mark of resident memory.

    The result of the call is dropped. Freed heap goes back to the kernel first, or its reuse would hide allocations.
    """
    gc.collect()
    release_kept_buffers()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def peaks_mib(prepare: Callable[[], Callable[[], object]], device: torch.device) -> tuple[float, float]:
    """(allocated, reserved) of one call that `prepare` makes ready: what the allocator handed out at the most, and what
    it took from the system for that.

    On a CPU the first is counted from the allocator's events; the second is the growth of the resident set: a library's
    own buffers count in it, and pages that malloc still held do not.
    """
    if device.type != "cuda":
        call = prepare()
        release_kept_buffers()
        return live_bytes(call)[0] / MIB, peak_mib(prepare(), device)
    call = prepare()
    release_kept_buffers()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    call()
    torch.cuda.synchronize(device)
    after = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (after[0] - before[0]) / MIB, (after[1] - before[1]) / MIB


def release_kept_buffers() -> None:
    """What our ops keep from one call for the next is theirs: it counts in the call that is measured."""
    release_logits_buffer()
    if kept := sys.modules.get("ibft.nf4"):
        kept.release_dense_buffers()


def live_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(peak, left at the end) of what torch's CPU allocator handed out during the call and not before, in bytes.

    Counted from the allocator's own events, so exact and the same on every run; what was there before and is freed
    in the call does not count. The result of the call must be held by the caller to be counted as left.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak, level


def tensor_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage of a CPU tensor that Python's collector tracks, by address: after `gc.freeze()` the new ones."""
    gc.collect()
    # by type(): asking every object's __class__ wakes lazy modules
    tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu")
    return {s.data_ptr(): s for s in (x.untyped_storage() for x in tensors if x.layout == torch.strided)}


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
