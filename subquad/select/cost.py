"""The cost of units, and the best units within a limit: bytes of the cache, or seconds of a decoding step.

Costs of units do not add up. Query heads that share a key/value head store its keys and values once, however many of
them attend; layers with a sliding window hold less; and the size of a mixer's states depends on its heads. So the units
that use the same key/value heads form one item of a knapsack, whose options keep none, its best, its two best, ... at
their real cost. The remaining interaction (states shared by heads) is small; it is settled on the real cost of the
whole plan, which is a sum over its layers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from subquad.plan import AttentionShape, Plan
from subquad.select.budget import Cost
from subquad.select.knapsack import Option, solve
from subquad.select.units import Unit, heads_of

PlanOf: TypeAlias = Callable[[Unit], Plan]  # the plan with attention in some heads
Total: TypeAlias = Callable[[Unit], float]  # the cost of that plan

_TINY_WORTH = 1e-6  # relative to the least worth above zero
_ROUNDING = 1e-12  # relative error of a sum of seconds


def best_units(
    units: Sequence[Unit],
    values: Sequence[float],
    shapes: Sequence[AttentionShape],
    plan_of: PlanOf,
    cost: Cost,
    limit: float,
) -> list[int] | None:
    """Indices of the units with the greatest total value whose plan costs no more than `limit`.

    `cost` must be a sum over a plan's layers. Units whose value is not above zero only fill remaining space. None if
    even a plan without attention costs more.
    """
    return _best(units, _positive(values), groups_of(units, shapes), by_layers(plan_of, cost), limit)


def front(
    units: Sequence[Unit],
    values: Sequence[float],
    shapes: Sequence[AttentionShape],
    plan_of: PlanOf,
    cost: Cost,
    points: int = 24,
) -> list[dict[str, Any]]:
    """The Pareto front of value over cost: the best units at `points` (at least 2) limits from no attention to all.

    Each point has the `cost` of its plan, its `value` (its share of all value above zero) and its `units`, by index.
    Cost and value rise from point to point.
    """
    # The best units at evenly spaced limits.
    worth = [max(value, 0.0) for value in values]
    total_worth = sum(worth) or 1.0
    groups, total = groups_of(units, shapes), by_layers(plan_of, cost)
    limits = np.linspace(total([]), total(heads_of(units, range(len(units)))), points)
    selections = [_best(units, worth, groups, total, limit) for limit in limits.tolist()]
    candidates: list[dict[str, Any]] = [
        {
            "cost": total(heads_of(units, selection)),
            "value": sum(worth[unit] for unit in selection) / total_worth,
            "units": selection,
        }
        for selection in selections
        if selection is not None
    ]

    # Only the points with more value than all cheaper ones.
    rising: list[dict[str, Any]] = []
    for point in sorted(candidates, key=lambda point: (point["cost"], -point["value"])):
        if not rising or point["value"] > rising[-1]["value"]:
            rising.append(point)
    return rising


def groups_of(units: Sequence[Unit], shapes: Sequence[AttentionShape]) -> list[list[int]]:
    """Groups of units that share keys and values, by index: heads of one key/value head; larger units alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, unit in enumerate(units):
        layer, head = unit[0]  # a unit is one head, or has all heads of its layers
        shape = shapes[layer]
        groups.setdefault((layer, head // (shape.heads // shape.kv_heads)), []).append(index)
    return list(groups.values())


def items_of(
    groups: Sequence[Sequence[int]], units: Sequence[Unit], values: Sequence[float], total: Total
) -> list[list[Option]]:
    """A knapsack item for each group: its option k keeps the first k units, at the cost that they add."""
    base_cost = total([])
    return [
        [
            (sum(values[unit] for unit in group[:count]), total(heads_of(units, group[:count])) - base_cost)
            for count in range(len(group) + 1)
        ]
        for group in groups
    ]


def by_layers(plan_of: PlanOf, cost: Cost) -> Total:
    """The cost of the plan that keeps some heads, as a sum over layers; the cost of a layer's heads is cached."""
    base_cost = cost(plan_of([]))

    @cache
    def added_cost(heads: tuple[tuple[int, int], ...]) -> float:
        return cost(plan_of([*heads])) - base_cost

    def total(heads: Unit) -> float:
        layers: dict[int, Unit] = {}
        for layer, head in sorted(heads):
            layers.setdefault(layer, []).append((layer, head))
        return base_cost + sum(added_cost(tuple(layer_heads)) for layer_heads in layers.values())

    return total


def _best(
    units: Sequence[Unit], worth: Sequence[float], groups: Sequence[Sequence[int]], total: Total, limit: float
) -> list[int] | None:
    """The units of `best_units`, from the number of units that each group keeps (`counts`)."""
    limit += _ROUNDING * abs(limit)
    best_first = [sorted(group, key=lambda unit: worth[unit], reverse=True) for group in groups]

    def units_of(counts: list[int]) -> list[int]:
        return [unit for group, count in zip(best_first, counts, strict=True) for unit in group[:count]]

    def value(counts: list[int]) -> float:
        return sum(worth[unit] for unit in units_of(counts))

    def cost(counts: list[int]) -> float:
        return total(heads_of(units, units_of(counts)))

    # The knapsack's solution, which adds up the items' costs.
    counts = solve(items_of(best_first, units, worth, total), limit - total([]))
    if counts is None:
        return None

    # Items may cost more together than one by one: drop what loses the least value per cost.
    while (current_cost := cost(counts)) > limit:
        cheaper = [neighbour for neighbour in _neighbours(counts, best_first) if cost(neighbour) < current_cost]
        if not cheaper:
            return None
        losses = [(value(counts) - value(neighbour)) / (current_cost - cost(neighbour)) for neighbour in cheaper]
        counts = cheaper[losses.index(min(losses))]

    # They may also cost less, and the knapsack rounds up: fill the remaining space.
    while better := [neighbour for neighbour in _neighbours(counts, best_first) if value(neighbour) > value(counts)]:
        fitting = [neighbour for neighbour in better if cost(neighbour) <= limit]
        if not fitting:
            break
        counts = max(fitting, key=lambda neighbour: (value(neighbour), -cost(neighbour)))
    return sorted(units_of(counts))


def _neighbours(counts: list[int], groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """All counts that differ in one group."""
    for index, group in enumerate(groups):
        for count in range(len(group) + 1):
            if count != counts[index]:
                yield [*counts[:index], count, *counts[index + 1 :]]


def _positive(values: Sequence[float]) -> list[float]:
    """The values, with those not above zero replaced by tiny positive ones in the same order."""
    tiny = _TINY_WORTH * min((value for value in values if value > 0), default=1.0)
    depth = -min(values, default=0.0) or 1.0
    return [value if value > 0 else tiny * (2 + value / depth) for value in values]
