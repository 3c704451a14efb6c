"""Selectors: measure units, and propose a plan under a budget. To add one: a file here, a row in SELECTORS.

A selector gives the layers in the order in which they should keep attention, for a number of layers to keep; the budget
says how many. So one set of scores serves any budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from subquad.errors import UserError, nearest
from subquad.plan import ATTENTION, Plan
from subquad.select.budget import Budget
from subquad.select.kl import KLScores, kl_scores
from subquad.select.uniform import uniform_layers
from subquad.student import Student


@dataclass
class Choice:
    """Which layers to keep for a given number of them, and what is known about why (for scores.json)."""

    layers_for: Callable[[int], list[int]]
    report: dict[str, Any] = field(default_factory=dict)


def by_uniform(student: Student, **_: Any) -> Choice:
    """Evenly spaced layers; measures nothing."""
    layers = student.plan.num_layers
    return Choice(lambda count: uniform_layers(layers, count))


def by_fixed(student: Student, *, layers: Sequence[int], **_: Any) -> Choice:
    """The layers of a list, most important first: the budget says how many of them."""
    order, count = list(layers), student.plan.num_layers
    strange = [layer for layer in order if layer not in range(count)]
    if strange or len({*order}) < len(order):
        raise UserError(f"selector.options.layers should be different layers of 0 to {count - 1}, not {order}")

    def first(count: int) -> list[int]:
        if count > len(order):
            raise UserError(f"the budget keeps {count} layers, and selector.options.layers names {len(order)}")
        return sorted(order[:count])

    return Choice(first, {"order": order})


def by_kl(
    student: Student,
    *,
    teacher: PreTrainedModel,
    tokens_BT: Tensor,
    progress: Callable[[int, int], None] | None,
    stride: int = 4,
) -> Choice:
    """Layers whose restored attention brings the all-linear student nearest to the teacher (select/kl.py)."""
    found = kl_scores(student, teacher, tokens_BT, stride=stride, progress=progress)
    scores = found.scores
    order = sorted(range(len(scores)), key=lambda layer: -scores[layer])
    report = {
        "scores": scores,
        "order": order,
        "kl_all_linear": found.all_linear,
        "kl_restored": found.restored,
        "tokens": found.tokens,
        "seconds": found.seconds,
    }
    return Choice(lambda count: sorted(order[:count]), report)


SELECTORS: dict[str, Callable[..., Choice]] = {"uniform": by_uniform, "fixed": by_fixed, "kl": by_kl}
MEASURING = frozenset({"kl"})  # selectors that need an aligned student


def check_selector(by: str, options: dict[str, Any]) -> None:
    """Raises UserError, with the nearest valid name, for an unknown selector or an option that it does not take."""
    if by not in SELECTORS:
        raise UserError(f"unknown selector '{by}': {nearest(by, SELECTORS)}")
    taken = {"kl": ["stride"], "fixed": ["layers"]}.get(by, [])
    for key in options:
        if key not in taken:
            raise UserError(f"selector '{by}' has no option '{key}' (valid: {', '.join(taken) or 'none'})")
    layers = options.get("layers")
    if by == "fixed" and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise UserError(
            "selector 'fixed' needs the layers to keep, most important first: selector.options.layers=[4,10]"
        )


def choose_plan(
    student: Student,
    budget: Budget,
    choice: Choice,
) -> tuple[Plan, list[int]]:
    """The layer-level plan that keeps as much attention as the budget allows, and its attention layers."""
    shapes = student.plan.shapes
    mixer = next(name for name in student.plan.mixers if name != ATTENTION)

    def plan_of(count: int) -> Plan:
        return Plan.by_layer(shapes, choice.layers_for(count), mixer, student.plan.mixers[mixer])

    count = budget.largest(len(shapes), plan_of, str(student.dtype).removeprefix("torch."))
    return plan_of(count), choice.layers_for(count)


__all__ = ["SELECTORS", "Budget", "Choice", "KLScores", "check_selector", "choose_plan", "kl_scores", "uniform_layers"]
