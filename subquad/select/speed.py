"""The decoding speed of a plan, estimated from two students: one with attention everywhere, one without attention.

A plan only changes the mixing of the layers in a decoding step: the keys and values that attention reads, or the states
of another mixer. So the mixing is timed, layer by layer, in both students in turns. Everything else (projections, MLPs,
the output head) is the rest, equal for all plans. The estimate is the rest and the mixing of each layer; if only some
heads attend, attention counts by the share of key/value heads in use, and the mixer as a whole.

It is an estimate: a layer with both parts also splits and joins its heads, small parts take more than their share of
the time, and timing the parts on a GPU makes them wait for each other. Measure the student itself before quoting a
speed.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Cache

from subquad.model.random_cache import random_cache
from subquad.model.student import Student
from subquad.plan import ATTENTION, Plan
from subquad.utils.timing import clock, take_turns


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of a decoding step of one sequence: mixing of each layer, by attention and by the mixer, and the rest."""

    attention: list[float]
    mixer: list[float]
    rest: float

    def __call__(self, plan: Plan) -> float:
        """The estimate for a plan over the same mixer."""
        return self.rest + sum(self._mixing(plan, layer) for layer in range(plan.num_layers))

    def _mixing(self, plan: Plan, layer: int) -> float:
        groups = plan.groups(layer)
        attention = groups.pop(ATTENTION, None)
        share = 0.0 if attention is None else len(attention.kv_heads) / plan.shapes[layer].kv_heads
        return share * self.attention[layer] + (self.mixer[layer] if groups else 0.0)


def decode_cost(attention: Student, linear: Student, context: int, steps: int = 8) -> DecodeCost:
    """Times decoding after `context` tokens in a student with attention everywhere and in one without attention."""
    (attention_L, attention_rest), (linear_L, linear_rest) = _in_turns([attention, linear], context, steps)
    return DecodeCost(attention_L, linear_L, (attention_rest + linear_rest) / 2)


def layer_seconds(student: Student, context: int, steps: int = 8) -> tuple[list[float], float]:
    """Seconds of each layer's mixing in a decoding step after `context` tokens, and of the rest of the step."""
    return _in_turns([student], context, steps)[0]


@torch.no_grad()
def _in_turns(students: Sequence[Student], context: int, steps: int) -> list[tuple[list[float], float]]:
    """Medians over `steps` steps of each student; they take turns, so that the machine's state affects all equally."""
    calls = {
        str(index): partial(_step, student, random_cache(student, context)) for index, student in enumerate(students)
    }
    _, *rounds = take_turns(calls, (1 + steps, 1 + steps))  # the first round is a warm-up
    medians = [
        [statistics.median(part) for part in zip(*(results[name] for results in rounds), strict=True)] for name in calls
    ]
    return [(mixing, rest) for *mixing, rest in medians]


def _step(student: Student, cache: Cache) -> list[float]:
    """Seconds of each layer's mixing in one step, and of the rest of it."""
    mixing = [0.0] * student.plan.num_layers

    def start(layer: int, *_: Any) -> None:
        mixing[layer] -= clock(student.device)

    def stop(layer: int, *_: Any) -> None:
        mixing[layer] += clock(student.device)

    hooks = []
    for layer in range(student.plan.num_layers):
        for mixer in student.mixers(layer).values():
            hooks += [mixer.register_forward_pre_hook(partial(start, layer))]
            hooks += [mixer.register_forward_hook(partial(stop, layer))]
    try:
        started = clock(student.device)
        student(torch.ones(1, 1, dtype=torch.long, device=student.device), past_key_values=cache, use_cache=True)
        return [*mixing, clock(student.device) - started - sum(mixing)]
    finally:
        for hook in hooks:
            hook.remove()
