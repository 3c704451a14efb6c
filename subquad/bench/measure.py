"""Speed and memory of a model compared with its teacher, over context and batch size.

Notable:
- Three kinds of work are timed: `decode` (steps on a cache of random numbers, see random_cache.py), `prefill` (a pass
  over the whole prompt) and `generate` (transformers' own loop: the time to the first token, and to each later one).
- The models take turns (`take_turns`), so that they share the machine's better and worse moments. A round before the
  first warms up and is where memory is read; it is not counted.
- Contexts are measured from the shortest on, as far as the time and the memory allow, but the two shortest in any case.
  All others are extrapolated (extrapolate.py) and marked so.
- A cell of the report has the median and the quartiles of its rounds, and the roofline (roofline.py) to compare with.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subquad.bench.extrapolate import (
    Curve,
    Forecast,
    Point,
    Spread,
    expected,
    fit,
    forecast,
    forecast_beside,
    overtaking,
    spread,
)
from subquad.bench.models import BenchModel, max_positions, open_subjects, within_positions
from subquad.bench.roofline import Roof, measure_roof
from subquad.bench.turns import KINDS, NEW_TOKENS, STEPS, Turn
from subquad.errors import UserError
from subquad.evaluate import held_cache_bytes
from subquad.utils.environment import environment
from subquad.utils.logging import quiet
from subquad.utils.memory import available_bytes, held_bytes, peak_memory_bytes, release_free_memory, reset_peak_memory
from subquad.utils.timing import take_turns

CONTEXTS = tuple(1024 << power for power in range(8))
ROUNDS = (3, 15)  # at least and at most
ALWAYS = 2  # contexts, the shortest, that are measured whatever they take
MEASURES = ("decode", "prefill", "first_token", "generate")
AS_PREFILL = ("prefill", "first_token")  # those that read the whole prompt; the others write a token


@dataclass
class Cell:
    """Measurements of all models for one kind of work, at one context and batch size."""

    order: list[list[str]]  # the models, round by round, as they took their turns
    samples: dict[tuple[str, str], list[float]]  # seconds by model and measure, one a round
    peak: dict[str, int]  # bytes that each model's weights, cache and pass took at once
    held: dict[str, int]  # bytes that its cache really keeps, where it read the whole context


@torch.no_grad()
def measure(
    kind: str,
    subjects: Sequence[BenchModel],
    contexts: Sequence[int],
    batch: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[int, Cell], str]:
    """The cells that fit into the time and the memory, by context, and what the next would not have fitted into."""
    ends = time.perf_counter() + seconds
    cells: dict[int, Cell] = {}
    costs: dict[int, float] = {}  # seconds that the least number of rounds takes
    for context in sorted(contexts):
        if len(cells) >= ALWAYS and time.perf_counter() + expected(costs, context) > ends:
            return cells, "time"
        if needed_bytes(kind, subjects, cells, context, batch) > 0.9 * available_bytes(subjects[0].model.device):
            return cells, "memory"
        say(f"{kind} at {context:,} tokens, batch {batch}")
        try:
            cells[context], costs[context] = measure_cell(kind, subjects, context, batch, seconds / 10, seed)
        except torch.OutOfMemoryError:
            return cells, "memory"
    return cells, ""


def measure_cell(
    kind: str, subjects: Sequence[BenchModel], context: int, batch: int, seconds: float, seed: int
) -> tuple[Cell, float]:
    """One cell, with more than the least number of rounds while there are `seconds`; and what that number takes."""
    started = time.perf_counter()
    turns = prepared(kind, subjects, context, batch, seed)
    peak, held = warmed_up(kind, subjects, turns, context, batch)
    ready = time.perf_counter()
    order, samples = race(turns, ROUNDS, seconds)
    least = ready - started + ROUNDS[0] * (time.perf_counter() - ready) / len(order)
    return Cell(order, samples, peak, held), least


def prepared(kind: str, subjects: Sequence[BenchModel], context: int, batch: int, seed: int) -> dict[str, Turn]:
    """A turn for each model, on the same random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(subjects[0].vocabulary, (batch, context), generator=generator)
    tokens_BT = tokens_BT.to(subjects[0].model.device)
    return {subject.name: KINDS[kind](subject, tokens_BT) for subject in subjects}


def warmed_up(
    kind: str, subjects: Sequence[BenchModel], turns: Mapping[str, Turn], context: int, batch: int
) -> tuple[dict[str, int], dict[str, int]]:
    """One turn of each model, untimed: the peak of its memory, and what the cache that it filled holds."""
    peak, held = {}, {}
    for subject in subjects:
        device = subject.model.device
        release_free_memory()
        reset_peak_memory(device)
        before = held_bytes(device)
        _, cache = turns[subject.name]()
        taken = max(0, peak_memory_bytes(device) - before)  # the system rounds both
        ahead = subject.costs.cache_bytes(context, batch) if kind == "decode" else 0
        peak[subject.name] = subject.weight_bytes + ahead + taken
        if cache is not None:
            held[subject.name] = held_cache_bytes(cache)
        del cache  # before the next one fills its own
    return peak, held


def race(
    turns: Mapping[str, Turn], rounds: tuple[int, int], seconds: float
) -> tuple[list[list[str]], dict[tuple[str, str], list[float]]]:
    """Order of the models in every round, and seconds by model and measure; see `take_turns`."""
    results = take_turns({name: partial(_seconds_alone, turn) for name, turn in turns.items()}, rounds, seconds)
    samples: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        for name, took in result.items():
            for measured, sample in took.items():
                samples[name, measured].append(sample)
    return [[*result] for result in results], dict(samples)


def _seconds_alone(turn: Turn) -> dict[str, float]:
    """Seconds of a turn; its cache is freed before the next turn."""
    return turn()[0]


def needed_bytes(
    kind: str, subjects: Sequence[BenchModel], cells: Mapping[int, Cell], context: int, batch: int
) -> float:
    """Expected bytes beyond the weights; decoding holds the caches of all models at once."""
    caches = [subject.costs.cache_bytes(context, batch) for subject in subjects]
    if kind == "decode":
        return 1.25 * sum(caches)  # a layer's keys and values are copied as they grow
    return max(
        max(cache, peak_at(subject, cells, context) - subject.weight_bytes)
        for subject, cache in zip(subjects, caches, strict=True)
    )


def peak_at(subject: BenchModel, cells: Mapping[int, Cell], context: int) -> float:
    """Peak memory of a model at a context, measured or extrapolated; 0 where nothing was measured."""
    if context in cells:
        return cells[context].peak[subject.name]
    known = {measured: float(cell.peak[subject.name]) for measured, cell in cells.items()}
    fitted = fit(known, subject.memory_powers)
    return 0.0 if fitted is None else fitted[0](context)


def bench(
    model: str | Path,
    *,
    against: str | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = (1,),
    seconds: float = 300.0,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    command: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compares a model with another one; returns the report that `subquad bench --json` writes (docs/bench.md).

    Args:
        model: a folder that `convert` wrote, or any causal language model.
        against: the other model; None: the teacher by the model's recipe.yaml, if it has one; "none": no other.
        contexts: tokens of a prompt; batches: sequences at a time.
        seconds: about how long it may take in all.
        dtype: of the weights; None: the recipe's. device: None: the GPU if there is one.
        seed: of the tokens that are read. say: is told what is being measured.

    Raises:
        UserError: a model that cannot be loaded or has another vocabulary than the other, a context or a batch that is
        not above zero, contexts that are all beyond the models' learned positions.
    """
    if not contexts or min(contexts) < 1 or not batches or min(batches) < 1 or seconds <= 0:
        raise UserError("contexts, batches and seconds must be above 0")

    # The models, and the contexts that all of them can run
    subjects, dtype = open_subjects(str(model), against, dtype, device)
    place, torch_dtype = subjects[0].model.device, subjects[0].model.dtype
    written = max(1 + NEW_TOKENS, STEPS * (1 + ROUNDS[1]))
    batches = sorted(set(batches))
    contexts, notes = within_positions(subjects, sorted(set(contexts)), written)

    # The machine, then every kind of work at every batch size, each with a fair share of the time left
    started = time.perf_counter()
    with quiet():
        say("the machine's bandwidth and matrix rate")
        roof = measure_roof(place, torch_dtype)
        rows: list[dict[str, Any]] = []
        jobs = [(batch, kind) for batch in batches for kind in KINDS]
        for index, (batch, kind) in enumerate(jobs):
            seconds_left = max(0.0, seconds - (time.perf_counter() - started)) / (len(jobs) - index)
            cells, missing = measure(kind, subjects, contexts, batch, seconds_left, seed, say)
            for subject in subjects:
                rows += rows_of(kind, subject, cells, contexts, batch, roof, missing, rows)

    # The report
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(place, command),
        "seed": seed,
        "settings": {"contexts": [*contexts], "batches": [*batches], "seconds": seconds, "dtype": dtype},
        "seconds": time.perf_counter() - started,
        "roof": asdict(roof),
        "models": {subject.name: _about(subject) for subject in subjects},
        "notes": notes,
        "cells": rows,
        "overtakes": overtakes(rows, [subject.name for subject in subjects]),
    }


def _about(subject: BenchModel) -> dict[str, Any]:
    return {
        "title": subject.title,
        "weight_bytes": subject.weight_bytes,
        "plan_pattern": subject.plan.pattern(),
        "max_positions": max_positions(subject.model),
    }


def rows_of(
    kind: str,
    subject: BenchModel,
    cells: Mapping[int, Cell],
    contexts: Sequence[int],
    batch: int,
    roof: Roof,
    missing: str,
    before: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row a measure and context for one model.

    `missing`: what there was too little of for the contexts that are not in `cells`. `before`: the rows of decode and
    prefill, upon which `generate` is extrapolated: it does the same, and what it does besides takes equally long.
    """
    rows = []
    for measured in ("first_token", "generate") if kind == "generate" else (kind,):
        work_of = subject.costs.prefill if measured in AS_PREFILL else subject.costs.decode
        spreads = {context: spread(cell.samples[subject.name, measured]) for context, cell in cells.items()}
        expected_at = forecast_of(measured, subject, spreads, batch, before)
        for context in contexts:
            # Seconds, measured or extrapolated
            cell = cells.get(context)
            row: dict[str, Any] = {"measure": measured, "model": subject.name, "context": context, "batch": batch}
            row["measured"] = cell is not None
            if cell is not None:
                quartiles: Spread | None = spreads[context]
                row |= {"samples": len(cell.order), "order": cell.order}
            else:
                quartiles = None if expected_at is None else expected_at.at(context)
                row |= {"samples": 0, "too_little": missing, "fitted_to": [*cells]}
                row["formula"] = None if expected_at is None else expected_at.formula
            row |= dict(zip(("low", "seconds", "high"), quartiles or (None, None, None), strict=True))

            # What follows from them and from the plan
            work = work_of(context, batch)
            least = roof.seconds(work)
            row["roofline"] = {**work._asdict(), "seconds": least, "share": quartiles and least / quartiles.median}
            if measured != "first_token":
                tokens = batch * (context if measured == "prefill" else 1)
                row["tokens_per_second"] = quartiles and tokens / quartiles.median
            row["peak_bytes"] = peak_at(subject, cells, context) or None
            row["cache_bytes"] = subject.costs.cache_bytes(context, batch)
            if cell is not None and subject.name in cell.held:
                row["held_bytes"] = cell.held[subject.name]
            rows.append(row)
    return rows


def forecast_of(
    measured: str, subject: BenchModel, spreads: Mapping[int, Spread], batch: int, before: Sequence[Mapping[str, Any]]
) -> Forecast | None:
    """Forecast for the contexts that were not measured; None where too few were."""
    if measured in KINDS and measured != "generate":
        return forecast(spreads, subject.powers(measured, len(spreads)))
    like = "prefill" if measured in AS_PREFILL else "decode"
    base = {
        row["context"]: Spread(row["low"], row["seconds"], row["high"])
        for row in before
        if (row["measure"], row["model"], row["batch"]) == (like, subject.name, batch) and row["seconds"]
    }
    return forecast_beside(spreads, base.__getitem__, like) if base else None


def overtakes(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Contexts at which the first model overtakes the second, by measure and batch; none without a second."""
    if len(names) < 2:
        return []

    def curve(name: str, measured: str, batch: int) -> Curve:
        return {
            row["context"]: Point(row["seconds"], row["measured"])
            for row in rows
            if (row["model"], row["measure"], row["batch"]) == (name, measured, batch) and row["seconds"]
        }

    crossings = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        for measured in MEASURES:
            result = overtaking(*(curve(name, measured, batch) for name in names))
            if result is not None:
                crossings.append({"measure": measured, "batch": batch, **asdict(result)})
    return crossings
