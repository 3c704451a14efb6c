"""The multiple-choice knapsack: one option of every item, with the greatest total value within a limit.

Solved by dynamic programming over a grid of costs. Integer costs lie on the grid exactly if their greatest common
divisor makes it coarse enough; all others are rounded up to it, so the limit holds.

Legend: C cells of the grid.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Option: TypeAlias = tuple[float, float]  # value, cost

CELLS = 2**14


def solve(items: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """The option of every item for which the sum of values is greatest and the sum of costs at most `limit`.

    Ties go to the cheapest solution, then to the cheapest options of late items. Exact for integer costs if `limit`
    (above the cheapest options) is at most `CELLS` times their greatest common divisor. Otherwise costs are rounded up
    by less than a cell each, to CELLS cells: no worse than the best within limit x (1 - items / CELLS).
    None if even the cheapest options cost more. Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004.
    """
    # Costs above each item's cheapest option.
    cheapest = [min(cost for _, cost in item) for item in items]  # may be below zero
    above = [[cost - min_cost for _, cost in item] for item, min_cost in zip(items, cheapest, strict=True)]
    limit -= sum(cheapest)
    if limit < 0:
        return None
    if sum(max(costs) for costs in above) <= limit:
        return [item.index(max(item, key=lambda option: (option[0], -option[1]))) for item in items]

    # Forward: the best value at every exact cost, item by item.
    cells, top = _on_grid(above, limit)
    best_C = np.full(top + 1, -np.inf)  # the greatest value at exactly this cost
    best_C[0] = 0.0
    choices = np.zeros((len(items), top + 1), np.int16)
    for row, item in enumerate(items):
        before_C, best_C = best_C, np.full(top + 1, -np.inf)
        # Ascending costs: among equals in a cell, the cheapest comes first.
        for _, option in sorted((cost, option) for option, cost in enumerate(above[row])):
            cost = cells[row][option]
            if cost <= top:
                with_option_C = before_C[: top + 1 - cost] + item[option][0]
                better_C = with_option_C > best_C[cost:]
                best_C[cost:][better_C] = with_option_C[better_C]
                choices[row, cost:][better_C] = option

    # Backward: the options behind the best value.
    cell = int(best_C.argmax())  # the first one, which is the cheapest
    solution: list[int] = []
    for row in range(len(items) - 1, -1, -1):
        solution.append(int(choices[row, cell]))
        cell -= cells[row][solution[-1]]
    return solution[::-1]


def _on_grid(costs: Sequence[Sequence[float]], limit: float) -> tuple[list[list[int]], int]:
    """The costs in cells of the grid, and the limit."""
    if all(float(cost).is_integer() for item in costs for cost in item):
        step = math.gcd(*(int(cost) for item in costs for cost in item))
        if limit // step <= CELLS:
            return [[int(cost) // step for cost in item] for item in costs], int(limit // step)
    width = limit / CELLS or 1.0  # with a limit of 0, only free options fit
    return [[math.ceil(cost / width) for cost in item] for item in costs], CELLS if limit else 0
