"""The loss of retrieval when a unit's heads are ablated: their outputs zeroed before the output projection.

For layers this is the recall score that KL-guided selection compares with (AR, arXiv 2512.20569). For heads it is the
score of Retrieval-Aware Distillation (arXiv 2602.11374), whose official code ships lists of heads but no scorer.

Notable:
- A head of layer l changes nothing below l, so its pass begins there (prefix.py) and costs about half a pass. Units
  that begin in the same layer go through the rest of the model together, as rows of a batch.
- Rows are measured in rounds. After each round, every unit has a bootstrap interval of its mean. Units whose interval
  does not contain the cut between the `top` first and the rest are settled and measured no further. The work ends when
  all units are settled.
- Where the teacher answers well, accuracy counts (and log-probability breaks ties). Where it fails half of the
  questions, a drop of its accuracy is noise, and log-probability counts, if the facts change it. Otherwise the task is
  left out, with a message (`usable`).

Legend: N rows, T tokens, H heads of a layer, S units ablated in one batch, one per row, U units, I open units.
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
from subquad.model.interface import record_outputs
from subquad.model.layer_call import ForwardContext, LayerCall
from subquad.model.student import Student
from subquad.select.prefix import skip_below
from subquad.select.units import Unit, layers_in
from subquad.select.work import SelectionWork, bootstrap
from subquad.utils.token_cost import TokenCost

Measure: TypeAlias = Literal["auto", "accuracy", "logprob"]
Kind: TypeAlias = Literal["accuracy", "logprob"]
KINDS: tuple[Kind, ...] = ("accuracy", "logprob")

ROUND = 8  # rows of each task in a round


def measure_of(
    model: PreTrainedModel, probes: Mapping[str, Probe], baseline: Mapping[str, Answers], measure: Measure
) -> tuple[Kind, dict[str, str]]:
    """The measure to compare, accuracy or logprob, and the reasons to leave out tasks, from the model's own answers.

    `baseline`: these answers, by task. Raises UserError if no task remains.
    """
    for kind in KINDS if measure == "auto" else (measure,):
        verdicts = {task: usable(model, probe, kind, answered=baseline[task]) for task, probe in probes.items()}
        if all(verdict.usable for verdict in verdicts.values()):
            break
    unusable = {task: verdict.reason for task, verdict in verdicts.items() if not verdict.usable}
    if len(unusable) == len(probes):
        reasons = "; ".join(f"{task} is {reason}" for task, reason in unusable.items())
        raise UserError(
            f"no retrieval task tells this model's heads apart ({reasons}): give it easier tasks or a shorter context "
            "(selector.options)"
        )
    return kind, unusable


def ablation_cost(units: Sequence[Unit], layers: int, probes: Mapping[str, Probe]) -> TokenCost:
    """The cost of measuring every unit on all rows, if none is settled early."""
    tokens = sum(probe.input_ids.numel() for probe in probes.values())
    return TokenCost(forward_tokens=_passes(units, layers) * tokens)


def _passes(units: Sequence[Unit], layers: int) -> float:
    """Whole forward passes that it takes to ablate each unit once, with the pass that they share."""
    return 1 + sum((layers - layers_in(unit)[0]) / layers for unit in units)


class Ablation:
    """The loss of retrieval without each unit, row by row, in rounds of rows for the units that are not settled.

    `teacher`: the model as a student with attention everywhere. `baseline`: its answers, by task. `kind`: the measure
    that settles a unit.
    """

    def __init__(
        self,
        teacher: Student,
        units: Sequence[Unit],
        probes: Mapping[str, Probe],
        baseline: Mapping[str, Answers],
        kind: Kind,
        top: int,
        work: SelectionWork,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.teacher, self.units, self.probes, self.baseline, self.work = teacher, units, probes, baseline, work
        self.kind, self.top, self.confidence, self.seed = kind, top, confidence, seed
        self.limit = min(len(probe.input_ids) for probe in probes.values())
        empty_NU = torch.full((self.limit, len(units)), math.nan, dtype=torch.float64)
        self.drops = {kind: empty_NU.clone() for kind in KINDS}  # mean over tasks; NaN: not measured
        self.rows_measured = 0

    @property
    def rows(self) -> Tensor:
        """The number of rows of each task that a unit was measured on, (U,)."""
        return self.drops[self.kind].isfinite().sum(0)

    def mean(self, kind: Kind) -> Tensor:
        """The mean drop over the measured rows, (U,)."""
        return self.drops[kind].nanmean(0)

    def interval(self) -> tuple[Tensor, Tensor]:
        """Bounds of the bootstrap interval of each unit's mean, (U,)."""
        drops_NU = self.drops[self.kind]
        bounds_2U = torch.zeros(2, len(self.units), dtype=torch.float64)
        for count in self.rows.unique().tolist():
            of_count_U = self.rows == count
            low_high = bootstrap(drops_NU[:count, of_count_U], self.confidence, self.seed)
            bounds_2U[:, of_count_U] = torch.stack(low_high)
        return bounds_2U[0], bounds_2U[1]

    def open_units(self) -> list[int]:
        """The units that may or may not belong to the first `top`: their interval contains the cut."""
        if self.rows_measured == 0:
            return [*range(len(self.units))]
        if not 0 < self.top < len(self.units):
            return []
        ordered_U = self.mean(self.kind).sort(descending=True).values
        cut = (ordered_U[self.top - 1] + ordered_U[self.top]) / 2
        low_U, high_U = self.interval()
        return (~((low_U > cut) | (cut > high_U))).nonzero()[:, 0].tolist()

    def step(self) -> bool:
        """Measures the open units on the next round of rows; False if nothing was left to measure."""
        open_units = self.open_units()
        if not open_units or self.rows_measured == self.limit:
            return False
        start, stop = self.rows_measured, min(self.rows_measured + ROUND, self.limit)
        passes = _passes([self.units[index] for index in open_units], self.teacher.plan.num_layers)
        row_tokens = sum(probe.input_ids.shape[1] for probe in self.probes.values())
        drops_NI = self.work.map(
            f"silence, rows from {start}",
            stop - start,
            lambda row: self._row(start + row, open_units),
            item_cost=TokenCost(forward_tokens=passes * row_tokens),
        )
        for kind, of_kind_NI in zip(KINDS, drops_NI.split(len(open_units), 1), strict=True):
            self.drops[kind][start:stop, open_units] = of_kind_NI
        self.rows_measured = stop
        return True

    @torch.no_grad()
    def _row(self, row: int, indices: list[int]) -> list[float]:
        """The drops on one row of every task without each of these units: of accuracy, then of log-probability."""
        drops = {kind: dict.fromkeys(indices, 0.0) for kind in KINDS}
        for task, probe in self.probes.items():
            baseline = by_row(self.baseline[task])
            for index, ablated in self._ablated(probe.rows(slice(row, row + 1)), indices):
                for kind in KINDS:
                    drops[kind][index] += float(baseline[kind][row] - ablated[kind]) / len(self.probes)
        return [drop for kind in KINDS for drop in drops[kind].values()]

    def _ablated(self, probe: Probe, indices: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(unit, scores of the answers without it) for each of these units, on a probe of one row."""
        teacher, blocks = self.teacher, self.teacher.blocks()
        with record_outputs(blocks) as outputs:
            teacher.final_hidden(probe.input_ids.to(teacher.device))
        batch_size = max(1, TOKENS_AT_ONCE // probe.input_ids.numel())
        for layer in range(len(blocks)):
            in_layer = [index for index in indices if layers_in(self.units[index])[0] == layer]
            for start in range(0, len(in_layer), batch_size):
                batch = in_layer[start : start + batch_size]
                gains = self._gains(batch)

                def hidden(model: PreTrainedModel, ids_ST: Tensor, gains: Any = gains) -> Tensor:
                    return teacher.final_hidden(ids_ST, forward_context=scaled(gains))

                with skip_below(teacher, layer, outputs, times=len(batch)):
                    scores = by_row(answers(teacher, probe.repeated(len(batch)), hidden))
                for row, index in enumerate(batch):
                    yield index, {kind: score_S[row] for kind, score_S in scores.items()}

    def _gains(self, batch: Sequence[int]) -> dict[int, Tensor]:
        """Factors of the heads' outputs in every changed layer, (S, H): row s has zeros for the s-th unit's heads."""
        gains = {}
        for layer in {layer for index in batch for layer in layers_in(self.units[index])}:
            heads = self.teacher.plan.shapes[layer].heads
            gains[layer] = torch.ones(len(batch), heads, device=self.teacher.device)
        for row, index in enumerate(batch):
            for layer, head in self.units[index]:
                gains[layer][row, head] = 0
        return gains


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


def by_row(scored: Answers) -> dict[str, Tensor]:
    """Accuracy, and log-probability per answer token, of every row, (N,)."""
    return {"accuracy": scored.hits_N / scored.counted_N, "logprob": scored.logprob_N / scored.tokens_N}
