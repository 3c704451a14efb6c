"""How the learning rate moves over a stage: warm-up, then constant, cosine, or warm-up-stable-decay."""

import math
from typing import Literal

DECAY_SHARE = 0.1  # the part of a wsd schedule that decays (MiniCPM, arXiv 2404.06395)


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` as steps: a share of `steps` below 1, else a number of steps, and never more than there are."""
    return min(steps, round(warmup * steps) if warmup < 1 else round(warmup))


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    warmup: int,
    schedule: Literal["constant", "cosine", "wsd"] = "cosine",
    min_ratio: float = 0.1,
) -> float:
    """What the learning rate is multiplied by at `step` (counted from 0) of `steps`.

    It grows linearly over `warmup` steps, reaching 1 at the last of them; at the last step of all, cosine and wsd
    schedules have come down to `min_ratio`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    start = warmup if schedule == "cosine" else max(warmup, steps - round(DECAY_SHARE * steps))
    if step < start:
        return 1.0
    progress = (step + 1 - start) / (steps - start)
    fall = (1 - math.cos(math.pi * progress)) / 2 if schedule == "cosine" else progress
    return 1.0 - (1.0 - min_ratio) * fall
