"""Training log of a run: one JSON line for every few steps.

After a kill, the log may be ahead of the checkpoint that training resumes from. `RunLog` then cuts it back to that
step, so that every step is in it once.
"""

import json
from pathlib import Path
from typing import Any

from subquad.errors import UserError
from subquad.utils.files import write_aside


class RunLog:
    """`log.jsonl` of a run: keys stage, name, step, tokens, loss, parts, lr, grad_norm, tokens_per_second, seconds."""

    def __init__(self, path: Path, *, stage: int, step: int) -> None:
        """Opens the log to append to; lines after `step` of stage number `stage` are dropped, and so is a torn line."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _belongs(line, stage, step)]
            with write_aside(path) as aside:
                aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

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
