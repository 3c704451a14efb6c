"""What is known of a stage besides its tensors: what it has done so far, what it did, and what decides its result."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from subquad.data.batch import TokenSource
from subquad.plan import Plan
from subquad.recipes.stage import Stage

# Settings that do not change what a stage ends with
NO_EFFECT = {"name", "scope", "log_every", "checkpoint_every", "gradient_checkpointing"}


@dataclass(frozen=True)
class StageResult:
    """What a stage did. Losses are those of its first step and the mean of its last; speeds are of all processes."""

    name: str
    objective: str
    steps: int
    tokens: int
    seconds: float  # of training: without checkpoints and the timing of the teacher
    tokens_per_second: float
    bare_forward_tokens_per_second: float  # the teacher's forward pass alone, timed within the stage
    share_of_bare_forward: float
    peak_memory_bytes: int  # of this process (of the GPU, if it trains on one) by the end of the stage
    ended_on_plateau: bool  # before all of its tokens were used
    first_loss: float
    final_loss: float
    final_parts: dict[str, float]  # by layer ("layer 3"), or by objective ("logits", "labels")

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)


@dataclass
class Ledger:
    """What a stage has done so far: all that a checkpoint must know besides tensors. A loss here is a list of parts."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # of training
    first: list[float] = field(default_factory=list)  # loss of the first step
    recent: list[list[float]] = field(default_factory=list)  # losses of the last steps
    unlogged: list[list[float]] = field(default_factory=list)  # losses since the last line of the log
    logged_seconds: float = 0.0  # `seconds` at that line
    window: list[float] = field(default_factory=list)  # losses of the window under way
    best_window: float | None = None  # the least mean of a whole window so far
    settled: bool = False  # the last window was no better

    def add(self, loss: list[float], seconds: float, keep: int) -> None:
        """Enter one more step, and keep the losses of the last `keep`."""
        self.step += 1
        self.seconds += seconds
        self.first = self.first or loss
        self.recent = [*self.recent, loss][-keep:]
        self.unlogged.append(loss)

    def watch(self, total: float, steps: int, improvement: float) -> None:
        """Enter the total loss of a step; settles when a window of `steps` is no better than the best before it."""
        self.window.append(total)
        if len(self.window) < steps:
            return
        mean_loss = sum(self.window) / steps
        if self.best_window is not None and mean_loss > (1 - improvement) * self.best_window:
            self.settled = True
        self.best_window = mean_loss if self.best_window is None else min(mean_loss, self.best_window)
        self.window = []


def mean(losses: list[list[float]]) -> list[float]:
    """The mean of each part over several losses."""
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
    """What decides the result of a stage, as short hashes, under the names that a user knows.

    The teacher is known by the names, shapes, and first values of its parameters, the text by its first batch.
    """
    settings = stage.model_dump(mode="json", exclude=NO_EFFECT)
    teacher_weights = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        start = parameter.detach().flatten()[:8].float().cpu()
        teacher_weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {start.tolist()}".encode())
    text_BT = corpus.batch(0, batch=stage.batch, sequence_length=stage.sequence_length, seed=seed)
    return {
        "recipe": _short(json.dumps([index, settings], sort_keys=True)),
        "precision": precision,
        "seed": str(seed),
        "teacher": teacher_weights.hexdigest()[:16],
        "plan": _short(plan.to_yaml()),
        "text": _short(str(text_BT.tolist())),
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
