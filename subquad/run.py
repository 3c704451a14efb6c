"""A run: its folder, its settings, what its parts took, and on what machine and versions it ran."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

import subquad
from subquad.distill.loop import make_accelerator
from subquad.errors import UserError
from subquad.files import claim_folder
from subquad.memory import peak_rss_bytes
from subquad.recipe import Recipe


@dataclass
class Run:
    """A conversion under way: its folder, its settings, and the seconds of each part."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    console: Console
    resume: bool
    seconds: dict[str, float] = field(default_factory=dict)
    base: PreTrainedModel = field(init=False)  # whose attention is replaced: the teacher, or the student's own model

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        """Tells the user, once for all processes."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Enters the seconds that what is within takes."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def write(self, name: str, text: str) -> None:
        """Writes a file of the run: aside first, then renamed."""
        if self.main:
            aside = self.out / f"{name}.tmp"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, self.out / name)

    @contextmanager
    def writing(self, name: str = "") -> Iterator[Path]:
        """A folder aside; what is written into it moves into the run's folder, or one in it, when all is there."""
        aside = self.out / "model.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            (self.out / name).mkdir(exist_ok=True)
            for path in aside.iterdir():
                os.replace(path, self.out / name / path.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def end(self) -> None:
        """Waits for all processes and closes the trackers."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def start_run(recipe: Recipe, out: Path, *, resume: bool, overwrite: bool) -> Run:
    """A run in the folder `out`: new, emptied of an earlier run, or to be resumed with the same recipe.

    Raises UserError, and touches nothing, for a folder that holds something else, or an earlier run without leave.
    """
    accelerator = make_accelerator(out)
    console = Console(quiet=not accelerator.is_main_process)
    run = Run(recipe, out, accelerator, console, resume)
    if run.main:
        _claim(out, recipe, resume=resume, overwrite=overwrite)
        run.write("recipe.yaml", recipe.to_yaml())
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")
    return run


def _claim(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    before = out / "recipe.yaml"
    if before.is_file() and resume and before.read_text(encoding="utf-8") != recipe.to_yaml():
        raise UserError(f"{out} was started with other settings (see {before}); resume with the same command")
    claim_folder(out, earlier=before.is_file(), kind="run", resume=resume, overwrite=overwrite)


def facts(run: Run, command: str | None) -> dict[str, Any]:
    """Seed, versions, machine, memory, command and commit, for metrics.json."""
    return {
        "seed": run.recipe.seed,
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
        "machine": machine(run.accelerator.device) | {"processes": run.accelerator.num_processes},
        "command": command,
        "commit": source_commit(),
    }


def versions() -> dict[str, str]:
    """Of Subquad and what its numbers depend on."""
    return {
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads in use and device."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def source_commit() -> str | None:
    """The commit of the source tree, if Subquad runs from one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
