"""Baselines of a student (a window of the same cache bytes, and even placement), and verdicts against them."""

import math
from collections.abc import Collection
from operator import methodcaller
from statistics import fmean
from typing import Any, NamedTuple

from subquad.evaluate import paired_gain
from subquad.mixers.sliding_window import WindowOptions
from subquad.model.tasks import TASKS
from subquad.plan import ATTENTION, ITEMSIZE, Plan
from subquad.recipes.schema import Recipe
from subquad.select import uniform_layers
from subquad.select.budget import kept_layers, largest_within


def window_plan(plan: Plan, dtype: str) -> Plan:
    """Training-free baseline: sliding windows with sinks in place of the mixers, within the plan's cache bytes."""
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


def even_plan(plan: Plan, mixer: str, options: dict[str, Any], dtype: str, kept: Collection[int] = ()) -> Plan:
    """Baseline without measurements: evenly spaced whole layers, as many as fit into the cache bytes of `plan`.

    The layers `kept` attend beside them.
    """
    context = 2**15  # at which keys and values take more bytes than states
    open_layers = [layer for layer in range(plan.num_layers) if layer not in kept]

    def plan_of(count: int) -> Plan:
        spaced_layers = [open_layers[index] for index in uniform_layers(len(open_layers), count)]
        return Plan.by_layer(plan.shapes, [*kept, *spaced_layers], mixer, options)

    cost = methodcaller("cache_bytes", context, dtype=dtype)
    return plan_of(largest_within(len(open_layers), plan_of, cost, cost(plan)) or 0)


class Baseline(NamedTuple):
    """Plan of a baseline; `aligned`: whether it takes the mixers of the aligned all-linear students."""

    plan: Plan
    aligned: bool


def baseline_plans(recipe: Recipe, plan: Plan) -> dict[str, Baseline]:
    """Baselines of a student with this plan, by name.

    They use the teacher's weights, so a student with a model of its own has none. An image encoder has no cache whose
    bytes a window could have.
    """
    if recipe.student is not None:
        return {}
    kept = kept_layers(recipe.selector, plan.shapes, plan)
    uniform_plan = even_plan(plan, recipe.mixer.name, recipe.mixer.options, recipe.dtype, kept)
    baselines = {}
    if any(stage.scope == "all-linear" for stage in recipe.stages):
        baselines["aligned"] = Baseline(plan, aligned=True)
    if uniform_plan.layers != plan.layers:
        baselines["uniform"] = Baseline(uniform_plan, aligned=True)
    baselines["untrained"] = Baseline(plan, aligned=False)
    if not TASKS[recipe.task].of_images:
        baselines["window"] = Baseline(window_plan(plan, recipe.dtype), aligned=False)
    return baselines


def verdicts(metrics: dict[str, Any], contexts: list[int]) -> list[str]:
    """Sentences on whether the student beats each baseline: in held-out KL at the two longest contexts, or on images.

    The models read the same data, so the differences are paired, row by row, and compared with their standard error.
    """
    sentences = []
    for better, worse, comparison in (
        ("aligned", "uniform", "the selected plan against the uniform one, both aligned"),
        ("student", "untrained", "training against none"),
        ("student", "window", "the student against a training-free window of the same cache bytes"),
    ):
        if better not in metrics or worse not in metrics:
            continue
        for setting, unit, measure, samples, baseline_samples in _samples(metrics[better], metrics[worse], contexts):
            gain = paired_gain(samples, baseline_samples)
            if not math.isfinite(gain.mean):
                sentences.append(f"{comparison}: undecided {setting}, as a {measure} is not finite")
                continue
            outcome = "tied" if gain.mean == 0 else "won" if gain.mean > 0 else "LOST"
            caveat = ", which may be chance" if gain.may_be_chance else ""
            sentences.append(
                f"{comparison}: {outcome} {setting} by {abs(gain.mean):.4f} ± {gain.stderr:.4f}{unit}, "
                f"{measure} {fmean(samples):.4f} against {fmean(baseline_samples):.4f}{caveat}"
            )
    return sentences


def _samples(
    better: dict[str, Any], worse: dict[str, Any], contexts: list[int]
) -> list[tuple[str, str, str, list[float], list[float]]]:
    """Setting, unit, measure, and the samples of both models, for each comparison of two models."""
    if "images" in better:
        fidelity, baseline_fidelity = better["images"], worse.get("images", {})
        if "samples" not in fidelity or "samples" not in baseline_fidelity:
            return []
        unit, measure = (" nats", "KL") if "kl" in fidelity else ("", "distance of features")
        setting = f"on {fidelity['count']:,} images"
        return [(setting, unit, measure, fidelity["samples"], baseline_fidelity["samples"])]
    tables = better.get("kl_samples", {}), worse.get("kl_samples", {})
    return [
        (f"at {context} tokens", " nats", "KL", *(table[context] for table in tables))
        for context in sorted(contexts)[-2:]
        if all(context in table for table in tables)
    ]
