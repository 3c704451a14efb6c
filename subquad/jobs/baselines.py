"""Baselines that a student has to beat, a window of the same cache bytes and even placement, and the verdicts."""

from operator import methodcaller
from statistics import fmean
from typing import Any

from subquad.evaluate import paired_gain
from subquad.mixers.sliding_window import WindowOptions
from subquad.plan import ATTENTION, ITEMSIZE, Plan
from subquad.select import uniform_layers
from subquad.select.budget import largest_within


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
