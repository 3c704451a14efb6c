"""HALO's scores: what a unit's attention is worth to recall, relative to everything else.

The teacher with one unit linear, aligned and not trained further, is measured on recall (R) and on what needs little
recall (C); s = (max R - R) / (max C - C + eps), over the units, in percentage points. Source: HALO (arXiv 2601.22156),
whose R is the mean of SQuAD, FDA and SWDE and whose C is the mean of HellaSwag, ARC-easy and ARC-challenge; its code
limits s to 50. Here R are retrieval probes. C is by default the share of next tokens of held-out text that are
predicted right, which needs no other data; it can be lm-eval tasks.

Legend: R rows of the probes, N rows of text, T tokens, P plans, U units.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subquad.data.probes import Probe, make_probe
from subquad.errors import UserError
from subquad.evaluate.retrieval import answers, usable
from subquad.model.base import BaseStudent
from subquad.model.output_head import final_hidden, head_logits
from subquad.plan import Plan
from subquad.recipes.stage import Length, RowLength
from subquad.select.inputs import SelectorInputs
from subquad.select.kl import candidates
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet, passes
from subquad.select.task import TaskScore, task_score
from subquad.select.units import by_layer
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost

BOUND = 50.0
EPS = 1e-10


@selector("halo", aligned=True)
class Halo(Selector):
    """Units whose attention matters to recall more than to the rest."""

    recall: list[str] = ["copy", "dictionary", "passkey"]
    """Retrieval tasks."""
    common: list[str] = []
    """lm-eval tasks for everything else; none: the next tokens of held-out text."""
    context: RowLength = 512
    """Tokens in each row of a retrieval task."""
    rows: Length = 32
    """Rows of each retrieval task."""
    limit: Length = 500
    """Documents of each task of `common`, at most."""
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        plans = candidates(inputs.supernet(), inputs.units, "remove")
        text_tokens = 0 if self._common_tasks() else inputs.text_BT.numel()
        tokens = passes(plans) * (self.rows * self.context * len(self.recall) + text_tokens)
        return SelectionCost(f"halo, {len(inputs.units)} units", TokenCost(forward_tokens=tokens))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        supernet, teacher, work, text_NT = inputs.supernet(), inputs.teacher, inputs.work, inputs.text_BT
        units, tasks = inputs.units, self._common_tasks()
        plans = candidates(supernet, units, "remove")

        # Leave out the retrieval tasks that the teacher itself fails.
        probes = {
            task: make_probe(task, teacher.tokenizer, self.context, self.rows, self.seed, text_NT)
            for task in self.recall
        }
        verdicts = {task: usable(teacher.model, probe) for task, probe in probes.items()}
        for task, verdict in verdicts.items():
            if not verdict.usable:
                work.say(f"the retrieval task '{task}' is left out: {verdict.reason}")
                del probes[task]
        if not probes:
            raise UserError(
                "the teacher answers none of the retrieval tasks, so halo has nothing to rank by: give it easier tasks "
                "or a shorter context (selector.options.recall, .context)"
            )

        # Measure every candidate; the first plan is the teacher's.
        supernet.prepare(plans)
        recall_U = probe_recall(supernet, plans, probes, work)[:, 1:].mean(0)
        if tasks:
            common_RP = task_scores(supernet, plans, tasks, teacher.tokenizer, work)
        else:
            common_RP = next_tokens_right(supernet, plans, text_NT, work)
        common_U = common_RP[:, 1:].mean(0)

        scores = halo_scores(recall_U, common_U).tolist()
        report = {"scores": scores, "recall": recall_U.tolist(), "common": common_U.tolist()}
        shaped = {key: by_layer(values, units) for key, values in report.items()}
        return Ranking.in_order(units, scores, inputs.unit, shaped, scores)

    def _common_tasks(self) -> list[TaskScore]:
        return [task_score(task, limit=self.limit, seed=self.seed) for task in self.common]


def probe_recall(supernet: Supernet, plans: Sequence[Plan], probes: Mapping[str, Probe], work: SelectionWork) -> Tensor:
    """Accuracy of every plan in percent, mean over tasks: (R, P)."""

    def measure(row: int) -> Tensor:
        def accuracies(probe: Probe) -> list[float]:
            return supernet.measure_all(plans, lambda student: answers(student, probe).score()["accuracy"])

        by_task = torch.tensor([accuracies(probe.rows(slice(row, row + 1))) for probe in probes.values()])
        return 100 * by_task.double().mean(0)

    rows = min(len(probe.input_ids) for probe in probes.values())
    tokens = sum(probe.input_ids.shape[1] for probe in probes.values())
    return work.map("halo, recall", rows, measure, item_cost=TokenCost(forward_tokens=passes(plans) * tokens))


def next_tokens_right(supernet: Supernet, plans: Sequence[Plan], text_NT: Tensor, work: SelectionWork) -> Tensor:
    """The share of next tokens that every plan predicts right, in percent: (N, P)."""

    def measure(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(supernet.student.device)

        def accuracy(student: BaseStudent) -> float:
            logits_1TV = head_logits(student, final_hidden(student, ids_1T)[:, :-1])
            return 100 * float((logits_1TV.argmax(-1) == ids_1T[:, 1:]).double().mean())

        return supernet.measure_all(plans, accuracy)

    item_cost = TokenCost(forward_tokens=passes(plans) * text_NT.shape[1])
    return work.map("halo, next tokens", len(text_NT), measure, item_cost=item_cost)


def task_scores(
    supernet: Supernet,
    plans: Sequence[Plan],
    tasks: Sequence[TaskScore],
    tokenizer: PreTrainedTokenizerBase,
    work: SelectionWork,
) -> Tensor:
    """The score of every plan in percent, mean over tasks: (1, P)."""

    def measure(index: int) -> list[float]:
        with supernet.activate(plans[index]) as student:
            return [100 * sum(task.score(student, tokenizer, "validation") for task in tasks) / len(tasks)]

    key = f"halo, {', '.join(task.name for task in tasks)}"
    return work.map(key, len(plans), measure, item_cost=TokenCost()).T


def halo_scores(recall_U: Tensor, common_U: Tensor) -> Tensor:
    """s of every unit, (U,), from recall and common-sense scores with that unit linear, in percent."""
    lost_U = recall_U.max() - recall_U
    return (lost_U / (common_U.max() - common_U + EPS)).clamp_max(BOUND)
