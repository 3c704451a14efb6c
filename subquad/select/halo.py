"""HALO's scores: what a unit's attention is worth to recall, over what it is worth to everything else.

The teacher with one unit linear, aligned and not trained further, is asked to recall (R) and to do what needs little of
it (C); s = (max R - R) / (max C - C + eps), over the units, in percentage points. Source: HALO (arXiv 2601.22156),
whose R is the mean of SQuAD, FDA and SWDE and whose C is that of HellaSwag, ARC-easy and ARC-challenge; its code bounds
s at 50. Here R are retrieval probes, and C is by default the share of the next tokens of held-out text that are
predicted right, which needs no data from elsewhere; it can be tasks of lm-eval's.

Legend: N rows of text, T tokens, U units.
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
from subquad.recipes.stage import Length
from subquad.select.inputs import SelectorInputs
from subquad.select.kl import candidates
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet, passes
from subquad.select.task import TaskScore, task_score
from subquad.select.units import by_layer
from subquad.select.work import SelectionCost, Work
from subquad.utils.token_cost import TokenCost

BOUND = 50.0
EPS = 1e-10


@selector("halo", aligned=True)
class Halo(Selector):
    """Units whose attention matters to recall more than to the rest."""

    recall: list[str] = ["copy", "dictionary", "passkey"]
    """Retrieval tasks."""
    common: list[str] = []
    """Tasks of lm-eval's for everything else; none: the next tokens of held-out text."""
    context: Length = 512
    """Tokens of a row of a retrieval task."""
    rows: Length = 32
    """Rows of each retrieval task."""
    limit: Length = 500
    """Documents of each task of `common`, at most."""
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        plans = candidates(inputs.new_board(), inputs.units, "remove")
        text_tokens = 0 if self._common_tasks() else inputs.text_BT.numel()
        tokens = passes(plans) * (self.rows * self.context * len(self.recall) + text_tokens)
        return SelectionCost(f"halo, {len(inputs.units)} units", TokenCost(forward_tokens=tokens))

    def choose(self, inputs: SelectorInputs) -> Ranking:
        board, teacher, work, text_NT = inputs.new_board(), inputs.source, inputs.work, inputs.text_BT
        units, tasks = inputs.units, self._common_tasks()
        plans = candidates(board, units, "remove")

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

        # Measure every candidate; the first is the teacher.
        board.prepare(plans)
        recall_U = probe_recall(board, plans, probes, work)[:, 1:].mean(0)
        if tasks:
            common_RP = task_scores(board, plans, tasks, teacher.tokenizer, work)
        else:
            common_RP = next_tokens_right(board, plans, text_NT, work)
        common_U = common_RP[:, 1:].mean(0)

        scores = halo_scores(recall_U, common_U).tolist()
        report = {"scores": scores, "recall": recall_U.tolist(), "common": common_U.tolist()}
        shaped = {key: by_layer(values, units) for key, values in report.items()}
        return Ranking.in_order(units, scores, inputs.unit, shaped, scores)

    def _common_tasks(self) -> list[TaskScore]:
        return [task_score(task, limit=self.limit, seed=self.seed) for task in self.common]


def probe_recall(board: Supernet, plans: Sequence[Plan], probes: Mapping[str, Probe], work: Work) -> Tensor:
    """The share of answers that every plan gets right, in percent, mean over tasks: (rows, plans)."""

    def piece(row: int) -> Tensor:
        def right(probe: Probe) -> list[float]:
            return board.shared(plans, lambda student: answers(student, probe).score()["accuracy"])

        found = torch.tensor([right(probe.rows(slice(row, row + 1))) for probe in probes.values()])
        return 100 * found.double().mean(0)

    rows = min(len(probe.input_ids) for probe in probes.values())
    tokens = sum(probe.input_ids.shape[1] for probe in probes.values())
    return work.pieces("halo, recall", rows, piece, each=TokenCost(forward_tokens=passes(plans) * tokens))


def next_tokens_right(board: Supernet, plans: Sequence[Plan], text_NT: Tensor, work: Work) -> Tensor:
    """The share of next tokens that every plan predicts right, in percent: (N, plans)."""

    def piece(row: int) -> list[float]:
        ids_1T = text_NT[row : row + 1].to(board.student.device)

        def right(student: BaseStudent) -> float:
            logits_1TV = head_logits(student, final_hidden(student, ids_1T)[:, :-1])
            return 100 * float((logits_1TV.argmax(-1) == ids_1T[:, 1:]).double().mean())

        return board.shared(plans, right)

    each = TokenCost(forward_tokens=passes(plans) * text_NT.shape[1])
    return work.pieces("halo, next tokens", len(text_NT), piece, each=each)


def task_scores(
    board: Supernet, plans: Sequence[Plan], tasks: Sequence[TaskScore], tokenizer: PreTrainedTokenizerBase, work: Work
) -> Tensor:
    """What every plan scores on tasks, in percent, in the mean: (1, plans)."""

    def piece(index: int) -> list[float]:
        with board.following(plans[index]) as student:
            return [100 * sum(task.validation(student, tokenizer) for task in tasks) / len(tasks)]

    key = f"halo, {', '.join(task.name for task in tasks)}"
    return work.pieces(key, len(plans), piece, each=TokenCost()).T


def halo_scores(recall_U: Tensor, common_U: Tensor) -> Tensor:
    """s of every unit, (U,), from what is left of recall and of common sense with it linear, in percent."""
    lost_U = recall_U.max() - recall_U
    return (lost_U / (common_U.max() - common_U + EPS)).clamp_max(BOUND)
