"""One student that follows any plan for the time being: candidates are scored without making a model for each.

A plan says for every layer which heads have which mixer. The block of a layer, with these mixers, is made once, shares
everything with the aligned student and the teacher, and stands in while a plan is tried. So a candidate is exactly the
student that its plan gives, and many plans cost the memory of a few.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from subquad.model.base import BaseStudent
from subquad.plan import Plan, every_head
from subquad.select.prefix import recorded, resumed, standing_in
from subquad.select.units import Unit

T = TypeVar("T")
Layer: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]  # a layer of a plan, to be looked up


class Supernet:
    """The plans over an all-linear, aligned student's mixers, and over those of others like it.

    `alternatives`: all-linear students with other mixers, by the names of these.
    """

    def __init__(
        self, linear: BaseStudent, teacher: PreTrainedModel, alternatives: Mapping[str, BaseStudent] | None = None
    ) -> None:
        self.student, self.teacher, self.linear = linear, teacher, linear.plan
        self.alternatives = dict(alternatives or {})
        self._blocks: dict[tuple[int, Layer], nn.Module] = {}

    def keeping(self, heads: Unit) -> Plan:
        """The plan that keeps attention in these heads."""
        return self.linear.keeping(heads)

    def having(self, mixer: str, layers: Sequence[int]) -> Plan:
        """The plan without attention in which these layers have an alternative mixer."""
        options = self.alternatives[mixer].plan.mixers[mixer]
        return self.linear.with_layers(mixer, options, layers)

    @property
    def everything(self) -> Unit:
        return every_head(self.linear.shapes)

    @contextmanager
    def following(self, plan: Plan) -> Iterator[BaseStudent]:
        """Within, the student has this plan."""
        self.prepare([plan])
        before = self.student.plan
        with ExitStack() as within:
            for layer, block in enumerate(self.student.blocks()):
                if plan.layers[layer] != before.layers[layer]:
                    other = self._blocks[layer, _key(plan, layer)]
                    within.enter_context(standing_in(block, other.__call__))
            self.student.plan = plan
            try:
                yield self.student
            finally:
                self.student.plan = before

    @torch.no_grad()
    def shared(self, plans: Sequence[Plan], measure: Callable[[BaseStudent], T]) -> list[T]:
        """What is measured of each plan, in evaluation mode, by one pass over always the same tokens.

        What lies below a plan's first difference from the first of them is computed once.
        """
        base, *others = plans
        with self.following(base) as student, recorded(student.blocks()) as outputs:
            found = [measure(student)]
        for plan in others:
            with self.following(plan) as student, resumed(student.blocks(), first_difference(plan, base), outputs):
                found.append(measure(student))
        return found

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Makes the blocks that these plans need: as few students as have them all."""
        missing: list[dict[Layer, Plan]] = [{} for _ in self.linear.layers]
        for plan in plans:
            for layer, mixers in enumerate(plan.layers):
                key = _key(plan, layer)
                if mixers != self.linear.layers[layer] and (layer, key) not in self._blocks:
                    missing[layer].setdefault(key, plan)
        while any(missing):
            taken = {layer: of_layer.popitem() for layer, of_layer in enumerate(missing) if of_layer}
            layers = [taken[i][1].layers[i] if i in taken else mine for i, mine in enumerate(self.linear.layers)]
            students = [self.student, *self.alternatives.values()]
            options = {name: given for one in students for name, given in one.plan.mixers.items()}
            plan = Plan(shapes=self.linear.shapes, mixers=options, layers=layers)
            student = type(self.student).from_teacher(self.teacher, plan, mixers_from=students)
            blocks = student.blocks()
            for layer, (key, _) in taken.items():
                self._blocks[layer, key] = blocks[layer]


def first_difference(plan: Plan, other: Plan) -> int:
    """The first layer in which two plans differ; the number of layers where they are the same."""
    pairs = zip(plan.layers, other.layers, strict=True)
    return next((layer for layer, (a, b) in enumerate(pairs) if a != b), plan.num_layers)


def passes(plans: Sequence[Plan]) -> float:
    """How many whole passes `Supernet.shared` takes."""
    layers = plans[0].num_layers
    return 1 + sum(1 - first_difference(plan, plans[0]) / layers for plan in plans[1:])


def _key(plan: Plan, layer: int) -> Layer:
    return tuple(sorted((name, tuple(sorted(heads))) for name, heads in plan.layers[layer].items()))


def without(heads: Unit, unit: Sequence[tuple[int, int]]) -> Unit:
    """These heads but those of a unit."""
    left = {*unit}
    return [head for head in heads if head not in left]
