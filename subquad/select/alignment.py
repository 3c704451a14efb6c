"""Alignment-loss scores: how far are a unit's mixers from the teacher's attention after alignment?

Every layer of the all-linear student gets the teacher's input, and the output of its attention module is compared with
the teacher's: the root mean square of the difference over the model width, averaged over tokens. A unit's worth is the
distance that its attention removes; for a layer, all of it. Source: KL-guided selection's ablation GA-S1 (arXiv
2512.20569), which costs one pass and finds worse layers in the paper.

Legend: N rows of text, T tokens, M model width, L layers, U units.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.distill.layer_losses import output_distance
from subquad.model.base import BaseStudent
from subquad.model.interface import find_attention
from subquad.model.output_head import final_hidden
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet
from subquad.select.units import Unit, heads_of, layers_in
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost


@selector("alignment-loss", aligned=True)
class AlignmentLoss(Selector):
    """Units whose mixers stay furthest from the teacher's attention in alignment."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        tokens = (1 + len(packed(inputs.units))) * inputs.text_BT.numel()
        return SelectionCost("alignment loss", TokenCost(forward_tokens=tokens))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        worth_NU = alignment_losses(inputs.supernet(), inputs.units, inputs.text_BT, inputs.work)
        return Ranking.by_rows(inputs.units, worth_NU, inputs.unit, {})


def alignment_losses(supernet: Supernet, units: Sequence[Unit], text_NT: Tensor, work: SelectionWork) -> Tensor:
    """The worth of the units on every row of text, (N, U)."""
    linear, teacher = supernet.student, supernet.teacher
    packs = packed(units)
    plans = [supernet.plan_with(heads_of(units, pack)) for pack in packs]
    students = [type(linear).from_teacher(teacher, plan, mixers_from=linear) for plan in plans]
    sites = [teacher.get_submodule(site.path) for site in find_attention(teacher)]

    @torch.no_grad()
    def measure(row: int) -> list[float]:
        (linear_L, *with_attention) = _distances([linear, *students], teacher, sites, text_NT[row])
        worth = [0.0] * len(units)
        for pack, with_attention_L in zip(packs, with_attention, strict=True):
            for unit in pack:
                worth[unit] = sum(linear_L[layer] - with_attention_L[layer] for layer in layers_in(units[unit]))
        return worth

    item_cost = TokenCost(forward_tokens=(1 + len(packs)) * text_NT.shape[1])
    return work.map("alignment loss", len(text_NT), measure, item_cost=item_cost)


def packed(units: Sequence[Unit]) -> list[list[int]]:
    """Groups of units without a common layer, which one student can measure together; by index, greedily filled."""
    packs: list[list[int]] = []
    pack_layers: list[set[int]] = []
    for index, unit in enumerate(units):
        layers = {*layers_in(unit)}
        place = next((place for place in range(len(packs)) if layers.isdisjoint(pack_layers[place])), None)
        if place is None:
            packs.append([index])
            pack_layers.append(layers)
        else:
            packs[place].append(index)
            pack_layers[place] |= layers
    return packs


def _distances(
    students: Sequence[BaseStudent], teacher: PreTrainedModel, sites: Sequence[nn.Module], row_T: Tensor
) -> list[list[float]]:
    """The distance of each student's layers from the teacher's, given the teacher's input: students x layers."""
    attention_modules = [student.attention_modules() for student in students]
    distances = [[0.0] * len(sites) for _ in students]

    def compare(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for student, modules in enumerate(attention_modules):
            student_BTM = modules[layer](*args, **kwargs)[0]
            distances[student][layer] = float(output_distance(student_BTM, output[0], "norm"))

    hooks = [site.register_forward_hook(partial(compare, layer), with_kwargs=True) for layer, site in enumerate(sites)]
    try:
        final_hidden(teacher, row_T[None].to(teacher.device))
    finally:
        for hook in hooks:
            hook.remove()
    return distances
