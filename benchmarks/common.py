"""What every benchmark writes beside its numbers: when, where, with what, and how."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import subquad
from subquad.run import device_name, processor, source_commit

ROOT = Path(__file__).parents[1]
TELLING = ("MALLOC_", "OMP_", "MKL_")  # environment variables that change speeds


def facts(command: str, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Date, command, commit, machine, versions and settings, for the JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": source_commit(),
        "modified_since": modified_files(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device_name(device),
        },
        "versions": {
            "subquad": subquad.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
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
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line[3:] for line in found.stdout.splitlines()]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report: aside first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def wide_console() -> Console:
    """Where tables are printed: a file has room; 80 columns would break every cell."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
