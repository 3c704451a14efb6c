"""Measurements: in turns, in rounds, in processes of their own.

Legend: B batch, H heads, T time, D width of keys and values, C time within a chunk.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops.contenders import COMPILED, MODES, Contender, Settings, make_inputs, useful_flops
from subquad.utils import timing
from subquad.utils.memory import held_bytes, peak_memory_bytes, reset_peak_memory
from subquad.utils.timing import take_turns

GROWTH_STEPS = 1000
MATMUL = "matmul"


class Spread(NamedTuple):
    """Median, minimum and maximum of measurements."""

    median: float
    low: float
    high: float


def spread(samples: Iterable[float]) -> Spread:
    """Median, minimum and maximum."""
    ordered = sorted(samples)
    return Spread(median(ordered), ordered[0], ordered[-1])


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The quotients of two contenders' times, round by round."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def expected_seconds(known: Mapping[int, float], length: int) -> float:
    """Seconds at another length by the power law through the last two, at least linear; 0 where nothing is known."""
    if not known:
        return 0.0
    *before, (last, seconds) = sorted(known.items())
    power = 1.0
    if before:
        shorter, faster = before[-1]
        power = max(1.0, math.log(seconds / faster) / math.log(last / shorter))
    return seconds * (length / last) ** power


def race(calls: Mapping[str, Callable[[], Any]], rounds: tuple[int, int], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call in every round, in an order shuffled anew each time; see `take_turns`."""
    timed = {name: functools.partial(seconds_of, call) for name, call in calls.items()}
    results = take_turns(timed, rounds, seconds, shuffle=True)
    return {name: [result[name] for result in results] for name in calls}


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, all work on a GPU included."""
    return timing.seconds_of(call, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def prepared(contender: Contender, inputs: Mapping[str, Tensor], mode: str) -> Callable[[], Any]:
    """A call without arguments that is all of `mode` and nothing else."""
    gradients = mode == "forward+backward"
    arguments = contender.arguments(inputs, gradients=gradients)
    grad = contender.laid_out(inputs["v"])  # any values that are not all alike

    def forward() -> Tensor:
        with torch.no_grad():
            return contender.call(*arguments)[0]

    def forward_backward() -> Sequence[Tensor]:
        return torch.autograd.grad(contender.call(*arguments)[0], arguments, grad)

    return forward_backward if gradients else forward


def matrix_product(settings: Settings) -> Callable[[], Any]:
    """A square matrix product, whose speed is the machine's limit."""
    n, dtype = settings.matmul, getattr(torch, settings.dtype)
    left, right, out = (torch.randn(n, n, device=settings.device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def measure_times(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a length, mode and contender; `seconds` is None where the call was expected to take too long."""
    rows = []
    known: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for length in settings.lengths:
        inputs = make_inputs(settings, length)
        for mode in MODES:
            say(f"{mode} of {length} tokens")
            expected = {c.name: expected_seconds(known[c.name, mode], length) for c in contenders}
            calls = {c.name: prepared(c, inputs, mode) for c in contenders if expected[c.name] <= settings.limit}
            calls[MATMUL] = matrix_product(settings)
            for name, call in calls.items():
                if expected.get(name, 0.0) < 1.0:  # the first touch of memory weighs little in a longer one
                    call()
            samples = race(calls, settings.rounds, settings.seconds)
            peak = 2 * settings.matmul**3 / median(samples[MATMUL])
            rows.append({"contender": MATMUL, "mode": mode, "length": length, "flops_per_second": peak})
            rows[-1] |= {**_timed(samples[MATMUL]), "samples": samples[MATMUL]}
            for c in contenders:
                row = {"contender": c.name, "mode": mode, "length": length}
                if c.name not in calls:
                    rows.append({**row, "seconds": None, "expected_seconds": expected[c.name]})
                    continue
                known[c.name, mode][length] = min(samples[c.name])
                flops = settings.batch * settings.heads * useful_flops(c.rule, length, settings.width)
                flops *= 3 if mode == "forward+backward" else 1
                share = flops / median(samples[c.name]) / peak
                row |= {**_timed(samples[c.name]), "samples": samples[c.name]}
                rows.append({**row, "useful_flops": flops, "share_of_matmul": share})
    return rows


def _timed(samples: Sequence[float]) -> dict[str, Any]:
    middle, low, high = spread(samples)
    return {"seconds": middle, "low": low, "high": high}


def compare(rows: Sequence[dict], contenders: Sequence[Contender]) -> list[dict]:
    """Speed-up of each of ours over attention and over the rivals of its rule."""
    samples = {(row["contender"], row["mode"], row["length"]): row.get("samples") for row in rows}
    comparisons = []
    for (name, mode, length), our_samples in samples.items():
        ours = next((c for c in contenders if c.name == name and c.ours), None)
        for rival in contenders:
            rival_samples = samples.get((rival.name, mode, length))
            if (
                ours is None
                or rival.ours
                or rival.rule not in (ours.rule, "softmax")
                or not our_samples
                or not rival_samples
            ):
                continue
            times = ratio(rival_samples, our_samples)._asdict()
            comparisons.append(
                {"contender": name, "rival": rival.name, "mode": mode, "length": length, "faster": times}
            )
    return comparisons


@torch.no_grad()
def agreement(settings: Settings, contenders: Sequence[Contender]) -> dict[str, float]:
    """Distance of each rival's result from ours of the same rule: the largest difference over the largest value."""
    inputs = make_inputs(settings, min(settings.lengths))
    results = {c.name: c.laid_out(c.call(*c.arguments(inputs))[0]).float() for c in contenders}
    return {
        rival.name: float((results[rival.name] - results[c.name]).abs().max() / results[c.name].abs().max())
        for rival in contenders
        for c in contenders
        if c.ours and not rival.ours and c.rule == rival.rule
    }


@torch.no_grad()
def measure_decode(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a recurrence and batch: a step early and late in a sequence, compared with copying the state once."""
    rows = []
    for c in contenders:
        if c.step is None:
            continue
        say(f"decoding: {c.label}")
        states = {position: state_after(c, position, settings) for position in settings.positions}
        for batch in settings.batches:
            arguments = c.arguments(make_inputs(settings, 1, batch=batch))
            grown = {position: state.repeat(batch, 1, 1, 1) for position, state in states.items()}
            state = grown[max(grown)]
            calls: dict[str, Callable[[], Any]]
            calls = {str(position): functools.partial(c.step, *arguments, grown[position]) for position in grown}
            calls["copy"] = functools.partial(torch.empty_like(state).copy_, state)
            race(calls, (10, 10), 0)
            samples = race(calls, (settings.step_rounds, settings.step_rounds), 0)
            rows.append(
                {
                    "contender": c.name,
                    "batch": batch,
                    "state_bytes": state.untyped_storage().nbytes(),
                    "step": {position: _timed(samples[str(position)]) for position in grown},
                    "copy": _timed(samples["copy"]),
                    "step_over_copy": ratio(samples[str(max(grown))], samples["copy"])._asdict(),
                    "late_over_early": ratio(samples[str(max(grown))], samples[str(min(grown))])._asdict(),
                }
            )
    return rows


def state_after(contender: Contender, tokens: int, settings: Settings, piece: int = 4096) -> Tensor:
    """State (1, H, D, D) after `tokens` tokens, by the chunk form, piece by piece."""
    state = None
    for start in range(0, tokens, piece):
        inputs = make_inputs(settings, min(piece, tokens - start), batch=1, seed=start)
        _, state = contender.call(*contender.arguments(inputs), state)
    assert state is not None
    return state


def measure_memory(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """One row a contender, measured by `measure_one_memory` in a process of its own."""
    # Blocks that are freed must go back to the system, or what is allocated after them stays unseen
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for c in contenders:
        say(f"memory: {c.label}")
        job = json.dumps({"contender": c.name, "settings": asdict(settings)})
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.ops", "--memory-of", job],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        row = {"contender": c.name, "length": settings.memory_length}
        failed = {"failed": f"exit status {process.returncode}"}
        rows.append(row | (failed if process.returncode else json.loads(process.stdout.splitlines()[-1])))
    return rows


def measure_one_memory(contender: Contender, settings: Settings) -> dict[str, Any]:
    """Growth of the memory of this process: after 1000 steps, and at the peak of forward and backward."""
    prepared(contender, make_inputs(settings, 128), "forward+backward")()  # libraries and threads allocate once
    growth = growth_in_steps(contender, settings) if contender.step else {}
    call = prepared(contender, make_inputs(settings, settings.memory_length), "forward+backward")
    device = torch.device(settings.device)
    reset_peak_memory(device)
    before = held_bytes(device)
    call()
    return {"peak_bytes": max(0, peak_memory_bytes(device) - before), **growth}  # the system rounds both


@torch.no_grad()
def growth_in_steps(contender: Contender, settings: Settings) -> dict[str, int]:
    """Bytes that 1000 steps in a row add to the state, and to the memory of the process."""
    assert contender.step is not None
    arguments, state = contender.arguments(make_inputs(settings, 1)), state_after(contender, 10, settings)
    state = state.repeat(settings.batch, 1, 1, 1)
    sizes = []
    for _ in range(2):  # a first time, for what is allocated once
        for _ in range(GROWTH_STEPS):
            _, state = contender.step(*arguments, state)
        sizes.append((state.untyped_storage().nbytes(), held_bytes(torch.device(settings.device))))
    (state_before, held_before), (state_bytes, held) = sizes
    return {"state_growth_bytes": state_bytes - state_before, "process_growth_bytes": held - held_before}


def measure_compile(settings: Settings, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[dict]:
    """Two chunk forms as they are and under torch.compile; a row has the reason where it fails."""
    rows = []
    inputs = make_inputs(settings, settings.compile_length)
    for c in (c for c in contenders if c.name in COMPILED):
        for mode in MODES:
            say(f"torch.compile: {c.label}, {mode}")
            row: dict[str, Any] = {"contender": c.name, "mode": mode, "length": settings.compile_length}
            eager = prepared(c, inputs, mode)
            fast = prepared(replace(c, call=torch.compile(c.call, dynamic=False)), inputs, mode)
            eager()
            try:
                row["compile_seconds"] = seconds_of(fast)
            except Exception as error:  # torch.compile fails in many ways, none of which is ours to handle
                rows.append({**row, "failed": f"torch.compile failed: {type(error).__name__}"})
                continue
            samples = race({"eager": eager, "compiled": fast}, settings.rounds, settings.seconds)
            times = {name: _timed(seconds) for name, seconds in samples.items()}
            faster = ratio(samples["eager"], samples["compiled"])._asdict()
            rows.append({**row, **times, "faster": faster})
    return rows
