"""Clocks that wait for the device, and comparisons in turns."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def clock(device: torch.device) -> float:
    """Seconds on a clock, read once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, all work on the device included."""
    start = clock(device)
    call()
    return clock(device) - start


def take_turns(
    calls: Mapping[str, Callable[[], Result]],
    rounds: tuple[int, int],
    seconds: float = 0.0,
    *,
    shuffle: bool = False,
) -> list[dict[str, Result]]:
    """Results by name of calls that take turns: a dictionary a round, in the order of the turns.

    So the calls share the machine's better and worse moments, and can be compared within a round. Every other round is
    in reverse; with `shuffle`, every round has a random order of its own, the same in every run. `rounds`: the least
    and the most; after `seconds` there are no more than the least.
    """
    least, most = rounds
    results: list[dict[str, Result]] = []
    started = time.perf_counter()
    while len(results) < most and (len(results) < least or time.perf_counter() - started < seconds):
        number = len(results)
        order = [*calls] if number % 2 == 0 else [*calls][::-1]
        if shuffle:
            order = random.Random(number).sample([*calls], len(calls))
        results.append({name: calls[name]() for name in order})
    return results
