"""A supernet: one student that takes on any plan for a while, so that candidates need no models of their own.

A plan gives each head of each layer a mixer. The block of a layer with given mixers is made once, shares its weights
with the aligned student and the teacher, and replaces the student's block while a plan is active. So a candidate
computes exactly what a student with its plan computes, and many plans take the memory of a few.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from subquad.model.base import BaseStudent
from subquad.model.interface import record_outputs
from subquad.plan import Plan, every_head
from subquad.select.prefix import replace_forward, skip_below
from subquad.select.units import Unit

T = TypeVar("T")
LayerKey: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]  # (mixer, heads) of a layer, hashable


class Supernet:
    """All plans over the mixers of an all-linear, aligned student, and over those of `alternatives`.

    `alternatives`: all-linear students with other mixers, by the names of these mixers.
    """

    def __init__(
        self, linear: BaseStudent, teacher: PreTrainedModel, alternatives: Mapping[str, BaseStudent] | None = None
    ) -> None:
        self.student, self.teacher, self.linear_plan = linear, teacher, linear.plan
        self.alternatives = dict(alternatives or {})
        self._blocks: dict[tuple[int, LayerKey], nn.Module] = {}

    def plan_with(self, heads: Unit) -> Plan:
        """The plan with attention in these heads."""
        return self.linear_plan.keeping(heads)

    def plan_with_mixer(self, mixer: str, layers: Sequence[int]) -> Plan:
        """The plan without attention, with an alternative mixer in these layers."""
        options = self.alternatives[mixer].plan.mixers[mixer]
        return self.linear_plan.with_layers(mixer, options, layers)

    @property
    def all_heads(self) -> Unit:
        return every_head(self.linear_plan.shapes)

    @contextmanager
    def activate(self, plan: Plan) -> Iterator[BaseStudent]:
        """Within, the student has this plan."""
        self.prepare([plan])
        outer = self.student.plan
        with ExitStack() as stack:
            for layer, block in enumerate(self.student.blocks()):
                if plan.layers[layer] != outer.layers[layer]:
                    substitute = self._blocks[layer, _key(plan, layer)]
                    # Its bound __call__: a module assigned to an attribute would become a submodule.
                    stack.enter_context(replace_forward(block, substitute.__call__))
            self.student.plan = plan
            try:
                yield self.student
            finally:
                self.student.plan = outer

    @torch.no_grad()
    def measure_all(self, plans: Sequence[Plan], measure: Callable[[BaseStudent], T]) -> list[T]:
        """Measures each plan in evaluation mode; `measure` makes one forward pass, always over the same tokens.

        The layers in which a plan does not differ from the first one, up to the first difference, are computed once.
        """
        base, *candidates = plans
        with self.activate(base) as student, record_outputs(student.blocks()) as outputs:
            measurements = [measure(student)]
        for plan in candidates:
            with self.activate(plan) as student, skip_below(student, first_difference(plan, base), outputs):
                measurements.append(measure(student))
        return measurements

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Makes the blocks that these plans need, from as few students as possible."""
        missing: list[dict[LayerKey, Plan]] = [{} for _ in self.linear_plan.layers]
        for plan in plans:
            for layer, mixers in enumerate(plan.layers):
                key = _key(plan, layer)
                if mixers != self.linear_plan.layers[layer] and (layer, key) not in self._blocks:
                    missing[layer].setdefault(key, plan)

        # Each student provides one missing block of every layer.
        students = [self.student, *self.alternatives.values()]
        options = {name: options for student in students for name, options in student.plan.mixers.items()}
        while any(missing):
            sources = {layer: plan_of.popitem() for layer, plan_of in enumerate(missing) if plan_of}
            layers = [
                sources[layer][1].layers[layer] if layer in sources else linear_layer
                for layer, linear_layer in enumerate(self.linear_plan.layers)
            ]
            plan = Plan(shapes=self.linear_plan.shapes, mixers=options, layers=layers)
            blocks = type(self.student).from_teacher(self.teacher, plan, mixers_from=students).blocks()
            for layer, (key, _) in sources.items():
                self._blocks[layer, key] = blocks[layer]


def first_difference(plan: Plan, base: Plan) -> int:
    """The first layer in which two plans differ; the number of layers if they are equal."""
    pairs = zip(plan.layers, base.layers, strict=True)
    return next((layer for layer, (a, b) in enumerate(pairs) if a != b), plan.num_layers)


def passes(plans: Sequence[Plan]) -> float:
    """The number of whole forward passes that `Supernet.measure_all` takes."""
    layers = plans[0].num_layers
    return 1 + sum(1 - first_difference(plan, plans[0]) / layers for plan in plans[1:])


def without(heads: Unit, unit: Sequence[tuple[int, int]]) -> Unit:
    """These heads except those of a unit."""
    excluded = {*unit}
    return [head for head in heads if head not in excluded]


def _key(plan: Plan, layer: int) -> LayerKey:
    return tuple(sorted((name, tuple(sorted(heads))) for name, heads in plan.layers[layer].items()))
