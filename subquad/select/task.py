"""The score of a model on a user's task: on validation documents, which choose a plan, or on test documents.

The best of many plans has an optimistic score on the documents that chose it, so the two parts are disjoint:

- a retrieval task (`dictionary`): rows with different seeds
- an lm-eval task (`boolq`) or a JSONL file of questions: two random halves of its documents
- a Python function `score(model, tokenizer, part) -> float`, higher is better; `part` is `validation` or `test`
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

METRICS = ("acc_norm", "acc", "exact_match", "f1", "contains")  # the first one that a task has is its default


@dataclass(frozen=True)
class TaskScore:
    """A task's name and its score."""

    name: str
    score: Score


def task_score(
    task: str | Score,
    *,
    limit: int = 500,
    metric: str | None = None,
    context: int = 512,
    seed: int = 0,
    text_BT: torch.Tensor | None = None,
) -> TaskScore:
    """The score on a task of any of the kinds above.

    `limit`: documents or rows of each part, at most. `metric`: metric of an lm-eval task; None: its first one of
    acc_norm, acc, exact_match, f1 and contains. `context` and `text_BT`: tokens in each row of a retrieval task, and
    the haystack. Raises UserError for an unknown task or metric.
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
    loaded = load_tasks([task])  # now, so that an invalid task is refused before any work

    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Part) -> float:
        def half(count: int) -> list[int]:
            shuffled = random.Random(seed).sample(range(count), count)
            indices = shuffled[: count // 2] if part == "validation" else shuffled[count // 2 :]
            return sorted(indices[:limit])

        results = harness(model, tokenizer, loaded, documents=half)
        values = [_metric(task, scores, metric) for scores in results.values()]
        return sum(values) / len(values)

    return score


def _metric(task: str, scores: dict[str, Any], metric: str | None) -> float:
    for name in METRICS if metric is None else (metric,):
        if name in scores:
            return float(scores[name]["value"])
    raise UserError(
        f"the task '{task}' has no metric '{metric or METRICS[0]}': set metric to one of {', '.join(scores)}"
    )
