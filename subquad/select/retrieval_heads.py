"""Retrieval scores: how much worse does the teacher retrieve without a unit, and what does each head do?

The measurements are in ablation.py. Heads are classified by their attention (Gather-and-Aggregate, arXiv 2504.18574):
an aggregate head attends from the question to the fact with the answer; a gather head attends from that answer to its
fact.

Legend: N rows, T tokens, H heads of all layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.probes import Probe, make_probe
from subquad.distill.layer_losses import attention_probabilities
from subquad.evaluate.likelihood import evaluating
from subquad.evaluate.retrieval import answers
from subquad.model.interface import shapes_of, watched_attention
from subquad.model.output_head import final_hidden
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Length, RowLength
from subquad.select.ablation import Ablation, Measure, ablation_cost, measure_of
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.units import Unit, by_layer, units_of
from subquad.select.work import SelectionCost, SelectionWork

ROLE_FLOOR = 0.1  # share of its attention that must follow a pattern for a head to have that role
ROLE_ROWS = 8
ROLE_ANSWERS = 8  # answers of a row, at most
BEFORE = 4  # tokens before an answer that belong to its fact


@selector("retrieval-heads", unit="head")
class RetrievalHeads(Selector):
    """Units without which the teacher retrieves worst."""

    tasks: list[str] = ["dictionary"]
    """Retrieval tasks."""
    context: RowLength = 512
    """Tokens in each row."""
    rows: Length = 64
    """Rows of each task, at most."""
    measure: Measure = "auto"
    """What drops: accuracy, or logprob; auto: logprob where the teacher fails too many questions."""
    top: int | None = None
    """Number of units to distinguish from the rest before it stops; None: as many as the budget keeps."""
    confidence: float = 0.95
    """Confidence of the intervals that distinguish them."""
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        units, tokenizer = inputs.units, inputs.teacher.tokenizer
        probes = make_probes(self.tasks, tokenizer, self.context, self.rows, self.seed, inputs.text_BT)
        kind = "heads" if _are_heads(units) else "units"
        return SelectionCost(
            f"silencing {len(units)} {kind} on {len(probes)} x {self.rows} rows of {self.context} tokens, fewer when "
            f"the first {self._top(inputs)} are settled early",
            ablation_cost(units, inputs.student.plan.num_layers, probes),
        )

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores = retrieval_scores(
            inputs.teacher.model,
            inputs.teacher.tokenizer,
            inputs.text_BT,
            units=inputs.units,
            tasks=self.tasks,
            context=self.context,
            rows=self.rows,
            measure=self.measure,
            top=self._top(inputs),
            confidence=self.confidence,
            seed=self.seed,
            work=inputs.work,
        )
        pairs = [*zip(scores.scores, scores.logprob_drop, strict=True)]
        return Ranking.in_order(inputs.units, pairs, inputs.unit, scores.as_dict(), scores.scores)

    def _top(self, inputs: SelectorInputs) -> int:
        if self.top is not None:
            return self.top
        return inputs.count if inputs.budget.context is None else default_top(inputs.units)


@selector("recall")
class Recall(RetrievalHeads):
    """The same for layers, on three tasks."""

    tasks: list[str] = ["dictionary", "variables", "associative"]


@dataclass
class RetrievalScores:
    """One entry per unit. Scores are means over rows and tasks; higher: retrieval needs the unit."""

    units: list[Unit]
    measure: str  # accuracy, or logprob: nats per answer token
    scores: list[float]
    low: list[float]  # bounds of the bootstrap interval
    high: list[float]
    accuracy_drop: list[float]
    logprob_drop: list[float]
    rows: list[int]  # rows of each task that a unit was measured on
    tasks: dict[str, dict[str, float]]  # the teacher's own scores
    unusable: dict[str, str]  # reasons of the tasks left out
    context: int
    settled: bool  # whether the first `top` are the same in every resample, at `confidence`
    top: int
    roles: list[str] | None = None  # of heads: aggregate, gather or neither
    aggregate: list[float] | None = None  # share of attention from the question to the fact
    gather: list[float] | None = None  # share of attention from the end of the fact to its beginning

    def as_dict(self) -> dict[str, Any]:
        """The entry in scores.json; values per head are lists by layer."""
        entry = {key: value for key, value in asdict(self).items() if value is not None and key != "units"}
        per_unit = {key for key, value in entry.items() if isinstance(value, list)}
        return entry | {key: by_layer(entry[key], self.units) for key in per_unit}


def _are_heads(units: Sequence[Unit]) -> bool:
    """Whether every unit is a single head."""
    return all(len(unit) == 1 for unit in units)


def default_top(units: Sequence[Unit]) -> int:
    """A fiftieth of the units (the paper's 2%)."""
    return max(1, round(len(units) / 50))


def make_probes(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    rows: int,
    seed: int,
    text_BT: Tensor | None,
) -> dict[str, Probe]:
    """A probe for each retrieval task, by name."""
    return {task: make_probe(task, tokenizer, context, rows, seed, text_BT) for task in tasks}


@torch.no_grad()
def retrieval_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_BT: Tensor | None = None,
    *,
    units: Sequence[Unit] | None = None,
    tasks: Sequence[str] = ("dictionary",),
    context: int = 512,
    rows: int = 64,
    measure: Measure = "auto",
    top: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    work: SelectionWork | None = None,
) -> RetrievalScores:
    """Scores every unit of `model` by ablating its heads on the retrieval probes `tasks` of `context` tokens.

    `text_BT`: haystack of the probes. `units`: None: every head. `rows`: rows of each task, at most. `top`: number of
    units to distinguish from the rest before it stops; None: `default_top`. Raises UserError if no task is usable.
    """
    work = work or SelectionWork()
    shapes = shapes_of(model)
    heads = units_of(shapes, "head")
    units = heads if units is None else list(units)
    top = default_top(units) if top is None else top
    probes = make_probes(tasks, tokenizer, context, rows, seed, text_BT)
    teacher = Student.from_teacher(model, Plan.all_attention(shapes))
    with evaluating(model):
        # Leave out the tasks that the model itself fails.
        baseline = {task: answers(model, probe) for task, probe in probes.items()}
        kind, unusable = measure_of(model, probes, baseline, measure)
        for task, reason in unusable.items():
            work.say(f"the retrieval task '{task}' is left out: {reason}")
            del probes[task]

        # Ablate the units, until the first ones are settled.
        ablation = Ablation(teacher, units, probes, baseline, kind, top, work, confidence, seed)
        while ablation.step():
            pass
        low_U, high_U = ablation.interval()
        scores = RetrievalScores(
            units=units,
            measure=kind,
            scores=ablation.mean(kind).tolist(),
            low=low_U.tolist(),
            high=high_U.tolist(),
            accuracy_drop=ablation.mean("accuracy").tolist(),
            logprob_drop=ablation.mean("logprob").tolist(),
            rows=ablation.rows.tolist(),
            tasks={task: baseline[task].score() for task in tasks},
            unusable=unusable,
            context=context,
            settled=not ablation.open_units(),
            top=top,
        )

        # Classify the heads.
        if _are_heads(units):
            index_U = [heads.index(unit) for unit in units]
            patterns = _patterns(model, [shape.window for shape in shapes], probes)
            aggregate_H, gather_H = (share_H[index_U] for share_H in patterns)
            scores.aggregate, scores.gather = aggregate_H.tolist(), gather_H.tolist()
            scores.roles = [_role(a, g) for a, g in zip(scores.aggregate, scores.gather, strict=True)]
    return scores


def _patterns(model: PreTrainedModel, windows: Sequence[int | None], probes: dict[str, Probe]) -> tuple[Tensor, Tensor]:
    """Shares of each head's attention, (H,): from the question to the fact, and within the fact."""
    aggregate, gather = [], []
    for probe in probes.values():
        for row in range(min(ROLE_ROWS, len(probe.input_ids))):
            with watched_attention(model) as calls:
                final_hidden(model, probe.input_ids[row : row + 1].to(model.device))
            weights = [
                attention_probabilities(call, window)[0].float().cpu()
                for call, window in zip(calls.values(), windows, strict=True)
            ]
            weights_HTT = torch.cat(weights)
            for answer, source, length in _sources(probe, row):
                start = max(0, source - BEFORE)
                aggregate.append(weights_HTT[:, answer - 1, start : source + length].sum(-1))
                gather.append(weights_HTT[:, source : source + length, start:source].sum(-1).mean(-1))
    if not aggregate:  # no answer occurs literally in its text
        zeros_H = torch.zeros(len(weights_HTT))
        return zeros_H, zeros_H
    return torch.stack(aggregate).mean(0), torch.stack(gather).mean(0)


def _sources(probe: Probe, row: int) -> list[tuple[int, int, int]]:
    """The sources of a row's answers: (position of the answer, its position among the facts, its tokens).

    Of several occurrences, the one preceded by most tokens of the question counts.
    """
    ids: list[int] = probe.input_ids[row].tolist()
    places = probe.answer_mask[row].nonzero()[:, 0].tolist()
    start = int(probe.question_start[row])
    spans = [(place, 1) for place in places[:ROLE_ANSWERS]] if probe.per_token else [(places[0], len(places))]
    sources = []
    for answer, length in spans:
        answer_ids, question = ids[answer : answer + length], {*ids[max(start, answer - 4 * BEFORE) : answer]}
        matches = [place for place in range(1, start - length + 1) if ids[place : place + length] == answer_ids]
        if matches:
            best = max(matches, key=lambda place: len(question & {*ids[max(0, place - BEFORE) : place]}))
            sources.append((answer, best, length))
    return sources


def _role(aggregate: float, gather: float) -> str:
    if max(aggregate, gather) < ROLE_FLOOR:
        return "neither"
    return "aggregate" if aggregate >= gather else "gather"
