"""Selectors: measure units, and propose a plan under a budget. To add one: a file here, a row in SELECTORS.

A unit is a set of heads that keep attention together or not at all: a layer, or one head. A selector says which of its
units keep attention for any number of them; the budget says how many. So one set of scores serves any budget.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from subquad.errors import UserError, nearest
from subquad.plan import ATTENTION, AttentionShape, Join, Plan
from subquad.select.budget import Budget
from subquad.select.kl import KLScores, kl_scores
from subquad.select.retrieval_heads import HeadScores, retrieval_heads
from subquad.select.uniform import uniform_layers
from subquad.student import Student
from subquad.teacher import Teacher

Unit = list[tuple[int, int]]  # heads, as (layer, head)


@dataclass
class Question:
    """What a selector may look at. `text_BT`: rows that neither training nor the final measurement sees."""

    student: Student  # all-linear; aligned where the selector is one of MEASURING
    source: Teacher
    text_BT: Tensor
    budget: Budget | None = None
    progress: Callable[[int, int], None] | None = None  # called with (done, in all)
    say: Callable[[str], None] = print


@dataclass
class Choice:
    """Which units to keep for a given number of them, and what is known about why (for scores.json)."""

    units: list[Unit]
    kept: Callable[[int], list[int]]  # indices of units
    unit: str = "layer"
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def in_order(cls, units: list[Unit], scores: Sequence[Any], unit: str, report: dict[str, Any]) -> "Choice":
        """Keeps the units with the highest scores: numbers, or tuples of them, of which later ones part equals."""
        order = sorted(range(len(scores)), key=lambda index: scores[index], reverse=True)
        return cls(units, lambda count: sorted(order[:count]), unit, report | {"order": order})

    def heads(self, count: int) -> Unit:
        """The heads of the `count` units that keep attention."""
        return [head for index in self.kept(count) for head in self.units[index]]


def layer_units(shapes: Sequence[AttentionShape]) -> list[Unit]:
    """Every layer, as a unit."""
    return [[(layer, head) for head in range(shape.heads)] for layer, shape in enumerate(shapes)]


def by_uniform(question: Question) -> Choice:
    """Evenly spaced layers; measures nothing."""
    units = layer_units(question.student.plan.shapes)
    return Choice(units, lambda count: uniform_layers(len(units), count))


def by_fixed(question: Question, *, layers: Sequence[int]) -> Choice:
    """The layers of a list, most important first: the budget says how many of them."""
    units = layer_units(question.student.plan.shapes)
    order = list(layers)
    strange = [layer for layer in order if layer not in range(len(units))]
    if strange or len({*order}) < len(order):
        raise UserError(f"selector.options.layers should be different layers of 0 to {len(units) - 1}, not {order}")

    def first(count: int) -> list[int]:
        if count > len(order):
            raise UserError(f"the budget keeps {count} layers, and selector.options.layers names {len(order)}")
        return sorted(order[:count])

    return Choice(units, first, report={"order": order})


def by_kl(question: Question, *, stride: int = 4) -> Choice:
    """Layers whose restored attention brings the all-linear student nearest to the teacher (select/kl.py)."""
    student = question.student
    found = kl_scores(student, question.source.model, question.text_BT, stride=stride, progress=question.progress)
    report = {
        "scores": found.scores,
        "kl_all_linear": found.all_linear,
        "kl_restored": found.restored,
        "tokens": found.tokens,
        "seconds": found.seconds,
    }
    return Choice.in_order(layer_units(student.plan.shapes), found.scores, "layer", report)


def by_retrieval_heads(question: Question, **options: Any) -> Choice:
    """Heads without which the teacher cannot look things up (select/retrieval_heads.py)."""
    units = [[head] for unit in layer_units(question.student.plan.shapes) for head in unit]
    if question.budget is not None and question.budget.size is None:
        options.setdefault("top", question.budget.of(len(units), "head"))
    found = retrieval_heads(
        question.source.model,
        question.source.tokenizer,
        question.text_BT,
        progress=question.progress,
        say=question.say,
        **options,
    )
    by_layer = zip(found.scores, found.logprob_drop, strict=True)
    scores = [pair for drops, between in by_layer for pair in zip(drops, between, strict=True)]
    return Choice.in_order(units, scores, "head", found.as_dict())


SELECTORS: dict[str, Callable[..., Choice]] = {
    "uniform": by_uniform,
    "fixed": by_fixed,
    "kl": by_kl,
    "retrieval-heads": by_retrieval_heads,
}
OPTIONS: dict[str, Callable[..., Any]] = {**SELECTORS, "retrieval-heads": retrieval_heads}  # where options are named
MEASURING = frozenset({"kl"})  # selectors that need an aligned student
READING = frozenset({"kl", "retrieval-heads"})  # selectors that need text


def check_selector(by: str, options: dict[str, Any]) -> None:
    """Raises UserError, with the nearest valid name, for an unknown selector or an option that it does not take."""
    if by not in SELECTORS:
        raise UserError(f"unknown selector '{by}': {nearest(by, SELECTORS)}")
    parameters = inspect.signature(OPTIONS[by]).parameters.values()
    taken = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in ("progress", "say")]
    for key in options:
        if key not in taken:
            raise UserError(f"selector '{by}' has no option '{key}' (valid: {', '.join(taken) or 'none'})")
    layers = options.get("layers")
    if by == "fixed" and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise UserError(
            "selector 'fixed' needs the layers to keep, most important first: selector.options.layers=[4,10]"
        )


def choose_plan(student: Student, budget: Budget, choice: Choice, join: Join = "split") -> tuple[Plan, list[int]]:
    """The plan that keeps as much attention as the budget allows, and the indices of the units it keeps."""
    shapes = student.plan.shapes
    mixer = next(name for name in student.plan.mixers if name != ATTENTION)

    def plan_of(count: int) -> Plan:
        return Plan.by_head(shapes, choice.heads(count), mixer, student.plan.mixers[mixer], join)

    dtype = str(student.dtype).removeprefix("torch.")
    count = budget.largest(len(choice.units), plan_of, dtype, choice.unit)
    return plan_of(count), choice.kept(count)


__all__ = [
    "MEASURING",
    "READING",
    "SELECTORS",
    "Budget",
    "Choice",
    "HeadScores",
    "KLScores",
    "Question",
    "check_selector",
    "choose_plan",
    "kl_scores",
    "layer_units",
    "retrieval_heads",
    "uniform_layers",
]
