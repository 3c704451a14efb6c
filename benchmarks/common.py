"""Date, machine, versions and command, which every benchmark writes with its numbers."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from subquad.utils.environment import environment

ROOT = Path(__file__).parents[1]
TELLING = ("MALLOC_", "OMP_", "MKL_")  # environment variables that change speeds


def facts(command: str, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Date, command, commit, machine, versions and settings, for the JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(device, command),
        "modified_since": modified_files(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TELLING)},
        "settings": dict(settings),
    }


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """The command that runs a benchmark with these arguments; none: those of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def modified_files() -> list[str]:
    """Files of the source tree that are not as in the commit, if there is one."""
    command = [
        "git",
        "status",
        "--porcelain",
        "--",
        "subquad",
        "benchmarks/*.py",
        "benchmarks/ops",
        "benchmarks/claims",
    ]
    status = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line[3:] for line in status.stdout.splitlines()]


def wide_console() -> Console:
    """Console for tables, wide where it is no terminal: 80 columns would break every cell."""
    console = Console()
    return console if console.is_terminal else Console(width=180)
