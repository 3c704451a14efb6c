"""How a stage is watched: one JSON line for every few steps, and a progress bar.

Notable:
- After a kill, the log may be ahead of the checkpoint that training goes on from. `RunLog` then cuts it back to that
  step, so that every step stands in it once.
- On a terminal there is a bar; elsewhere (a file, CI) a plain line every ten seconds.
"""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from subquad.errors import UserError

PLAIN_SECONDS = 10.0


class RunLog:
    """`log.jsonl` of a run: keys stage, name, step, tokens, loss, parts, lr, grad_norm, tokens_per_second, seconds."""

    def __init__(self, path: Path, *, stage: int, step: int) -> None:
        """Opens the log to append to; lines after `step` of stage number `stage` are dropped, and so is a torn line."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs(line, stage, step)]
            aside = path.with_name(path.name + ".tmp")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(aside, path)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line, at once. Raises UserError if it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(
                f"could not write '{self.path}' ({error.strerror}): free some space and go on with --resume."
            ) from None


def _belongs(line: str, stage: int, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:  # the line that a kill tore
        return False
    return (entry["stage"], entry["step"]) <= (stage, step)


class StageProgress:
    """A bar with some figures and the time left; nothing at all without a console. `unit`: what is counted."""

    def __init__(
        self, console: Console | None, name: str, *, steps: int = 0, step: int = 0, unit: str = "step"
    ) -> None:
        self.console, self.name, self.steps, self.unit = console, name, steps, unit
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.start = self.last = self.last_line = time.monotonic()
        self.first = self.step = step
        if console is not None and console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(name, total=steps or None, completed=step, figures="")

    def __enter__(self) -> "StageProgress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, figures: str, steps: int | None = None) -> None:
        """`step` steps are done; of `steps`, where that is known only now, or another part of the work began."""
        now = time.monotonic()
        if steps is not None and (steps != self.steps or step < self.step):
            self.steps, self.first, self.start = steps, step - 1, self.last
            if self.bar is not None:
                self.bar.reset(self.task, total=steps)
        self.step, self.last = step, now
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif self.console is not None and (now - self.last_line >= PLAIN_SECONDS or step == self.steps):
            left = (now - self.start) / (step - self.first) * (self.steps - step)
            self.console.print(
                f"{self.name}: {self.unit} {step:,}/{self.steps:,}  {figures}  {left:,.0f} s left", highlight=False
            )
            self.last_line = now
