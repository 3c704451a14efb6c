"""All measures of a conversion: held-out text or images, retrieval, tasks and cache bytes.

Every number in the rows of metrics.json is made here, in the same pass for all models.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from subquad.data.images import ImageSet
from subquad.data.probes import Probe, make_probe
from subquad.data.text import Corpus
from subquad.evaluate import cache_table, harness, image_fidelity, likelihood, paired_samples, retrieval
from subquad.evaluate.harness import load_tasks
from subquad.model.base import plan_of
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import EvaluateConfig
from subquad.utils.progress import StageProgress
from subquad.utils.token_cost import TokenCost


def evaluate_models(
    models: Mapping[str, Any],
    teacher: Teacher,
    data: Corpus | ImageSet,
    config: EvaluateConfig,
    dtype: str,
    console: Console | None = None,
) -> dict[str, Any]:
    """Rows of metrics.json for the teacher and for `models`, and samples of text by the teacher and the student.

    `models` has a `student`. `dtype` is that of the cache whose bytes are given. Progress is shown on `console`, if
    there is one.
    """
    total, done, start = round(evaluation_cost(config, 1 + len(models), data).forward_tokens), 0, time.perf_counter()
    with StageProgress(console, "measure", steps=total, unit="token") as bar:

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(done, f"{done / (time.perf_counter() - start):,.0f} tokens/s")

        if isinstance(data, ImageSet):
            per_image = data.tokens
            images = data.heldout_batches(config.rows)
            fidelity = image_fidelity(models, teacher.model, images, tick=lambda count: tick(per_image * count))
            rows: dict[str, dict[str, Any]] = {name: {"images": measures} for name, measures in fidelity.items()}
        else:
            rows = _on_text(models, teacher, data, config, tick)
    for name, row in rows.items():
        plan = plan_of(teacher.model if name == "teacher" else models[name])
        if isinstance(data, Corpus):
            row["cache_bytes"] = cache_table(plan, config.cache_contexts, dtype)
        row |= {"attention_layers": plan.attention_layers, "plan_pattern": plan.pattern()}
    metrics: dict[str, Any] = {**rows}
    if isinstance(data, Corpus):
        prompts, length = config.prompts, config.max_new_tokens
        metrics["samples"] = paired_samples(teacher.model, models["student"], teacher.tokenizer, prompts, length)
    return metrics


def _on_text(
    models: Mapping[str, Any], teacher: Teacher, corpus: Corpus, config: EvaluateConfig, tick: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Likelihood, retrieval and tasks."""
    rows, probes = questions(config, teacher, corpus)
    all_models = {"teacher": teacher.model, **models}
    likelihoods = likelihood(models, teacher.model, rows, config.contexts, tick=tick)
    scores = {name: retrieval(model, probes, tick) for name, model in all_models.items()}
    tasks = load_tasks(config.tasks)
    return {
        name: {
            **likelihoods[name],
            "retrieval": scores[name],
            "tasks": harness(model, teacher.tokenizer, tasks, limit=config.task_limit),
        }
        for name, model in all_models.items()
    }


def check_heldout(config: EvaluateConfig, teacher: Teacher, data: Corpus | ImageSet) -> None:
    """Raises UserError where there is less held-out data than `config` asks for."""
    if isinstance(data, ImageSet):
        data.heldout_batches(config.rows)
    else:
        questions(config, teacher, data)


def questions(
    config: EvaluateConfig, teacher: Teacher, corpus: Corpus
) -> tuple[torch.Tensor, dict[str, dict[int, Probe]]]:
    """The held-out rows, and the retrieval probes in text of the same kind."""
    longest = max(config.contexts)
    rows = corpus.heldout_batch(config.rows, longest)
    probes: dict[str, dict[int, Probe]] = {
        task: {
            context: make_probe(task, teacher.tokenizer, context, config.retrieval.count, haystack_ids=rows.flatten())
            for context in config.retrieval.contexts
        }
        for task in config.retrieval.tasks
    }
    return rows, probes


def evaluation_cost(config: EvaluateConfig, models: int, data: Corpus | ImageSet) -> TokenCost:
    """Cost of measuring `models` models, the teacher included, on held-out data and retrieval (not on tasks)."""
    if isinstance(data, ImageSet):
        return TokenCost(forward_tokens=models * config.rows * data.tokens)
    probes = len(config.retrieval.tasks) * config.retrieval.count * sum(config.retrieval.contexts)
    return TokenCost(forward_tokens=models * (config.rows * max(config.contexts) + probes))
