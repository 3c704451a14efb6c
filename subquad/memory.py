"""What this process holds and the most it took: of the GPU where there is one, else of the machine."""

import resource
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory_bytes` start from what is held now, where the system can (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # the high-water mark of the resident set, see proc(5)
    except OSError:
        pass


def held_bytes(device: torch.device) -> int:
    """What is held now (on a system without /proc: the most so far)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_memory_bytes(device: torch.device) -> int:
    """The most bytes held at once since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    if not _STATUS.exists():
        return peak_rss_bytes()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def peak_rss_bytes() -> int:
    """The most memory this process has held at once so far (maximum resident set size), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kB, macOS in bytes
