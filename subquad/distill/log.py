"""Training log of a run: one JSON line every few steps.

After a kill, the log may be ahead of the checkpoint from which training resumes. `RunLog` then drops the lines after
that checkpoint, so that each step is logged once.
"""

import json
from pathlib import Path
from typing import Any

from subquad.errors import UserError
from subquad.utils.files import write_aside


class RunLog:
    """`log.jsonl` of a run: keys stage, name, step, tokens, loss, parts, lr, grad_norm, tokens_per_second, seconds."""

    def __init__(self, path: Path, *, stage: int, step: int) -> None:
        """Opens the log for appending. Drops the lines after `step` of stage number `stage`, and an incomplete line."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs(line, stage, step)]
            with write_aside(path) as aside:
                aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line and closes the file. Raises UserError if it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(
                f"could not write '{self.path}' ({error.strerror}): free some space and resume with --resume."
            ) from None


def _belongs(line: str, stage: int, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return False
    return (entry["stage"], entry["step"]) <= (stage, step)
