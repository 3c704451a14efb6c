"""State of a stage besides its tensors: its progress, its result, and the identity that a resumed run must match."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from subquad.data.batch import TokenSource
from subquad.plan import Plan
from subquad.recipes.stage import Stage

# Settings that do not change the weights a stage ends with
NO_EFFECT = {"name", "scope", "log_every", "checkpoint_every", "gradient_checkpointing"}


@dataclass(frozen=True)
class StageResult:
    """Result of a stage. `final_loss` is a mean over the last steps; speeds are summed over all processes."""

    name: str
    objective: str
    steps: int
    tokens: int
    seconds: float  # of training, without writing checkpoints and timing the teacher
    tokens_per_second: float
    bare_forward_tokens_per_second: float  # the teacher's forward pass alone, timed during the stage
    share_of_bare_forward: float
    peak_memory_bytes: int  # of this process, or of its GPU, up to the end of the stage
    ended_on_plateau: bool  # before all of its tokens were used
    first_loss: float
    final_loss: float
    final_parts: dict[str, float]  # by layer ("layer 3"), or by objective ("logits", "labels")

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of metrics.json."""
        return asdict(self)


@dataclass
class Ledger:
    """Progress of a stage: everything in a checkpoint besides tensors. A loss is a list of its parts."""

    step: int = 0  # completed optimiser steps
    seconds: float = 0.0  # of training
    first: list[float] = field(default_factory=list)  # loss of the first step
    recent: list[list[float]] = field(default_factory=list)  # losses of the last steps
    unlogged: list[list[float]] = field(default_factory=list)  # losses since the last line of the log
    logged_seconds: float = 0.0  # `seconds` at that line
    window: list[float] = field(default_factory=list)  # total losses of the current window, for the plateau rule
    best_window: float | None = None  # the lowest mean of a complete window
    settled: bool = False  # the last window brought no improvement: training ends

    def add(self, loss: list[float], seconds: float, recent_steps: int) -> None:
        """Adds a step; `recent` keeps the losses of the last `recent_steps`."""
        self.step += 1
        self.seconds += seconds
        self.first = self.first or loss
        self.recent = [*self.recent, loss][-recent_steps:]
        self.unlogged.append(loss)

    def check_plateau(self, total: float, steps: int, improvement: float) -> None:
        """Adds the total loss of a step; sets `settled` if a window of `steps` is no better than the best before."""
        self.window.append(total)
        if len(self.window) < steps:
            return
        mean_loss = sum(self.window) / steps
        if self.best_window is not None and mean_loss > (1 - improvement) * self.best_window:
            self.settled = True
        self.best_window = mean_loss if self.best_window is None else min(mean_loss, self.best_window)
        self.window = []


def mean_parts(losses: list[list[float]]) -> list[float]:
    """Mean of each part over several losses."""
    return [sum(column) / len(losses) for column in zip(*losses, strict=True)]


def identity(
    stage: Stage,
    index: int,
    seed: int,
    plan: Plan,
    teacher: PreTrainedModel,
    corpus: TokenSource,
    precision: str,
) -> dict[str, str]:
    """Short hashes of everything that determines the result of a stage, under the names that users know.

    The teacher is identified by the names, shapes and first values of its parameters, the text by its first batch.
    """
    settings = stage.model_dump(mode="json", exclude=NO_EFFECT)
    teacher_weights = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        first_values = parameter.detach().flatten()[:8].float().cpu()
        teacher_weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {first_values.tolist()}".encode())
    text_BT = corpus.batch(0, batch=stage.batch, sequence_length=stage.sequence_length, seed=seed)
    return {
        "recipe": _short_hash(json.dumps([index, settings], sort_keys=True)),
        "precision": precision,
        "seed": str(seed),
        "teacher": teacher_weights.hexdigest()[:16],
        "plan": _short_hash(plan.to_yaml()),
        "text": _short_hash(str(text_BT.tolist())),
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
