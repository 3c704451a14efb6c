"""What units cost, and the best of them within a limit: bytes of the cache, or seconds of a decoding step.

Costs of units do not add up. Query heads that share a key/value head have its keys and values stored once, however many
of them attend; layers with a sliding window hold less; and what a mixer's states take depends on which heads it has. So
units that use the same key/value heads are one item of a knapsack, which keeps none, its best, its two best, ... at
their real cost. What is left to interact (states shared by heads) is small, and is settled on the real cost of the
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

PlanOf: TypeAlias = Callable[[Unit], Plan]
Total: TypeAlias = Callable[[Unit], float]

_NEXT_TO_NOTHING = 1e-6  # of the least value above zero
_ROUNDING = 1e-12  # of a sum of seconds


def best_units(
    units: Sequence[Unit],
    values: Sequence[float],
    shapes: Sequence[AttentionShape],
    plan_of: PlanOf,
    cost: Cost,
    limit: float,
) -> list[int] | None:
    """Indices of the units, of the greatest value together, with which the plan costs no more than `limit`.

    `plan_of` gives the plan that keeps some heads; `cost` must be a sum over a plan's layers. Units whose value is not
    above zero only fill what the others leave. None where even a plan without attention costs more.
    """
    return _best(units, _worth(values), groups_of(units, shapes), by_layers(plan_of, cost), limit)


def front(
    units: Sequence[Unit],
    values: Sequence[float],
    shapes: Sequence[AttentionShape],
    plan_of: PlanOf,
    cost: Cost,
    points: int = 24,
) -> list[dict[str, Any]]:
    """The Pareto front of value over cost: the best units at `points` (at least 2) limits from no attention to all.

    Each point has the `cost` of its plan, its `value` (the share of all value above zero that it keeps) and its
    `units`, by index; both rise from point to point.
    """
    worth = [max(value, 0.0) for value in values]
    whole = sum(worth) or 1.0
    groups, total = groups_of(units, shapes), by_layers(plan_of, cost)
    least, most = total([]), total(heads_of(units, range(len(units))))
    limits = np.linspace(least, most, points)
    found = [kept for limit in limits.tolist() if (kept := _best(units, worth, groups, total, limit)) is not None]
    every: list[dict[str, Any]] = [
        {"cost": total(heads_of(units, kept)), "value": sum(worth[unit] for unit in kept) / whole, "units": kept}
        for kept in found
    ]
    rising: list[dict[str, Any]] = []
    for point in sorted(every, key=lambda point: (point["cost"], -point["value"])):
        if not rising or point["value"] > rising[-1]["value"]:
            rising.append(point)
    return rising


def groups_of(units: Sequence[Unit], shapes: Sequence[AttentionShape]) -> list[list[int]]:
    """The units that share keys and values, by index: heads of one key/value head; a layer and more, alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, unit in enumerate(units):
        layer, head = unit[0]  # a unit is one head, or has all heads of its layers
        shape = shapes[layer]
        groups.setdefault((layer, head // (shape.heads // shape.kv_heads)), []).append(index)
    return list(groups.values())


def items_of(
    groups: Sequence[Sequence[int]], units: Sequence[Unit], values: Sequence[float], total: Total
) -> list[list[Option]]:
    """An item of the knapsack for each group: its option k keeps the first k units, at what they add to `total`."""
    nothing = total([])
    return [
        [
            (sum(values[unit] for unit in group[:kept]), total(heads_of(units, group[:kept])) - nothing)
            for kept in range(len(group) + 1)
        ]
        for group in groups
    ]


def by_layers(plan_of: PlanOf, cost: Cost) -> Total:
    """The cost of the plan that keeps some heads, as a sum over layers: what they add to each is asked for once."""
    nothing = cost(plan_of([]))

    @cache
    def added(heads: tuple[tuple[int, int], ...]) -> float:
        return cost(plan_of([*heads])) - nothing

    def total(heads: Unit) -> float:
        layers: dict[int, Unit] = {}
        for layer, head in sorted(heads):
            layers.setdefault(layer, []).append((layer, head))
        return nothing + sum(added(tuple(of_layer)) for of_layer in layers.values())

    return total


def _best(
    units: Sequence[Unit], worth: Sequence[float], groups: Sequence[Sequence[int]], total: Total, limit: float
) -> list[int] | None:
    limit += _ROUNDING * abs(limit)
    best_first = [sorted(group, key=worth.__getitem__, reverse=True) for group in groups]
    counts = solve(items_of(best_first, units, worth, total), limit - total([]))
    if counts is None:
        return None

    def kept(counts: list[int]) -> list[int]:
        return [unit for group, count in zip(best_first, counts, strict=True) for unit in group[:count]]

    def value(counts: list[int]) -> float:
        return sum(worth[unit] for unit in kept(counts))

    def cost(counts: list[int]) -> float:
        return total(heads_of(units, kept(counts)))

    # Items may cost more together than one by one: what is worth the least of its cost goes.
    while (now := cost(counts)) > limit:
        cheaper = [other for other in _one_changed(counts, best_first) if cost(other) < now]
        if not cheaper:
            return None
        lost = [(value(counts) - value(other)) / (now - cost(other)) for other in cheaper]
        counts = cheaper[lost.index(min(lost))]

    # They may also cost less, and what the knapsack's rounding left is there, too.
    while better := [other for other in _one_changed(counts, best_first) if value(other) > value(counts)]:
        fitting = [other for other in better if cost(other) <= limit]
        if not fitting:
            break
        counts = max(fitting, key=lambda other: (value(other), -cost(other)))
    return sorted(kept(counts))


def _one_changed(counts: list[int], groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The counts with that of one group replaced by any other."""
    for index, group in enumerate(groups):
        for count in range(len(group) + 1):
            if count != counts[index]:
                yield [*counts[:index], count, *counts[index + 1 :]]


def _worth(values: Sequence[float]) -> list[float]:
    """The values, those not above zero replaced by next to nothing in the same order."""
    little = _NEXT_TO_NOTHING * min((value for value in values if value > 0), default=1.0)
    depth = -min(values, default=0.0) or 1.0
    return [value if value > 0 else little * (2 + value / depth) for value in values]
