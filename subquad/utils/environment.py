"""Versions, machine and source commit: what a result needs to be reproduced."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from subquad.utils.format import plain, size
from subquad.version import __version__


def environment(device: torch.device, command: str | None, processes: int | None = None) -> dict[str, Any]:
    """Versions, machine, command and source commit: the entries that every result file has.

    `processes`: number of processes that worked together, where the result depends on it.
    """
    return {
        "versions": versions(),
        "machine": machine(device) | ({} if processes is None else {"processes": processes}),
        "command": command,
        "commit": source_commit(),
    }


def versions() -> dict[str, str]:
    """Versions of Subquad and of the packages that its numbers depend on."""
    return {
        "subquad": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, its cores, threads in use, and device."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Model name of a GPU, or the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def source_commit() -> str | None:
    """The commit of the source tree, if Subquad runs from one."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() if git.returncode == 0 else None


PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "triton",
    "flash-linear-attention",
    "lm-eval",
)
# Variables that change results, speed or what is loaded; a name that could hold a token must not be added.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "SUBQUAD_CACHE",
    "TRANSFORMERS_OFFLINE",
)


def environment_report() -> dict[str, str]:
    """Versions, hardware, commit and environment variables, for a bug report: labels and values in reading order."""
    packages = {name: _installed_version(name) for name in PACKAGES}
    variables = sorted(name for name in os.environ if name in VARIABLES or name.startswith("MALLOC_"))
    return {
        "subquad": __version__,
        "commit": source_commit() or "none (not run from a git checkout)",
        **packages,
        "Python": platform.python_version(),
        "OS": platform.platform(),
        "processor": processor(),
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads in use)",
        "memory": plain(size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        "GPUs": ", ".join(_gpus()) or "none",
        **{name: os.environ[name] for name in variables},
    }


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    """Name and memory of each GPU that PyTorch can use."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name} ({plain(size(gpu.total_memory))}, CUDA {torch.version.cuda})" for gpu in properties]
