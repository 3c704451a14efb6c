"""Retrieval scores: how much worse does the teacher look things up without a unit? And what does each head do there?

The measuring is silence.py's. Heads are told apart by their attention (Gather-and-Aggregate, arXiv 2504.18574): an
aggregate head looks from the question at the fact that holds the answer, a gather head looks from the answer there at
what it belongs to.

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
from subquad.recipes.stage import Length
from subquad.select.ablation import Measure, Silence, measure_of, silence_bill
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.units import Unit, by_layer, units_of
from subquad.select.work import SelectionCost, Work

ROLE_FLOOR = 0.1  # of a head's attention that must follow a pattern for it to have that role
ROLE_ROWS = 8
ROLE_ANSWERS = 8  # of a row that has many
BEFORE = 4  # tokens before the answer that make up the fact with it


@selector("retrieval-heads", unit="head")
class RetrievalHeads(Selector):
    """Heads, or layers, without which the teacher cannot look things up."""

    tasks: list[str] = ["dictionary"]
    """Retrieval tasks."""
    context: Length = 512
    """Tokens of a row."""
    rows: Length = 64
    """Rows of each task, at most."""
    measure: Measure = "auto"
    top: int | None = None
    """Units that must be told from the others before it stops; none: as many as the budget keeps."""
    confidence: float = 0.95
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        shapes, units = inputs.student.plan.shapes, inputs.units
        teacher = inputs.source
        probes = make_probes(self.tasks, teacher.tokenizer, self.context, self.rows, self.seed, inputs.text_BT)
        top = default_top(units) if self._top(inputs) is None else self._top(inputs)
        return SelectionCost(
            f"silencing {len(units)} {'heads' if units == units_of(shapes, 'head') else 'units'} on {len(probes)} x "
            f"{self.rows} rows of {self.context} tokens, fewer when the first {top} are settled early",
            silence_bill(units, len(shapes), probes),
        )

    def choose(self, inputs: SelectorInputs) -> Ranking:
        scores = retrieval_scores(
            inputs.source.model,
            inputs.source.tokenizer,
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

    def _top(self, inputs: SelectorInputs) -> int | None:
        return inputs.count if self.top is None and inputs.budget.context is None else self.top


@selector("recall")
class Recall(RetrievalHeads):
    """The same of whole layers, on three tasks."""

    tasks: list[str] = ["dictionary", "variables", "associative"]


@dataclass
class RetrievalScores:
    """One entry a unit. Scores are means over rows and tasks; higher: retrieval needs the unit."""

    units: list[Unit]
    measure: str  # accuracy, or logprob: nats per answer token
    scores: list[float]
    low: list[float]  # bounds of the bootstrap interval
    high: list[float]
    accuracy_drop: list[float]
    logprob_drop: list[float]
    rows: list[int]  # of each task that a unit was measured on
    tasks: dict[str, dict[str, float]]  # what the teacher answers
    unusable: dict[str, str]  # tasks left out, and why
    context: int
    settled: bool  # whether the first `top` are those of every resample, as far as `confidence` goes
    top: int
    roles: list[str] | None = None  # of heads: aggregate, gather or neither
    aggregate: list[float] | None = None  # share of attention from the question to the fact
    gather: list[float] | None = None  # share of attention from the end of the fact to the rest of it

    def as_dict(self) -> dict[str, Any]:
        """For scores.json: what heads have, in a list for each layer."""
        found = {key: value for key, value in asdict(self).items() if value is not None and key != "units"}
        each = {key for key, value in found.items() if isinstance(value, list)}
        return found | {key: by_layer(found[key], self.units) for key in each}


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
    work: Work | None = None,
) -> RetrievalScores:
    """Scores every unit of `model` by silencing its heads on the retrieval probes `tasks` of `context` tokens.

    `text_BT`: a haystack for the probes. `units`: none: every head. `rows`: of each task, at most. `top`: how many
    units must be told from the others before it stops; none: `default_top`. `work` shares the work between processes.
    Raises UserError where the model can be asked nothing: no task is left.
    """
    work = work or Work()
    shapes = shapes_of(model)
    heads = units_of(shapes, "head")
    units = heads if units is None else list(units)
    top = default_top(units) if top is None else top
    probes = make_probes(tasks, tokenizer, context, rows, seed, text_BT)
    teacher = Student.from_teacher(model, Plan.all_attention(shapes))
    with evaluating(model):
        whole = {task: answers(model, probe) for task, probe in probes.items()}
        kind, unusable = measure_of(model, probes, whole, measure)
        for task, reason in unusable.items():
            work.say(f"the retrieval task '{task}' is left out: {reason}")
            del probes[task]
        silence = Silence(teacher, units, probes, whole, kind, top, work, confidence, seed)
        while silence.step():
            pass
        low, high = silence.interval()
        found = RetrievalScores(
            units=units,
            measure=kind,
            scores=silence.mean(kind).tolist(),
            low=low.tolist(),
            high=high.tolist(),
            accuracy_drop=silence.mean("accuracy").tolist(),
            logprob_drop=silence.mean("logprob").tolist(),
            rows=silence.rows.tolist(),
            tasks={task: whole[task].score() for task in tasks},
            unusable=unusable,
            context=context,
            settled=not silence.open_units(),
            top=top,
        )
        if units == heads:
            aggregate, gather = _patterns(model, [shape.window for shape in shapes], probes)
            found.aggregate, found.gather = aggregate.tolist(), gather.tolist()
            found.roles = [_role(a, g) for a, g in zip(found.aggregate, found.gather, strict=True)]
    return found


# Roles ---------------------------------------------------------------------------------------------------------------


def _patterns(model: PreTrainedModel, windows: Sequence[int | None], probes: dict[str, Probe]) -> tuple[Tensor, Tensor]:
    """Shares of each head's attention, (heads of all layers,): from the question to the fact, and within the fact."""
    aggregate, gather = [], []
    for probe in probes.values():
        for row in range(min(ROLE_ROWS, len(probe.input_ids))):
            with watched_attention(model) as calls:
                final_hidden(model, probe.input_ids[row : row + 1].to(model.device))
            layers = [
                attention_probabilities(c, w)[0].float().cpu() for c, w in zip(calls.values(), windows, strict=True)
            ]
            weights_HTT = torch.cat(layers)
            for answer, there, length in _sources(probe, row):
                start = max(0, there - BEFORE)
                aggregate.append(weights_HTT[:, answer - 1, start : there + length].sum(-1))
                gather.append(weights_HTT[:, there : there + length, start:there].sum(-1).mean(-1))
    if not aggregate:  # nothing stands in the text as it is asked for
        nothing = torch.zeros(len(weights_HTT))
        return nothing, nothing
    return torch.stack(aggregate).mean(0), torch.stack(gather).mean(0)


def _sources(probe: Probe, row: int) -> list[tuple[int, int, int]]:
    """Where the answers of a row come from: (position of the answer, its position among the facts, its tokens).

    Where an answer stands in several places, the one with most tokens of the question before it is meant.
    """
    ids: list[int] = probe.input_ids[row].tolist()
    places = probe.answer_mask[row].nonzero()[:, 0].tolist()
    start = int(probe.question_start[row])
    spans = [(place, 1) for place in places[:ROLE_ANSWERS]] if probe.per_token else [(places[0], len(places))]
    found = []
    for answer, length in spans:
        wanted, question = ids[answer : answer + length], {*ids[max(start, answer - 4 * BEFORE) : answer]}
        there = [place for place in range(1, start - length + 1) if ids[place : place + length] == wanted]
        if there:
            best = max(there, key=lambda place: len(question & {*ids[max(0, place - BEFORE) : place]}))
            found.append((answer, best, length))
    return found


def _role(aggregate: float, gather: float) -> str:
    if max(aggregate, gather) < ROLE_FLOOR:
        return "neither"
    return "aggregate" if aggregate >= gather else "gather"
