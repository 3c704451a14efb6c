"""Retrieval heads: silence one head of the teacher at a time; how much worse does it look things up?

The score of head (l, h) is what the teacher answers less (or less surely) with the head's output zeroed before the
output projection. Source: Retrieval-Aware Distillation (arXiv 2602.11374), whose official code ships lists of heads but
no scorer.

Notable:
- A head of layer l changes nothing below l: its pass begins there (prefix.py), so that it costs about half a pass.
  Heads of one layer go through the rest of the model together, as rows of a batch.
- Rows come in rounds. After each, every head gets a bootstrap interval of its mean; one whose interval lies clear of
  the cut between the `top` first and the rest is settled and measured no more. When all are, the work is done.
- Where the teacher answers, accuracy counts (and log-probability between equals); where it fails half of the questions,
  a drop of its accuracy is noise, and log-probability counts, if the facts move that. Else the task is left out, and
  said to be (`usable`).
- Heads are told apart by their attention (Gather-and-Aggregate, arXiv 2504.18574): an aggregate head looks from the
  question at the fact that holds the answer, a gather head looks from the answer there at what it belongs to.

Legend: N rows, T tokens, H heads of a layer, S heads that are silenced, one at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.attention import Pass, find_attention, watched_attention
from subquad.data.retrieval import Probe, make_probe
from subquad.distill.heads import final_hidden
from subquad.distill.hidden import attention_probabilities
from subquad.errors import UserError
from subquad.evaluate.likelihood import evaluating
from subquad.evaluate.retrieval import TOKENS_AT_ONCE, Answers, answers, usable
from subquad.plan import Plan
from subquad.select.prefix import recorded, repeated, resumed
from subquad.student import Student

Measure = Literal["auto", "accuracy", "logprob"]

ROUND = 8  # rows of each task that are measured before settled heads are left out
RESAMPLES = 1000
ROLE_FLOOR = 0.1  # of a head's attention that must follow a pattern for it to have that role
ROLE_ROWS = 8
ROLE_ANSWERS = 8  # of a row that has many
BEFORE = 4  # tokens before the answer that make up the fact with it


@dataclass
class HeadScores:
    """One list a layer, of one entry a head. Scores are means over rows and tasks; higher: retrieval needs the head."""

    measure: str  # accuracy, or logprob: nats per answer token
    scores: list[list[float]]
    low: list[list[float]]  # bounds of the bootstrap interval
    high: list[list[float]]
    accuracy_drop: list[list[float]]
    logprob_drop: list[list[float]]
    roles: list[list[str]]  # aggregate, gather or neither
    aggregate: list[list[float]]  # share of attention from the question to the fact
    gather: list[list[float]]  # share of attention from the end of the fact to the rest of it
    tasks: dict[str, dict[str, float]]  # what the teacher answers
    unusable: dict[str, str]  # tasks left out, and why
    rows: list[list[int]]  # rows of each task that a head was measured on
    context: int
    settled: bool  # whether the first `top` are those of every resample, as far as `confidence` goes
    top: int
    tokens: int  # that went through the model, in whole passes
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def retrieval_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_BT: Tensor | None = None,
    *,
    tasks: Sequence[str] = ("dictionary",),
    context: int = 512,
    rows: int = 64,
    measure: Measure = "auto",
    top: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> HeadScores:
    """Scores every head of `model` by silencing it on the retrieval probes `tasks` of `context` tokens.

    `text_BT`: a haystack for the probes. `rows`: of each task, at most. `top`: how many heads must be told from the
    others before it stops; none: a fiftieth of them (the paper's 2 %). `progress`: called with (rows done, in all).
    `say`: gets the bill before the work begins, and what was left out. Raises UserError where the model can be asked
    nothing: no task is left.
    """
    start = time.perf_counter()
    sites = find_attention(model)
    shapes = [site.shape for site in sites]
    teacher = Student.from_teacher(model, Plan.all_attention(shapes))
    probes = {task: make_probe(task, tokenizer, context, rows, seed, text_BT) for task in tasks}
    with evaluating(model):
        asked = time.perf_counter()
        whole = {task: answers(model, probe) for task, probe in probes.items()}
        pass_seconds = (time.perf_counter() - asked) / len(probes)
        kind, unusable = _measure(model, probes, measure)
        for task, reason in unusable.items():
            say(f"the retrieval task '{task}' is left out: {reason}")
            del probes[task]
        heads = sum(shape.heads for shape in shapes)
        top = max(1, round(heads / 50)) if top is None else top
        share = sum(shape.heads * (len(shapes) - layer) for layer, shape in enumerate(shapes)) / len(shapes)
        say(
            f"{heads} heads on {len(probes)} x {rows} rows of {context} tokens: as much as {share:.0f} passes of the "
            f"model over them, {share * len(probes) * rows * context:,.0f} tokens, about "
            f"{share * len(probes) * pass_seconds:,.0f} s; less when the first {top} are settled early"
        )
        ablation = _Ablation(teacher, probes, whole, kind, top, confidence, seed)
        while ablation.step():
            if progress is not None:
                progress(ablation.done, rows)
        patterns = _patterns(model, [shape.window for shape in shapes], probes)
    low, high = ablation.interval()

    def by_layer(values: Sequence[Any] | Tensor) -> list[list[Any]]:
        flat = values.tolist() if isinstance(values, Tensor) else list(values)
        return [[flat.pop(0) for _ in range(shape.heads)] for shape in shapes]

    aggregate, gather = patterns
    return HeadScores(
        measure=kind,
        scores=by_layer(ablation.mean(kind)),
        low=by_layer(low),
        high=by_layer(high),
        accuracy_drop=by_layer(ablation.mean("accuracy")),
        logprob_drop=by_layer(ablation.mean("logprob")),
        roles=by_layer([_role(a, g) for a, g in zip(aggregate.tolist(), gather.tolist(), strict=True)]),
        aggregate=by_layer(aggregate),
        gather=by_layer(gather),
        tasks={task: whole[task].score() for task in tasks},
        unusable=unusable,
        rows=by_layer(ablation.rows),
        context=context,
        settled=not ablation.open_heads(),
        top=top,
        tokens=round(ablation.tokens),
        seconds=time.perf_counter() - start,
    )


def _measure(model: PreTrainedModel, probes: dict[str, Probe], wish: Measure) -> tuple[str, dict[str, str]]:
    """What is compared, accuracy or logprob, and why tasks are left out. Raises UserError if none is left."""
    kinds: tuple[Literal["accuracy", "logprob"], ...] = ("accuracy", "logprob") if wish == "auto" else (wish,)
    for kind in kinds:
        verdicts = {task: usable(model, probe, kind) for task, probe in probes.items()}
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


class _Ablation:
    """What every head's silence costs, row by row; rounds of rows, for the heads that are not settled."""

    def __init__(
        self,
        teacher: Student,
        probes: dict[str, Probe],
        whole: dict[str, Answers],
        kind: str,
        top: int,
        confidence: float,
        seed: int,
    ) -> None:
        self.teacher, self.probes, self.whole = teacher, probes, whole
        self.kind, self.top, self.confidence, self.seed = kind, top, confidence, seed
        self.heads = [(layer, head) for layer, shape in enumerate(teacher.plan.shapes) for head in range(shape.heads)]
        self.limit = min(len(probe.input_ids) for probe in probes.values())
        nothing = torch.full((self.limit, len(self.heads)), math.nan, dtype=torch.float64)
        self.drops = {"accuracy": nothing.clone(), "logprob": nothing.clone()}  # rows by heads, means over tasks
        self.done = 0
        self.tokens = 0.0

    @property
    def rows(self) -> Tensor:
        """Rows of each task that a head was measured on, (heads,)."""
        return self.drops[self.kind].isfinite().sum(0)

    def mean(self, kind: str) -> Tensor:
        return self.drops[kind].nanmean(0)

    def interval(self) -> tuple[Tensor, Tensor]:
        """Bounds of the bootstrap interval of each head's mean, (heads,): rows are drawn again, with replacement."""
        drops_NH = self.drops[self.kind]
        generator = torch.Generator().manual_seed(self.seed)
        rest = (1 - self.confidence) / 2
        bounds = torch.zeros(2, drops_NH.shape[1], dtype=torch.float64)
        for count in self.rows.unique().tolist():
            of_count = self.rows == count
            drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
            means_RH = drops_NH[:count, of_count][drawn].mean(1)
            bounds[:, of_count] = means_RH.quantile(torch.tensor([rest, 1 - rest], dtype=torch.float64), dim=0)
        return bounds[0], bounds[1]

    def open_heads(self) -> list[int]:
        """The heads that may still belong to the first `top` or not: their interval holds the cut."""
        if self.done == 0:
            return [*range(len(self.heads))]
        if not 0 < self.top < len(self.heads):
            return []
        ordered = self.mean(self.kind).sort(descending=True).values
        cut = (ordered[self.top - 1] + ordered[self.top]) / 2
        low, high = self.interval()
        return ((low <= cut) & (cut <= high)).nonzero()[:, 0].tolist()

    def step(self) -> bool:
        """Measures the open heads on the next rows; whether there was anything to do."""
        wanted = self.open_heads()
        if not wanted or self.done == self.limit:
            return False
        stop = min(self.done + ROUND, self.limit)
        kept = slice(self.done, stop)
        for drops in self.drops.values():
            drops[kept, wanted] = 0
        for task, probe in self.probes.items():
            at_once = max(1, TOKENS_AT_ONCE // probe.input_ids.shape[1])
            for first in range(self.done, stop, at_once):
                part = slice(first, min(first + at_once, stop))
                whole_N = _by_row(self.whole[task])
                for index, silent_N in self._silenced(probe.rows(part), wanted):
                    for kind, drops in self.drops.items():
                        drops[part, index] += (whole_N[kind][part] - silent_N[kind]) / len(self.probes)
        self.done = stop
        return True

    def _silenced(self, probe: Probe, wanted: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(head, what is answered without it, row by row) for each of these heads."""
        teacher, blocks = self.teacher, self.teacher.blocks()
        rows, size = len(probe.input_ids), probe.input_ids.numel()
        with recorded(blocks) as outputs:
            teacher.final_hidden(probe.input_ids.to(teacher.device))
        self.tokens += size
        at_once = max(1, TOKENS_AT_ONCE // size)
        for layer in range(len(blocks)):
            mine = [index for index in wanted if self.heads[index][0] == layer]
            for first in range(0, len(mine), at_once):
                group = mine[first : first + at_once]
                gains_SH = torch.ones(len(group), teacher.plan.shapes[layer].heads, device=teacher.device)
                gains_SH[range(len(group)), [self.heads[index][1] for index in group]] = 0
                gains = {layer: gains_SH.repeat_interleave(rows, 0)}
                below = [repeated(outputs[layer - 1], len(group))] * layer if layer else []

                def hidden(model: PreTrainedModel, ids_NT: Tensor, gains: Any = gains) -> Tensor:
                    return teacher.final_hidden(ids_NT, student_pass=Pass(gains=gains))

                with resumed(blocks, layer, below):
                    found = _by_row(answers(teacher, probe.repeated(len(group)), hidden))
                self.tokens += len(group) * size * (len(blocks) - layer) / len(blocks)
                for place, index in enumerate(group):
                    yield index, {kind: x_N[place * rows : (place + 1) * rows] for kind, x_N in found.items()}


def _by_row(found: Answers) -> dict[str, Tensor]:
    """Share of the answers right, and log-probability of an answer token, of every row, (N,)."""
    return {"accuracy": found.hits_N / found.counted_N, "logprob": found.logprob_N / found.tokens_N}


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
