"""The ranking of units by a selector, and the plan that it gives under a budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from subquad.model.base import BaseStudent
from subquad.plan import ATTENTION, AttentionShape, Join, Plan, dtype_name
from subquad.select.budget import Budget, Cost
from subquad.select.cost import best_units, front
from subquad.select.knapsack import solve
from subquad.select.units import Unit, UnitSpec, by_layer, heads_of, kind_of, layers_in, units_of
from subquad.select.work import bootstrap

FRONT_CONTEXT = 32768  # context length of the Pareto front, if the budget has none


@dataclass
class Ranking:
    """The units to keep for a given number of them, and the measurements behind it.

    `worth`: additive worth of every unit, to be weighed against its cost under a budget in bytes or time; None: the
    selector knows only an order. `alternatives`: the same for other mixers in place of attention, by name. `named`: the
    units of plans that the selector has a name for. `report`: measurements for scores.json.
    """

    units: list[Unit]
    top: Callable[[int], list[int]]  # indices of the units to keep, for a number of them
    unit: UnitSpec = "layer"
    worth: Sequence[float] | None = None
    alternatives: dict[str, Sequence[float]] = field(default_factory=dict)
    named: dict[str, list[int]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def in_order(
        cls,
        units: list[Unit],
        scores: Sequence[Any],
        unit: UnitSpec,
        report: dict[str, Any],
        worth: Sequence[float] | None = None,
    ) -> "Ranking":
        """Keeps the units with the highest scores: numbers, or tuples whose later entries break ties."""
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        return cls(units, lambda count: sorted(order[:count]), unit, worth, report=report | {"order": order})

    @classmethod
    def by_rows(cls, units: list[Unit], gains_NU: Tensor, unit: UnitSpec, report: dict[str, Any]) -> "Ranking":
        """Keeps the units with the highest mean gain over rows of text; adds bootstrap intervals to the report."""
        scores = gains_NU.mean(0).tolist()
        low, high = (bound_U.tolist() for bound_U in bootstrap(gains_NU))
        columns = {"scores": scores, "low": low, "high": high}
        shaped = {key: by_layer(values, units) for key, values in columns.items()}
        return cls.in_order(units, scores, unit, shaped | {"rows": len(gains_NU)} | report, scores)

    @classmethod
    def of_scores(cls, scores: Mapping[str, Any], plan: Plan) -> "Ranking":
        """The ranking in a scores.json, which serves another budget without measuring again.

        `plan`: the all-linear plan of that budget. Units to which it leaves attention anyway are left out.
        """
        # The units that were measured, and which of them are still to choose from
        unit: UnitSpec = scores["units"] if scores["unit"] == "group" else scores["unit"]
        measured_units = _measured_units(scores, plan.shapes)
        attending = {*plan.attention_heads}
        indices = [index for index, heads in enumerate(measured_units) if not attending.issuperset(heads)]
        place = {index: place for place, index in enumerate(indices)}

        def chosen(measurements: Sequence[Any] | None) -> list[Any] | None:
            return None if measurements is None else [measurements[index] for index in indices]

        # Their order, their worth, and the named plans
        units = [[head for head in measured_units[index] if head not in attending] for index in indices]
        order = [place[index] for index in scores["order"] if index in place]
        alternatives: dict[str, Sequence[float]] = {
            name: chosen(worth) or [] for name, worth in scores["alternatives"].items()
        }
        named, path = {}, scores.get("path")
        if path is not None:
            for name in ("best", "opt"):
                replaced = {place.get(step["unit"]) for step in path["steps"][: path[name]]}
                named[name] = sorted({*range(len(units))} - replaced)
        return cls(units, lambda count: sorted(order[:count]), unit, chosen(scores["worth"]), alternatives, named)

    def heads(self, indices: Sequence[int]) -> Unit:
        """The heads of these units."""
        return heads_of(self.units, indices)


def _measured_units(scores: Mapping[str, Any], shapes: Sequence[AttentionShape]) -> list[Unit]:
    """The units in a scores.json: of the layers that it lists, or of all that it does not state to be kept."""
    if scores["units"] is not None:
        return [[(layer, head) for layer in group for head in range(shapes[layer].heads)] for group in scores["units"]]
    kept_layers = scores.get("kept_layers", [])
    return [unit for unit in units_of(shapes, scores["unit"]) if unit[0][0] not in kept_layers]


def choose_plan(
    student: BaseStudent,
    budget: Budget,
    ranking: Ranking,
    join: Join = "split",
    decode_cost: Callable[[int], Cost] | None = None,
    alternatives: Mapping[str, BaseStudent] | None = None,
) -> tuple[Plan, list[int]]:
    """The plan that keeps as much attention as the budget allows, and the indices of the units it keeps.

    A budget in bytes or time is a knapsack over the units' worth and cost. Where a selector has only an order, the
    first units are kept, as many as fit. `decode_cost(context)`: measures the duration of a plan's decoding step.
    `alternatives`: the students of the ranking's alternatives. Raises UserError for a budget that no plan meets, or
    that does not suit the selector.
    """
    if ranking.alternatives:
        return _with_alternatives(student, budget, ranking, alternatives or {})
    indices = _units_to_keep(student, budget, ranking, join, decode_cost)
    return student.plan.keeping(ranking.heads(indices), join), indices


def _with_alternatives(
    student: BaseStudent, budget: Budget, ranking: Ranking, alternatives: Mapping[str, BaseStudent]
) -> tuple[Plan, list[int]]:
    """For every unit of whole layers, attention or the mixer that is worth the most within the budget."""
    units, worth = ranking.units, {ATTENTION: ranking.worth or [], **ranking.alternatives}
    names = [*worth]

    def plan_with(mixer_of: Mapping[int, str]) -> Plan:
        plan = student.plan.keeping(ranking.heads([unit for unit, name in mixer_of.items() if name == ATTENTION]))
        for name, alternative in alternatives.items():
            layers = [layer for unit, mixer in mixer_of.items() if mixer == name for layer in layers_in(units[unit])]
            plan = plan.with_layers(name, alternative.plan.mixers[name], layers) if layers else plan
        return plan

    # A number of units: attention in the first ones, in the others the best alternative if it gains anything.
    if budget.context is None:
        indices = ranking.top(budget.count_of(len(units), kind_of(ranking.unit)))
        best = {unit: max(alternatives, key=lambda name: worth[name][unit]) for unit in range(len(units))}
        gaining = {unit: name for unit, name in best.items() if worth[name][unit] > 0}
        return plan_with(gaining | dict.fromkeys(indices, ATTENTION)), indices

    # Bytes: a knapsack with one item per unit and one option per mixer.
    cost, limit = budget.cost_and_limit(student.plan.shapes, dtype_name(student))
    min_cost = cost(plan_with({}))
    items = [
        [(0.0, 0.0), *((worth[name][unit], cost(plan_with({unit: name})) - min_cost) for name in names)]
        for unit in range(len(units))
    ]
    options = solve(items, limit - min_cost)
    if options is None:
        raise budget.impossible(min_cost, limit, kind_of(ranking.unit))
    mixer_of = {unit: names[option - 1] for unit, option in enumerate(options) if option}
    return plan_with(mixer_of), [unit for unit, name in mixer_of.items() if name == ATTENTION]


def _units_to_keep(
    student: BaseStudent,
    budget: Budget,
    ranking: Ranking,
    join: Join,
    decode_cost: Callable[[int], Cost] | None,
) -> list[int]:
    plan_of, kind = partial(student.plan.keeping, join=join), kind_of(ranking.unit)
    if budget.word in ranking.named:
        return ranking.named[budget.word]
    if budget.context is None:
        return ranking.top(budget.count_of(len(ranking.units), kind))
    dtype = dtype_name(student)
    seconds = decode_cost(budget.context) if budget.speedup is not None and decode_cost is not None else None
    if ranking.worth is None:

        def plan_of_count(count: int) -> Plan:
            return plan_of(ranking.heads(ranking.top(count)))

        return ranking.top(budget.largest(len(ranking.units), plan_of_count, dtype, kind, seconds))
    cost, limit = budget.cost_and_limit(student.plan.shapes, dtype, seconds)
    indices = best_units(ranking.units, ranking.worth, student.plan.shapes, plan_of, cost, limit)
    if indices is None:
        raise budget.impossible(cost(plan_of([])), limit, kind)
    return indices


def pareto(student: BaseStudent, budget: Budget, ranking: Ranking, join: Join = "split") -> dict[str, Any]:
    """The Pareto front for scores.json: the share of the measured worth that plans keep, over their cache bytes."""
    if ranking.worth is None:
        return {}
    context = budget.context or FRONT_CONTEXT
    dtype = dtype_name(student)

    def cost(plan: Plan) -> float:
        return plan.cache_bytes(context, dtype=dtype)

    plan_of = partial(student.plan.keeping, join=join)
    points = front(ranking.units, ranking.worth, student.plan.shapes, plan_of, cost)
    return {"front": points, "front_context": context, "front_dtype": dtype}
