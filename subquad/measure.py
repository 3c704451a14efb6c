"""What a conversion is measured by: held-out text or images, retrieval, tasks, cache bytes, rivals of the same budget.

Every number of metrics.json's rows is made here, and in the same pass for all models.
"""

import time
from collections.abc import Callable, Mapping
from operator import methodcaller
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from subquad.data.images import ImageSet
from subquad.data.probes import Probe, make_probe
from subquad.data.text import Corpus
from subquad.evaluate import cache_table, harness, likelihood, likeness, paired_gain, retrieval
from subquad.evaluate.harness import load_tasks
from subquad.mixers.sliding_window import WindowOptions
from subquad.plan import ATTENTION, ITEMSIZE, Plan
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import EvaluateConfig
from subquad.select import Bill, uniform_layers
from subquad.select.budget import largest_within
from subquad.utils.progress import StageProgress


def measured_rows(
    models: Mapping[str, Any],
    source: Teacher,
    data: Corpus | ImageSet,
    plans: Mapping[str, Plan],
    config: EvaluateConfig,
    dtype: str,
    console: Console | None = None,
) -> dict[str, Any]:
    """Rows of metrics.json for the teacher and for `models`; `plans` gives the plan of each, the teacher's included.

    Progress is shown on `console`, if there is one.
    """
    total, done, start = round(evaluation_bill(config, 1 + len(models), data).forward_tokens), 0, time.perf_counter()
    with StageProgress(console, "measure", steps=total, unit="token") as bar:

        def tick(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(done, f"{done / (time.perf_counter() - start):,.0f} tokens/s")

        if isinstance(data, ImageSet):
            per_image = data.tokens
            images = data.heldout_batches(config.rows)
            found = likeness(models, source.model, images, tick=lambda count: tick(per_image * count))
            rows: dict[str, dict[str, Any]] = {name: {"images": measures} for name, measures in found.items()}
        else:
            rows = _on_text(models, source, data, config, tick)
    for name, row in rows.items():
        if isinstance(data, Corpus):
            row["cache_bytes"] = cache_table(plans[name], config.cache_contexts, dtype)
        row |= {"attention_layers": plans[name].attention_layers, "plan_pattern": plans[name].pattern()}
    return rows


def _on_text(
    models: Mapping[str, Any], source: Teacher, corpus: Corpus, config: EvaluateConfig, tick: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Likelihood, retrieval and tasks."""
    rows, probes = questions(config, source, corpus)
    everyone = {"teacher": source.model, **models}
    measured = likelihood(models, source.model, rows, config.contexts, tick=tick)
    found = {name: retrieval(model, probes, tick) for name, model in everyone.items()}
    tasks = load_tasks(config.tasks)
    return {
        name: {
            **measured[name],
            "retrieval": found[name],
            "tasks": harness(model, source.tokenizer, tasks, limit=config.task_limit),
        }
        for name, model in everyone.items()
    }


def check_heldout(config: EvaluateConfig, source: Teacher, data: Corpus | ImageSet) -> None:
    """Raises UserError where there is less held-out data than is to be measured on."""
    if isinstance(data, ImageSet):
        data.heldout_batches(config.rows)
    else:
        questions(config, source, data)


def questions(
    config: EvaluateConfig, source: Teacher, corpus: Corpus
) -> tuple[torch.Tensor, dict[str, dict[int, Probe]]]:
    """The held-out rows, and the retrieval probes in text of the same kind."""
    longest = max(config.contexts)
    rows = corpus.heldout_batch(config.rows, longest)
    probes: dict[str, dict[int, Probe]] = {
        task: {
            context: make_probe(task, source.tokenizer, context, config.retrieval.count, haystack_ids=rows.flatten())
            for context in config.retrieval.contexts
        }
        for task in config.retrieval.tasks
    }
    return rows, probes


def evaluation_bill(config: EvaluateConfig, models: int, data: Corpus | ImageSet) -> Bill:
    """What measuring that many models, the teacher among them, costs on held-out data and retrieval (not on tasks)."""
    if isinstance(data, ImageSet):
        return Bill(forward_tokens=models * config.rows * data.tokens)
    probes = len(config.retrieval.tasks) * config.retrieval.count * sum(config.retrieval.contexts)
    return Bill(forward_tokens=models * (config.rows * max(config.contexts) + probes))


def window_plan(plan: Plan, dtype: str) -> Plan:
    """The training-free rival: sliding windows with sinks for the plan's mixers, at its cache bytes or just under."""
    sinks = WindowOptions().sinks

    def windows(window: int) -> Plan:
        options = {"window": window, "sinks": sinks}
        return Plan.by_head(plan.shapes, plan.attention_heads, "sliding_window", options)

    per_token = sum(
        2 * group.states(share=True) * group.head_dim * ITEMSIZE[dtype]
        for layer in range(plan.num_layers)
        for name, group in windows(1).groups(layer).items()
        if name != ATTENTION
    )
    if per_token == 0:
        return plan
    window = max(1, plan.cache_bytes(0, dtype=dtype) // per_token - sinks + 1)
    return windows(window)


def even_plan(plan: Plan, mixer: str, options: dict[str, Any], dtype: str) -> Plan:
    """The rival that measures nothing: evenly spaced whole layers, as many as cost no more cache than `plan`."""
    context = 2**15  # where keys and values outweigh states

    def plan_of(count: int) -> Plan:
        return Plan.by_layer(plan.shapes, uniform_layers(plan.num_layers, count), mixer, options)

    cost = methodcaller("cache_bytes", context, dtype=dtype)
    return plan_of(largest_within(plan.num_layers, plan_of, cost, cost(plan)) or 0)


def verdicts(metrics: dict[str, Any], contexts: list[int]) -> list[str]:
    """In words, whether the student beats each rival: in held-out KL at the two longest contexts, or on images.

    The models read the same data, so it is the differences, row by row, that have to stand out of their own spread.
    """
    said = []
    for better, worse, what in (
        ("aligned", "uniform", "the selected plan against the uniform one, both aligned"),
        ("student", "untrained", "training against none"),
        ("student", "window", "the student against a training-free window of the same cache bytes"),
    ):
        if better not in metrics or worse not in metrics:
            continue
        for where, unit, measure, mine, theirs in _samples(metrics[better], metrics[worse], contexts):
            gain = paired_gain(mine, theirs)
            word = "tied" if gain.mean == 0 else "won" if gain.mean > 0 else "LOST"
            doubt = ", which may be chance" if gain.may_be_chance else ""
            said.append(
                f"{what}: {word} {where} by {abs(gain.mean):.4f} ± {gain.stderr:.4f}{unit}, "
                f"{measure} {fmean(mine):.4f} against {fmean(theirs):.4f}{doubt}"
            )
    return said


def _samples(
    better: dict[str, Any], worse: dict[str, Any], contexts: list[int]
) -> list[tuple[str, str, str, list[float], list[float]]]:
    """Where, the unit and the measure of what two models are compared by, and its samples."""
    if "images" in better:
        mine, theirs = better["images"], worse["images"]
        unit, measure = (" nats", "KL") if "kl" in mine else ("", "distance of features")
        where = f"on {mine['count']:,} images"
        return [(where, unit, measure, mine["samples"], theirs["samples"])] if "samples" in mine else []
    pairs = [(better["kl_samples"][context], worse["kl_samples"][context]) for context in sorted(contexts)[-2:]]
    return [
        (f"at {context} tokens", " nats", "KL", *pair)
        for context, pair in zip(sorted(contexts)[-2:], pairs, strict=True)
    ]
