"""Agreement of two rankings of the same units."""

from collections.abc import Sequence

import torch


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equals share their mean rank."""
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    size = (centred[0].square().sum() * centred[1].square().sum()).sqrt()
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1) / 2


def overlap(a: Sequence[float], b: Sequence[float], count: int) -> float:
    """Share of the first `count` that two rankings have in common."""
    first = [set(sorted(range(len(values)), key=values.__getitem__, reverse=True)[:count]) for values in (a, b)]
    return len(first[0] & first[1]) / count
