"""Runs of a claim: each with its settings, kept in a file when it is done, so that a script that was stopped goes on.

Notable:
- A run is known by its settings alone, not by the code: after a change that matters, give another folder.
- The order of the runs is by seed first, so that what is compared was measured in the same stretch of time.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.console import Console

from subquad.utils.files import write_json

Settings = Mapping[str, Any]
Result = dict[str, Any]


class Store:
    """Finished runs in a folder, one JSON file each."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console

    def run(self, settings: Settings, job: Callable[[Settings], Result]) -> Result:
        """The result of `job(settings)`, from the folder if it is there, with its settings.

        `seconds` is what the whole run took, where the job does not say what counts.
        """
        path = self._path(settings)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        started = time.perf_counter()
        result = job(settings)
        result = {"seconds": time.perf_counter() - started, **result, "settings": dict(settings)}
        write_json(path, result)
        shown = ", ".join(f"{value}" for key, value in settings.items() if key not in ("teacher", "rates"))
        self.console.print(f"[dim]{result['seconds']:6.1f} s[/]  {shown}", highlight=False)
        return result

    def adopt(self, report: Any) -> None:
        """Keeps the finished runs of an earlier report, wherever in it they stand, as if they had been run here."""
        if isinstance(report, dict) and isinstance(report.get("settings"), dict) and "seconds" in report:
            if not (path := self._path(report["settings"])).is_file():
                write_json(path, report)
        elif isinstance(report, (dict, list)):
            for part in report.values() if isinstance(report, dict) else report:
                self.adopt(part)

    def _path(self, settings: Settings) -> Path:
        text = json.dumps(settings, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class Mean(NamedTuple):
    """Over seeds; the spread is the standard deviation of a single run (0 of one alone)."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values))

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """Text for a table."""
        spread = f" ± {self.spread:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:{'+' if signed else ''}.{digits}f}{spread}"
