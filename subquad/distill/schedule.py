"""Learning-rate schedules of a stage: warm-up, then constant, cosine, or warm-up-stable-decay (wsd)."""

import math
from typing import Literal

DECAY_SHARE = 0.1  # share of the steps in which a wsd schedule decays (MiniCPM, arXiv 2404.06395)


def warmup_steps(warmup: float, steps: int) -> int:
    """Number of warm-up steps, at most `steps`: `warmup` is a share of `steps` if below 1, else a number of steps."""
    return min(steps, round(warmup * steps) if warmup < 1 else round(warmup))


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    warmup: int,
    schedule: Literal["constant", "cosine", "wsd"] = "cosine",
    min_ratio: float = 0.1,
) -> float:
    """Factor of the learning rate at `step` (counted from 0) of `steps`.

    The factor grows linearly over `warmup` steps and reaches 1 at the last of these. Cosine and wsd schedules end at
    `min_ratio` at the last of all steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    start = warmup if schedule == "cosine" else max(warmup, steps - round(DECAY_SHARE * steps))
    if step < start:
        return 1.0
    progress = (step + 1 - start) / (steps - start)
    decay = (1 - math.cos(math.pi * progress)) / 2 if schedule == "cosine" else progress
    return 1.0 - (1.0 - min_ratio) * decay
