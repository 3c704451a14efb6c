"""Alignment-loss scores: how far are a unit's mixers from the teacher's attention, after alignment?

Every layer of the all-linear student gets the teacher's input, and its attention module's output is compared with the
teacher's (the mean over tokens of the difference's root mean square over the model width). A unit is worth what its
attention takes off this distance: for a layer all of it. Source: KL-guided selection's ablation GA-S1 (arXiv
2512.20569), a selector that costs one pass and, in the paper, finds worse layers.

Legend: N rows of text, T tokens, U units.
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
from subquad.select.work import SelectionCost, Work
from subquad.utils.token_cost import TokenCost


@selector("alignment-loss", aligned=True)
class AlignmentLoss(Selector):
    """Units whose mixers stayed furthest from the teacher's attention in alignment."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        tokens = (1 + len(packed(inputs.units))) * inputs.text_BT.numel()
        return SelectionCost("alignment loss", TokenCost(forward_tokens=tokens))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        worth_NU = alignment_losses(inputs.new_board(), inputs.units, inputs.text_BT, inputs.work)
        return Ranking.by_rows(inputs.units, worth_NU, inputs.unit, {})


def alignment_losses(board: Supernet, units: Sequence[Unit], text_NT: Tensor, work: Work) -> Tensor:
    """What the units are worth on every row of text, (N, U)."""
    packs = packed(units)
    plans = [board.keeping(heads_of(units, pack)) for pack in packs]
    students = [type(board.student).from_teacher(board.teacher, plan, mixers_from=board.student) for plan in plans]
    sites = [board.teacher.get_submodule(site.path) for site in find_attention(board.teacher)]

    @torch.no_grad()
    def piece(row: int) -> list[float]:
        (linear_L, *kept) = _distances([board.student, *students], board.teacher, sites, text_NT[row])
        worth = [0.0] * len(units)
        for pack, with_attention_L in zip(packs, kept, strict=True):
            for unit in pack:
                worth[unit] = sum(linear_L[layer] - with_attention_L[layer] for layer in layers_in(units[unit]))
        return worth

    each = TokenCost(forward_tokens=(1 + len(packs)) * text_NT.shape[1])
    return work.pieces("alignment loss", len(text_NT), piece, each=each)


def packed(units: Sequence[Unit]) -> list[list[int]]:
    """Units that share no layer can be measured together: as few sets of such as there need be."""
    packs: list[tuple[list[int], set[int]]] = []
    for index, unit in enumerate(units):
        mine = {*layers_in(unit)}
        pack, taken = next((one for one in packs if mine.isdisjoint(one[1])), (None, None))
        if pack is None or taken is None:
            packs.append(([index], mine))
        else:
            pack.append(index)
            taken |= mine
    return [pack for pack, _ in packs]


def _distances(
    students: Sequence[BaseStudent], teacher: PreTrainedModel, sites: Sequence[nn.Module], row_T: Tensor
) -> list[list[float]]:
    """The distance of every layer of each student from the teacher's, given the teacher's input."""
    inside = [student.attention_modules() for student in students]
    found = [[0.0] * len(sites) for _ in students]

    def compare(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for place, modules in enumerate(inside):
            mine_BTM = modules[layer](*args, **kwargs)[0]
            found[place][layer] = float(output_distance(mine_BTM, output[0], "norm"))

    hooks = [site.register_forward_hook(partial(compare, layer), with_kwargs=True) for layer, site in enumerate(sites)]
    try:
        final_hidden(teacher, row_T[None].to(teacher.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
