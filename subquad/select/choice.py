"""What a selector is asked, and what it answers: which units keep attention, for any number or cost of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

from torch import Tensor

from subquad.data.text import Corpus
from subquad.plan import ATTENTION, Join, Plan
from subquad.select.board import Board
from subquad.select.budget import Budget, Cost
from subquad.select.cost import best_units, front
from subquad.select.units import Unit, Wish, kind_of, units_of
from subquad.select.work import Work
from subquad.student import Student
from subquad.teacher import Teacher

FRONT_CONTEXT = 32768  # of the Pareto front, where the budget names no context

Train = Callable[[Student, int, str], None]  # (student, tokens, name): trains it as the recipe would, on logits


@dataclass
class Question:
    """What a selector may look at. `text_BT`: rows that neither training nor the final measurement sees."""

    student: Student  # all-linear; aligned where the selector needs it
    source: Teacher
    text_BT: Tensor
    budget: Budget
    unit: Wish = "layer"
    corpus: Corpus | None = None  # the text to train on
    train: Train | None = None
    seed: int = 0
    work: Work = field(default_factory=Work)

    @property
    def units(self) -> list[Unit]:
        return units_of(self.student.plan.shapes, self.unit)

    @property
    def board(self) -> Board:
        return Board(self.student, self.source.model)

    @property
    def count(self) -> int:
        """How many units will be kept; where the budget leaves that open, half of them."""
        units = len(self.units)
        counted = self.budget.context is None and self.budget.word is None
        return self.budget.of(units, kind_of(self.unit)) if counted else units // 2

    @property
    def least(self) -> int:
        """How many units will be kept at least, as far as the budget says."""
        return 0 if self.budget.context is not None else self.count


@dataclass
class Choice:
    """Which units to keep for a given number of them, and what is known about why (for scores.json).

    `worth`: of every unit, in a measure that adds up, so that a budget in bytes or time can weigh it against the cost.
    `named`: the units of the plans that the selector has a name for.
    """

    units: list[Unit]
    kept: Callable[[int], list[int]]  # indices of units
    unit: Wish = "layer"
    worth: Sequence[float] | None = None
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
    ) -> "Choice":
        """Keeps the units with the highest scores: numbers, or tuples of them, of which later ones part equals."""
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        return cls(units, lambda count: sorted(order[:count]), unit, worth, report=report | {"order": order})

    def heads(self, kept: Sequence[int]) -> Unit:
        """The heads of these units."""
        return [head for index in kept for head in self.units[index]]


def choose_plan(
    student: Student,
    budget: Budget,
    choice: Choice,
    join: Join = "split",
    decode_cost: Callable[[int], Cost] | None = None,
) -> tuple[Plan, list[int]]:
    """The plan that keeps as much attention as the budget allows, and the indices of the units it keeps.

    Bytes and time are a knapsack over what the units are worth and what they cost; where a selector has only an order,
    its first units are kept, as many as fit. `decode_cost(context)`: measures what a decoding step of a plan takes.
    Raises UserError for a budget that no plan meets, or that the selector has no answer to.
    """
    kept = _kept(student, budget, choice, join, decode_cost)
    return _plan_of(student, join)(choice.heads(kept)), kept


def _kept(
    student: Student,
    budget: Budget,
    choice: Choice,
    join: Join,
    decode_cost: Callable[[int], Cost] | None,
) -> list[int]:
    plan_of, kind = _plan_of(student, join), kind_of(choice.unit)
    if budget.word in choice.named:
        return choice.named[budget.word]
    if budget.context is None:
        return choice.kept(budget.of(len(choice.units), kind))
    dtype = str(student.dtype).removeprefix("torch.")
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


def pareto(student: Student, budget: Budget, choice: Choice, join: Join = "split") -> dict[str, Any]:
    """For scores.json: what share of the measured worth plans can keep, over the bytes of their cache."""
    if choice.worth is None:
        return {}
    context = budget.context or FRONT_CONTEXT
    dtype = str(student.dtype).removeprefix("torch.")
    cost = methodcaller("cache_bytes", context, dtype=dtype)
    points = front(choice.units, choice.worth, student.plan.shapes, _plan_of(student, join), cost)
    return {"front": points, "front_context": context}


def _plan_of(student: Student, join: Join) -> Callable[[Unit], Plan]:
    """The plan that keeps some heads, over the mixer of an all-linear student."""
    mixer = next(name for name in student.plan.mixers if name != ATTENTION)
    return lambda heads: Plan.by_head(student.plan.shapes, heads, mixer, student.plan.mixers[mixer], join)
