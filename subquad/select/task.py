"""A user's task as a selector sees it: a score on documents for choosing, and one on others for the report.

The best of many plans looks better on the documents that it was chosen by than it is, so the two never meet:

- a retrieval task (`dictionary`): rows of different seeds
- a task of lm-eval's (`boolq`) or a JSONL file of questions: two halves of its documents, drawn at random
- a Python function `score(model, tokenizer, part) -> float`, higher for better; `part` is `validation` or `test`
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.probes import PROBE_TASKS, make_probe
from subquad.errors import UserError
from subquad.evaluate.harness import harness, load_tasks
from subquad.evaluate.retrieval import answers

Part: TypeAlias = Literal["validation", "test"]
Score: TypeAlias = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Part], float]

METRICS = ("acc_norm", "acc", "exact_match", "f1", "contains")  # in this order, of what a task has


@dataclass(frozen=True)
class TaskScore:
    """A task's name and its score."""

    name: str
    score: Score

    def validation(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        return self.score(model, tokenizer, "validation")

    def test(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        return self.score(model, tokenizer, "test")


def task_score(
    task: str | Score,
    *,
    limit: int = 500,
    metric: str | None = None,
    context: int = 512,
    seed: int = 0,
    text_BT: torch.Tensor | None = None,
) -> TaskScore:
    """How models are scored on a task (see above).

    `limit`: documents or rows of each part, at most. `metric`: of a task of lm-eval's; none: the first that it has of
    acc_norm, acc, exact_match, f1 and contains. `context` and `text_BT`: tokens of a retrieval task's rows, and their
    haystack. Raises UserError for an unknown task or metric.
    """
    if callable(task):
        return TaskScore(getattr(task, "__name__", "score"), task)
    if task in PROBE_TASKS:
        return TaskScore(task, _retrieval(task, limit, context, seed, text_BT))
    return TaskScore(task, _harness(task, limit, metric, seed))


def _retrieval(task: str, rows: int, context: int, seed: int, text_BT: torch.Tensor | None) -> Score:
    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Part) -> float:
        probe = make_probe(task, tokenizer, context, rows, 2 * seed + (part == "test"), text_BT)
        return answers(model, probe).score()["accuracy"]

    return score


def _harness(task: str, limit: int, metric: str | None, seed: int) -> Score:
    loaded = load_tasks([task])  # what can be wrong with it shows now

    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Part) -> float:
        def half(count: int) -> list[int]:
            shuffled = random.Random(seed).sample(range(count), count)
            mine = shuffled[: count // 2] if part == "validation" else shuffled[count // 2 :]
            return sorted(mine[:limit])

        found = harness(model, tokenizer, loaded, documents=half)
        values = [_metric(task, scores, metric) for scores in found.values()]
        return sum(values) / len(values)

    return score


def _metric(task: str, scores: dict[str, Any], wish: str | None) -> float:
    for name in METRICS if wish is None else (wish,):
        if name in scores:
            return float(scores[name]["value"])
    raise UserError(f"the task '{task}' has no metric '{wish or METRICS[0]}': set metric to one of {', '.join(scores)}")
