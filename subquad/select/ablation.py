"""What a model looks up less well with a unit's heads silenced: their outputs zeroed before the output projection.

Of a layer this is the recall score that KL-guided selection compares with (AR, arXiv 2512.20569), of a head that of
Retrieval-Aware Distillation (arXiv 2602.11374), whose official code ships lists of heads but no scorer.

Notable:
- A head of layer l changes nothing below l: its pass begins there (prefix.py), so that it costs about half a pass.
  Units that begin in the same layer go through the rest of the model together, as rows of a batch.
- Rows come in rounds. After each, every unit gets a bootstrap interval of its mean; one whose interval lies clear of
  the cut between the `top` first and the rest is settled and measured no more. When all are, the work is done.
- Where the teacher answers, accuracy counts (and log-probability between equals); where it fails half of the questions,
  a drop of its accuracy is noise, and log-probability counts, if the facts move that. Else the task is left out, and
  said to be (`usable`).

Legend: N rows, T tokens, H heads of a layer, S units that are silenced, one at a time, U units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.data.probes import Probe
from subquad.errors import UserError
from subquad.evaluate.retrieval import TOKENS_AT_ONCE, Answers, answers, usable
from subquad.mixers.base import picked
from subquad.model.layer_call import ForwardContext, LayerCall
from subquad.model.student import Student
from subquad.select.prefix import recorded, repeated, resumed
from subquad.select.units import Unit, layers_in
from subquad.select.work import Work, bootstrap
from subquad.utils.token_cost import TokenCost

Measure: TypeAlias = Literal["auto", "accuracy", "logprob"]
Kind: TypeAlias = Literal["accuracy", "logprob"]
KINDS: tuple[Kind, ...] = ("accuracy", "logprob")

ROUND = 8  # rows of each task that are measured before settled units are left out


def measure_of(
    model: PreTrainedModel, probes: Mapping[str, Probe], whole: Mapping[str, Answers], wish: Measure
) -> tuple[Kind, dict[str, str]]:
    """What is compared, accuracy or logprob, and why tasks are left out, from the model's answers (`whole`).

    Raises UserError if none is left.
    """
    for kind in KINDS if wish == "auto" else (wish,):
        verdicts = {task: usable(model, probe, kind, answered=whole[task]) for task, probe in probes.items()}
        if all(verdict.usable for verdict in verdicts.values()):
            break
    unusable = {task: verdict.reason for task, verdict in verdicts.items() if not verdict.usable}
    if len(unusable) == len(probes):
        listed = "; ".join(f"{task} is {reason}" for task, reason in unusable.items())
        raise UserError(
            f"no retrieval task tells this model's heads apart ({listed}): give it easier tasks or a shorter context "
            "(selector.options)"
        )
    return kind, unusable


def silence_bill(units: Sequence[Unit], layers: int, probes: Mapping[str, Probe]) -> TokenCost:
    """Of all rows, if no unit is settled before."""
    passes = 1 + sum((layers - layers_in(unit)[0]) / layers for unit in units)
    return TokenCost(forward_tokens=passes * sum(probe.input_ids.numel() for probe in probes.values()))


class Silence:
    """What every unit's silence costs, row by row; rounds of rows, for the units that are not settled.

    `teacher`: the model, as a student that is all attention. `whole`: its answers. `kind`: what settles a unit.
    """

    def __init__(
        self,
        teacher: Student,
        units: Sequence[Unit],
        probes: Mapping[str, Probe],
        whole: Mapping[str, Answers],
        kind: Kind,
        top: int,
        work: Work,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.teacher, self.units, self.probes, self.whole, self.work = teacher, units, probes, whole, work
        self.kind, self.top, self.confidence, self.seed = kind, top, confidence, seed
        self.limit = min(len(probe.input_ids) for probe in probes.values())
        nothing = torch.full((self.limit, len(units)), math.nan, dtype=torch.float64)
        self.drops = {kind: nothing.clone() for kind in KINDS}  # rows by units, means over tasks
        self.done = 0

    @property
    def rows(self) -> Tensor:
        """Rows of each task that a unit was measured on, (U,)."""
        return self.drops[self.kind].isfinite().sum(0)

    def mean(self, kind: Kind) -> Tensor:
        return self.drops[kind].nanmean(0)

    def interval(self) -> tuple[Tensor, Tensor]:
        """Bounds of the bootstrap interval of each unit's mean, (U,)."""
        drops_NU = self.drops[self.kind]
        bounds = torch.zeros(2, len(self.units), dtype=torch.float64)
        for count in self.rows.unique().tolist():
            of_count = self.rows == count
            bounds[:, of_count] = torch.stack(bootstrap(drops_NU[:count, of_count], self.confidence, self.seed))
        return bounds[0], bounds[1]

    def open_units(self) -> list[int]:
        """The units that may still belong to the first `top` or not: their interval holds the cut."""
        if self.done == 0:
            return [*range(len(self.units))]
        if not 0 < self.top < len(self.units):
            return []
        ordered = self.mean(self.kind).sort(descending=True).values
        cut = (ordered[self.top - 1] + ordered[self.top]) / 2
        low, high = self.interval()
        return (~((low > cut) | (cut > high))).nonzero()[:, 0].tolist()

    def step(self) -> bool:
        """Measures the open units on the next rows; whether there was anything to do."""
        wanted = self.open_units()
        if not wanted or self.done == self.limit:
            return False
        first, stop = self.done, min(self.done + ROUND, self.limit)
        layers = self.teacher.plan.num_layers
        passes = 1 + sum((layers - layers_in(self.units[index])[0]) / layers for index in wanted)
        found = self.work.pieces(
            f"silence, rows from {first}",
            stop - first,
            lambda row: self._row(first + row, wanted),
            each=TokenCost(forward_tokens=passes * sum(probe.input_ids.shape[1] for probe in self.probes.values())),
        )
        for kind, drops_NW in zip(KINDS, found.split(len(wanted), 1), strict=True):
            self.drops[kind][first:stop, wanted] = drops_NW
        self.done = stop
        return True

    @torch.no_grad()
    def _row(self, row: int, wanted: list[int]) -> list[float]:
        """What one row of every task loses without each of these units: of accuracy, then of log-probability."""
        drops = {kind: dict.fromkeys(wanted, 0.0) for kind in KINDS}
        for task, probe in self.probes.items():
            whole = by_row(self.whole[task])
            for index, silent in self._silenced(probe.rows(slice(row, row + 1)), wanted):
                for kind in KINDS:
                    drops[kind][index] += float(whole[kind][row] - silent[kind]) / len(self.probes)
        return [drop for kind in KINDS for drop in drops[kind].values()]

    def _silenced(self, probe: Probe, wanted: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(unit, what is answered without it) for each of these units, on a probe of one row."""
        teacher, blocks = self.teacher, self.teacher.blocks()
        shapes = teacher.plan.shapes
        with recorded(blocks) as outputs:
            teacher.final_hidden(probe.input_ids.to(teacher.device))
        at_once = max(1, TOKENS_AT_ONCE // probe.input_ids.numel())
        for layer in range(len(blocks)):
            mine = [index for index in wanted if layers_in(self.units[index])[0] == layer]
            for first in range(0, len(mine), at_once):
                group = mine[first : first + at_once]
                gains = {}
                for touched in {touched for index in group for touched in layers_in(self.units[index])}:
                    gains[touched] = torch.ones(len(group), shapes[touched].heads, device=teacher.device)
                for place, index in enumerate(group):
                    for touched, head in self.units[index]:
                        gains[touched][place, head] = 0
                below = [repeated(outputs[layer - 1], len(group))] * layer if layer else []

                def hidden(model: PreTrainedModel, ids_ST: Tensor, gains: Any = gains) -> Tensor:
                    return teacher.final_hidden(ids_ST, forward_context=scaled(gains))

                with resumed(blocks, layer, below):
                    found = by_row(answers(teacher, probe.repeated(len(group)), hidden))
                for place, index in enumerate(group):
                    yield index, {kind: x_S[place] for kind, x_S in found.items()}


def scaled(gains: Mapping[int, Tensor]) -> ForwardContext:
    """A pass whose heads' outputs are multiplied by `gains`, (B, H) by layer; 0 ablates a head."""

    def around(call: LayerCall) -> Tensor:
        y_BHTD = call.mixed()
        if call.layer not in gains:
            return y_BHTD
        gain_BH11 = gains[call.layer].to(y_BHTD.dtype)[:, :, None, None]
        if call.branch is not None:  # the heads that attend under the parallel join
            gain_BTHD = picked(gain_BH11, call.branch.group.heads).transpose(1, 2)
            call.branch = replace(call.branch, y_BTHD=call.branch.y_BTHD * gain_BTHD)
        return y_BHTD * gain_BH11

    return ForwardContext(around=around)


def by_row(found: Answers) -> dict[str, Tensor]:
    """Share of the answers right, and log-probability of an answer token, of every row, (N,)."""
    return {"accuracy": found.hits_N / found.counted_N, "logprob": found.logprob_N / found.tokens_N}
