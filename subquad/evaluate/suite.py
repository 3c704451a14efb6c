"""All measures of a conversion: held-out text or images, retrieval, tasks and cache bytes.

Every number in the rows of metrics.json is made here, in the same pass for all models.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console

from subquad.data.images import ImageSet
from subquad.data.probes import Probe, make_probe
from subquad.data.text import Corpus
from subquad.evaluate import cache_table, harness, image_fidelity, likelihood, paired_samples, retrieval
from subquad.evaluate.attempts import Attempts
from subquad.evaluate.harness import load_tasks, task_name
from subquad.evaluate.likelihood import MEASURES, check_rows
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
    there is one. A measurement that fails leaves a sentence in `unmeasured`, and loses no other; so do numbers that are
    not finite. Raises UserError for too little data, and models that do not share a vocabulary, before anything is
    measured; and the first error if every measurement fails.
    """
    total, done, start = round(evaluation_cost(config, 1 + len(models), data).forward_tokens), 0, time.perf_counter()
    attempts = Attempts()
    with StageProgress(console, "measure", steps=total, unit="token") as bar:

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(done, f"{done / (time.perf_counter() - start):,.0f} tokens/s")

        if isinstance(data, ImageSet):
            rows = _on_images(models, teacher, data, config, tick, attempts)
        else:
            rows = _on_text(models, teacher, data, config, tick, attempts)
    for name, row in rows.items():
        plan = plan_of(teacher.model if name == "teacher" else models[name])
        if isinstance(data, Corpus):
            row["cache_bytes"] = cache_table(plan, config.cache_contexts, dtype)
        row |= {"attention_layers": plan.attention_layers, "plan_pattern": plan.pattern()}
    metrics: dict[str, Any] = {**rows}
    if isinstance(data, Corpus):
        pair = teacher.model, models["student"], teacher.tokenizer
        write = partial(paired_samples, *pair, config.prompts, config.max_new_tokens)
        metrics |= {"samples": []} | attempts.run("samples", lambda: {"samples": write()})
    attempts.check_one_succeeded()
    metrics["unmeasured"] = [*attempts.failures, *_not_finite(rows)]
    return metrics


def _on_text(
    models: Mapping[str, Any],
    teacher: Teacher,
    corpus: Corpus,
    config: EvaluateConfig,
    tick: Callable[[int], None],
    attempts: Attempts,
) -> dict[str, dict[str, Any]]:
    """Likelihood, retrieval and tasks."""
    # What can be refused is refused first
    rows, probes = questions(config, teacher, corpus)
    all_models = {"teacher": teacher.model, **models}
    check_rows(all_models, rows, config.contexts)
    tasks = load_tasks(config.tasks)

    # Held-out text
    def on_rows(some: Mapping[str, Any]) -> dict[str, Any]:
        return likelihood(some, teacher.model, rows, config.contexts, tick=tick)

    result = attempts.run_together("held-out text", models, on_rows)

    # Retrieval and tasks
    for name, model in all_models.items():
        scores: dict[str, dict[int, Any]] = {}
        for task, by_context in probes.items():
            scores[task] = {}
            for context, probe in by_context.items():
                ask = partial(retrieval, model, {task: {context: probe}}, tick)
                scores[task] |= attempts.run(f"{name}: retrieval of {task} at {context} tokens", ask).get(task, {})
        result[name] |= {"retrieval": scores, "tasks": {}}
        for task in tasks:
            measure = partial(harness, model, teacher.tokenizer, [task], limit=config.task_limit)
            result[name]["tasks"] |= attempts.run(f"{name}: the task {task_name(task)}", measure)
    return result


def _on_images(
    models: Mapping[str, Any],
    teacher: Teacher,
    images: ImageSet,
    config: EvaluateConfig,
    tick: Callable[[int], None],
    attempts: Attempts,
) -> dict[str, dict[str, Any]]:
    """Fidelity to the teacher on held-out images."""
    check_heldout(config, teacher, images)

    def on_images(some: Mapping[str, Any]) -> dict[str, Any]:
        batches = images.heldout_batches(config.rows)
        fidelity = image_fidelity(some, teacher.model, batches, tick=lambda count: tick(images.tokens * count))
        return {name: {"images": measures} for name, measures in fidelity.items()}

    return attempts.run_together("held-out images", models, on_images)


def _not_finite(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each model with measures that are not finite."""
    sentences = []
    for name, row in rows.items():
        numbers = {
            **{f"{measure} at {c}": value for measure in MEASURES for c, value in row.get(measure, {}).items()},
            **{key: value for key, value in row.get("images", {}).items() if isinstance(value, float)},
        }
        if bad := [measure for measure, value in numbers.items() if not math.isfinite(value)]:
            some = f"{bad[0]} and {len(bad) - 1} more numbers are" if len(bad) > 1 else f"{bad[0]} is"
            sentences.append(f"{name}: {some} not finite: its logits are no numbers, or forbid a token of the text")
    return sentences


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
