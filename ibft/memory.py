"""Memory of a device: the peak of the run so far, and what is free."""

import sys
from pathlib import Path

import torch


def peak_memory_mib(device: torch.device) -> float:
    """The GPU allocator's peak where there is one, else the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still allocate on the device; None where the system does not say.

    On a GPU that is asked after its context exists, so the context is taken off already. On a CPU: what Linux calls
    available, or what a container's limit leaves of it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
                limit = _container_room()
                return available if limit is None else min(available, limit)
    except (OSError, ValueError, IndexError):
        pass
    return None


def _container_room(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a version 2 control group leaves; file pages that can be dropped at any time are free. None: no limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
