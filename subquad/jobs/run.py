"""A run: its folder, its settings, the time of its parts, and the machine and versions it ran on."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console

from subquad.errors import UserError
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import EvaluateConfig, Recipe
from subquad.utils.environment import environment
from subquad.utils.files import claim_folder, write_aside
from subquad.utils.memory import peak_rss_bytes


@dataclass
class Run:
    """A conversion under way: its folder, its settings, and the seconds of each part."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    console: Console
    resume: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return bool(self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        """Prints a line, once for all processes."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Records the seconds that the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def write(self, name: str, text: str) -> None:
        """Writes a file of the run."""
        if self.main:
            with write_aside(self.out / name) as aside:
                aside.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str = "") -> Iterator[Path]:
        """Folder aside whose files move into the run's folder, or the folder `name` in it, when all are written."""
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

    Only `evaluate` may differ in a resumed run: it does not change what is trained.

    Raises UserError, and touches nothing, for a folder that holds something else, or an earlier run with neither
    `resume` nor `overwrite`.
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
    if before.is_file() and resume and _trained(load_recipe(before)) != _trained(recipe):
        raise UserError(
            f"{out} was started with other settings (see {before}); resume with the same command (only 'evaluate' may "
            "differ)"
        )
    claim_folder(out, earlier=before.is_file(), kind="run", resume=resume, overwrite=overwrite)


def _trained(recipe: Recipe) -> str:
    """The settings that training depends on, as text."""
    return recipe.model_copy(update={"evaluate": EvaluateConfig()}).to_yaml()


def provenance(run: Run, command: str | None) -> dict[str, Any]:
    """Seed, versions, machine, memory, command and commit, for metrics.json."""
    return {
        "seed": run.recipe.seed,
        "peak_rss_bytes": peak_rss_bytes(),
        **environment(run.accelerator.device, command, run.accelerator.num_processes),
    }


def make_accelerator(out: Path, mixed_precision: Literal["no", "bf16"] | None = None) -> Accelerator:
    """This process among those that were launched, with its device; its tracker will write to `out`/tensorboard.

    Nothing is written before `init_trackers("tensorboard")`; `end_training()` closes the tracker. `mixed_precision`
    defaults to that of `accelerate launch`, or none.
    """
    # Without cpu=True, processes that were launched on a machine with no GPU would not find each other.
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=on_cpu, mixed_precision=mixed_precision, log_with="tensorboard", project_dir=out)
