"""Progress of long work: a bar on a terminal, elsewhere (a file, CI) a plain line every ten seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class StageProgress:
    """A bar with figures and the time left; silent without a console. `unit`: of the steps, such as "piece"."""

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
        """Shows that `step` steps are done, of `steps` if that number is new or another part of the work began."""
        now = time.monotonic()
        if steps is not None and (steps != self.steps or step < self.step):
            self.steps, self.first, self.start = steps, step - 1, self.last
            if self.bar is not None:
                self.bar.reset(self.task, total=steps)
        self.step, self.last = step, now
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif self.console is not None and (now - self.last_line >= PLAIN_SECONDS or step == self.steps):
            seconds_left = (now - self.start) / (step - self.first) * (self.steps - step)
            line = f"{self.name}: {self.unit} {step:,}/{self.steps:,}  {figures}  {seconds_left:,.0f} s left"
            self.console.print(line, highlight=False)
            self.last_line = now
