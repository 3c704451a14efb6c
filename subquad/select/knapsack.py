"""The multiple-choice knapsack: of every item one option, so that they are worth the most within a limit.

Solved by dynamic programming over a grid of costs. Costs that are whole numbers lie on the grid as they are, where
their greatest common divisor makes it coarse enough; all others are rounded up to it, so that the limit holds.

Legend: C cells of the grid.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Option: TypeAlias = tuple[float, float]  # value, cost

CELLS = 2**14


def solve(items: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """The option of every item with which the values have the greatest sum while the costs' is at most `limit`.

    Of equals the cheapest, then those that take the cheapest options of late items. Exact on whole costs where `limit`
    (above the cheapest options) is at most `CELLS` times their greatest common divisor. Else costs are rounded up by
    less than a cell each, to CELLS cells: no worse than the best within limit x (1 - items / CELLS).
    None where even the cheapest options cost more. Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004.
    """
    cheapest = [min(cost for _, cost in item) for item in items]  # may be below zero
    above = [[cost - least for _, cost in item] for item, least in zip(items, cheapest, strict=True)]
    limit -= sum(cheapest)
    if limit < 0:
        return None
    if sum(max(costs) for costs in above) <= limit:
        return [item.index(max(item, key=lambda option: (option[0], -option[1]))) for item in items]

    cells, top = _on_grid(above, limit)
    best_C = np.full(top + 1, -np.inf)  # the greatest value at exactly this cost
    best_C[0] = 0.0
    taken = np.zeros((len(items), top + 1), np.int16)
    for row, item in enumerate(items):
        before_C, best_C = best_C, np.full(top + 1, -np.inf)
        for option in sorted(range(len(item)), key=above[row].__getitem__):  # the cheapest of equals in a cell is first
            cost = cells[row][option]
            if cost <= top:
                with_option_C = before_C[: top + 1 - cost] + item[option][0]
                better_C = with_option_C > best_C[cost:]
                best_C[cost:][better_C] = with_option_C[better_C]
                taken[row, cost:][better_C] = option

    at = int(best_C.argmax())  # the first, which is the cheapest
    chosen: list[int] = []
    for row in range(len(items) - 1, -1, -1):
        chosen.append(int(taken[row, at]))
        at -= cells[row][chosen[-1]]
    return chosen[::-1]


def _on_grid(costs: Sequence[Sequence[float]], limit: float) -> tuple[list[list[int]], int]:
    """The costs in cells of the grid, and the limit."""
    if all(float(cost).is_integer() for item in costs for cost in item):
        step = math.gcd(*(int(cost) for item in costs for cost in item))
        if limit // step <= CELLS:
            return [[int(cost) // step for cost in item] for item in costs], int(limit // step)
    width = limit / CELLS or 1.0  # with a limit of 0 all that costs anything is out
    return [[math.ceil(cost / width) for cost in item] for item in costs], CELLS if limit else 0
