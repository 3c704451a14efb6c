"""Memory that this process holds, its peak, and what is available: of the GPU if there is one, else of the machine."""

import ctypes
import math
import resource
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS, _MACHINE = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
_LIMIT, _USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")  # of a container


def reset_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory_bytes` to the bytes held now, where the system can (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # the high-water mark of the resident set, see proc(5)
    except OSError:
        pass


def release_free_memory() -> None:
    """Returns freed memory to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated, within the container's limit; infinite where the system gives no number."""
    if device.type == "cuda":
        freed = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return freed + torch.cuda.mem_get_info(device)[0]
    available = 1024 * _entry(_MACHINE, "MemAvailable") if _MACHINE.exists() else math.inf
    limit = _LIMIT.read_text().strip() if _LIMIT.exists() else "max"
    return available if limit == "max" else min(available, int(limit) - _entry(_USE, "anon"))


def held_bytes(device: torch.device) -> int:
    """Bytes held now; the peak so far on a system without /proc."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_memory_bytes(device: torch.device) -> int:
    """The most bytes held at once since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    if not _STATUS.exists():
        return peak_rss_bytes()
    return 1024 * _entry(_STATUS, key)


def _entry(file: Path, key: str) -> int:
    """Number after a key in one of the kernel's files: kB under /proc, bytes elsewhere."""
    rows = (line.split() for line in file.read_text().splitlines())
    return next(int(row[1]) for row in rows if row[0].rstrip(":") == key)


def peak_rss_bytes() -> int:
    """Peak memory of this process so far (maximum resident set size), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kB, macOS in bytes
