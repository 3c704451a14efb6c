"""The answer of a selector: which units keep attention, for any number or cost of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any

from torch import Tensor

from subquad.model.base import BaseStudent
from subquad.plan import ATTENTION, AttentionShape, Join, Plan, dtype_name
from subquad.select.budget import Budget, Cost
from subquad.select.cost import best_units, front
from subquad.select.knapsack import solve
from subquad.select.units import Unit, Wish, by_layer, heads_of, kind_of, layers_in, units_of
from subquad.select.work import bootstrap

FRONT_CONTEXT = 32768  # of the Pareto front, where the budget names no context


@dataclass
class Ranking:
    """Which units to keep for a given number of them, and what is known about why (for scores.json).

    `worth`: of every unit, in a measure that adds up, so that a budget in bytes or time can weigh it against the cost.
    `alternatives`: the same of other mixers in their place, by name. `named`: the units of the plans that the selector
    has a name for.
    """

    units: list[Unit]
    kept: Callable[[int], list[int]]  # indices of units
    unit: Wish = "layer"
    worth: Sequence[float] | None = None
    alternatives: dict[str, Sequence[float]] = field(default_factory=dict)
    named: dict[str, list[int]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def in_order(
        cls,
        units: list[Unit],
        scores: Sequence[Any],
        unit: Wish,
        report: dict[str, Any],
        worth: Sequence[float] | None = None,
    ) -> "Ranking":
        """Keeps the units with the highest scores: numbers, or tuples of them, of which later ones part equals."""
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        return cls(units, lambda count: sorted(order[:count]), unit, worth, report=report | {"order": order})

    @classmethod
    def by_rows(cls, units: list[Unit], gains_NU: Tensor, unit: Wish, more: dict[str, Any]) -> "Ranking":
        """Keeps the units with the highest mean gain over rows of text; reports bootstrap intervals, and `more`."""
        scores = gains_NU.mean(0).tolist()
        low, high = (bound.tolist() for bound in bootstrap(gains_NU))
        report = {"scores": scores, "low": low, "high": high}
        shaped = {key: by_layer(values, units) for key, values in report.items()}
        return cls.in_order(units, scores, unit, shaped | {"rows": len(gains_NU)} | more, scores)

    @classmethod
    def of_scores(cls, scores: Mapping[str, Any], shapes: Sequence[AttentionShape]) -> "Ranking":
        """What scores.json says, so that another budget asks for no measuring."""
        unit: Wish = scores["units"] if scores["unit"] == "group" else scores["unit"]
        order, path = scores["order"], scores.get("path")
        units = units_of(shapes, unit)
        named = {}
        if path is not None:
            gone = [step["unit"] for step in path["steps"]]
            named = {name: sorted({*range(len(units))} - {*gone[: path[name]]}) for name in ("best", "opt")}
        return cls(units, lambda count: sorted(order[:count]), unit, scores["worth"], scores["alternatives"], named)

    def heads(self, kept: Sequence[int]) -> Unit:
        """The heads of these units."""
        return heads_of(self.units, kept)


def choose_plan(
    student: BaseStudent,
    budget: Budget,
    choice: Ranking,
    join: Join = "split",
    decode_cost: Callable[[int], Cost] | None = None,
    others: Mapping[str, BaseStudent] | None = None,
) -> tuple[Plan, list[int]]:
    """The plan that keeps as much attention as the budget allows, and the indices of the units it keeps.

    Bytes and time are a knapsack over what the units are worth and what they cost; where a selector has only an order,
    its first units are kept, as many as fit. `decode_cost(context)`: measures what a decoding step of a plan takes.
    `others`: the students of the choice's alternatives. Raises UserError for a budget that no plan meets, or that the
    selector has no answer to.
    """
    if choice.alternatives:
        return _with_alternatives(student, budget, choice, others or {})
    kept = _kept(student, budget, choice, join, decode_cost)
    return student.plan.keeping(choice.heads(kept), join), kept


def _with_alternatives(
    student: BaseStudent, budget: Budget, choice: Ranking, others: Mapping[str, BaseStudent]
) -> tuple[Plan, list[int]]:
    """Of every unit, whole layers, attention or the mixer that is worth the most within the budget."""
    units, worth = choice.units, {ATTENTION: choice.worth or [], **choice.alternatives}
    names = [*worth]

    def plan_with(chosen: Mapping[int, str]) -> Plan:
        plan = student.plan.keeping(choice.heads([unit for unit, name in chosen.items() if name == ATTENTION]))
        for name, other in others.items():
            layers = [layer for unit, mine in chosen.items() if mine == name for layer in layers_in(units[unit])]
            plan = plan.with_layers(name, other.plan.mixers[name], layers) if layers else plan
        return plan

    if budget.context is None:
        kept = choice.kept(budget.of(len(units), kind_of(choice.unit)))
        best = {unit: max(others, key=lambda name: worth[name][unit]) for unit in range(len(units))}
        chosen = {unit: name for unit, name in best.items() if worth[name][unit] > 0} | dict.fromkeys(kept, ATTENTION)
        return plan_with(chosen), kept
    cost, limit = budget.priced(student.plan.shapes, dtype_name(student))
    least = cost(plan_with({}))
    items = [
        [(0.0, 0.0), *((worth[name][unit], cost(plan_with({unit: name})) - least) for name in names)]
        for unit in range(len(units))
    ]
    options = solve(items, limit - least)
    if options is None:
        raise budget.impossible(least, limit, kind_of(choice.unit))
    chosen = {unit: names[option - 1] for unit, option in enumerate(options) if option}
    return plan_with(chosen), [unit for unit, name in chosen.items() if name == ATTENTION]


def _kept(
    student: BaseStudent,
    budget: Budget,
    choice: Ranking,
    join: Join,
    decode_cost: Callable[[int], Cost] | None,
) -> list[int]:
    plan_of, kind = partial(student.plan.keeping, join=join), kind_of(choice.unit)
    if budget.word in choice.named:
        return choice.named[budget.word]
    if budget.context is None:
        return choice.kept(budget.of(len(choice.units), kind))
    dtype = dtype_name(student)
    seconds = decode_cost(budget.context) if budget.speedup is not None and decode_cost is not None else None
    if choice.worth is None:

        def first(count: int) -> Plan:
            return plan_of(choice.heads(choice.kept(count)))

        return choice.kept(budget.largest(len(choice.units), first, dtype, kind, seconds))
    cost, limit = budget.priced(student.plan.shapes, dtype, seconds)
    kept = best_units(choice.units, choice.worth, student.plan.shapes, plan_of, cost, limit)
    if kept is None:
        raise budget.impossible(cost(plan_of([])), limit, kind)
    return kept


def pareto(student: BaseStudent, budget: Budget, choice: Ranking, join: Join = "split") -> dict[str, Any]:
    """For scores.json: what share of the measured worth plans can keep, over the bytes of their cache."""
    if choice.worth is None:
        return {}
    context = budget.context or FRONT_CONTEXT
    dtype = dtype_name(student)
    cost = methodcaller("cache_bytes", context, dtype=dtype)
    points = front(choice.units, choice.worth, student.plan.shapes, partial(student.plan.keeping, join=join), cost)
    return {"front": points, "front_context": context, "front_dtype": dtype}
