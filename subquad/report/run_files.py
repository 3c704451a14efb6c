"""The files of one run, read and checked once for every form of the report.

A run may hold any part of what `convert` leaves (a folder with only a plan and its scores is fine): what is missing is
empty here, and the report leaves it out. A damaged file is a `UserError`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from subquad.errors import UserError
from subquad.plan import Plan
from subquad.results.bench import Bench
from subquad.results.metrics import ImageFidelity, Metrics, check_metrics
from subquad.results.record import AGAIN, check
from subquad.results.scores import Scores
from subquad.utils import format as fmt
from subquad.utils.format import NAN, Number


class LossPoint(BaseModel):
    """One line of log.jsonl, as far as the report reads it."""

    stage: int
    name: str
    tokens: float
    loss: Number
    lr: Number = NAN


@dataclass
class RunFiles:
    """One run folder. `curves` holds the logged losses by stage, in the order they were trained.

    `evaluation` and `bench`: what was measured later, by `subquad eval` and `subquad bench`, and left in the folder as
    eval.json and bench.json.
    """

    folder: Path
    metrics: Metrics
    plan: Plan | None
    scores: Scores | None
    curves: dict[tuple[int, str], list[LossPoint]]
    recipe: str | None
    evaluation: Metrics | None = None
    bench: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.metrics.teacher_name or "a teacher"

    @property
    def settings(self) -> dict[str, Any] | None:
        """The recipe's keys; None without a recipe. Raises `UserError` for one that is not YAML."""
        try:
            settings = yaml.safe_load(self.recipe or "")
        except yaml.YAMLError as error:
            path = self.folder / "recipe.yaml"
            raise UserError(f"{path} is not YAML: {error}; restore it or run the conversion again.") from error
        return settings if isinstance(settings, dict) else None

    @property
    def front_cost(self) -> float:
        """The plan's bytes at the context of the front; NaN without a plan."""
        if self.plan is None or self.scores is None:
            return NAN
        return self.plan.cache_bytes(self.scores.front_context, dtype=self.scores.front_dtype)

    def unit_name(self, index: int) -> str:
        """A unit of the selection: `layer 3`, `layers 0-1`, `head 2 of layer 1`."""
        assert self.scores is not None
        if self.scores.units:
            layers = self.scores.units[index]
            return f"layer{'s' if len(layers) > 1 else ''} {fmt.ranges(layers)}"
        if self.scores.unit == "head" and self.plan is not None:
            table, kept_layers = self.plan.head_table(), self.scores.kept_layers
            heads = [
                (layer, head) for layer, row in enumerate(table) if layer not in kept_layers for head in range(len(row))
            ]
            layer, head = heads[index]
            return f"head {head} of layer {layer}"
        return f"{self.scores.unit} {index}"

    def plan_sentence(self) -> str:
        """Summary of the plan in one sentence; empty without a plan."""
        if self.plan is None:
            return ""
        attending, total, units = self._kept()
        mixers = self._mixers()
        if not mixers:
            return f"All {total} {units} keep attention."
        names = " and ".join(mixers)
        longer = "the number of patches" if self.metrics.image_measures else "context"
        gain = f"run {names}, whose cost per token does not grow with {longer}."
        if attending == 0:
            return f"None of {total} {units} keeps attention: all {gain}"
        return f"{attending} of {total} {units} keep attention; the other {units} {gain}"

    def plan_summary(self) -> str:
        """The same in a few words: `15 of 30 layers, hedgehog`; empty without a plan."""
        if self.plan is None:
            return ""
        attending, total, units = self._kept()
        return ", ".join([f"{attending} of {total} {units}", *self._mixers()])

    def _mixers(self) -> list[str]:
        """Names of the mixers that replace attention."""
        assert self.plan is not None
        return sorted({mixer for heads in self.plan.head_table() for mixer in heads} - {"attention"})

    def _kept(self) -> tuple[int, int, str]:
        """Number that keep attention, total number, and unit: layers where the heads of each agree, else heads."""
        assert self.plan is not None
        table = self.plan.head_table()
        if all(len(set(heads)) == 1 for heads in table):
            return len(self.plan.attention_layers), len(table), "layers"
        return sum(heads.count("attention") for heads in table), sum(map(len, table)), "heads"

    def result_sentence(self) -> str:
        """KL and cache ratio in one sentence; empty where nothing was measured."""
        metrics, parts = self.metrics, []
        context = metrics.headline_context
        kl = metrics.student.kl.get(context, NAN) if metrics.student and context else NAN
        if math.isfinite(kl):
            distance = f"{fmt.nats(kl)} nats per token from its teacher (KL)"
            parts.append(f"on held-out text of {context} tokens the student is {distance}")
        if metrics.student and metrics.student.images:
            parts.append(_of_images(metrics.student.images))
        longest = max(metrics.cache_contexts, default=0)
        ratio = metrics.cache_ratio(longest)
        if math.isfinite(ratio):
            share = f"{fmt.percent(ratio)} of the teacher’s"
            parts.append(f"at {fmt.context(longest)} tokens of context its cache takes {share}")
        sentence = ", and ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _of_images(images: ImageFidelity) -> str:
    if math.isfinite(images.agreement):
        share = fmt.percent(images.agreement)
        return f"of {images.count:,} held-out images the student puts {share} in the class that its teacher does"
    distance = fmt.percent(images.distance)
    return f"on {images.count:,} held-out images the student’s features are {distance} of their norm from its teacher’s"


def read_run(folder: Path | str) -> RunFiles:
    """Reads what a run folder holds. Raises `UserError` when there is nothing to report, or a file is damaged."""
    folder = Path(folder)
    names = ("metrics.json", "scores.json", "plan.yaml", "log.jsonl")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"no run to report in '{folder}': it has none of {', '.join(names)}; give the --out of a run.")
    metrics, scores, evaluation, bench = (
        _read_json(folder / f"{name}.json") for name in ("metrics", "scores", "eval", "bench")
    )
    return RunFiles(
        folder=folder,
        metrics=check_metrics({} if metrics is None else metrics, str(folder / "metrics.json")),
        plan=Plan.load(folder / "plan.yaml") if (folder / "plan.yaml").is_file() else None,
        scores=None if scores is None else check(Scores, scores, str(folder / "scores.json")),
        curves=_read_log(folder / "log.jsonl"),
        recipe=_read_text(folder / "recipe.yaml"),
        evaluation=None if evaluation is None else check_metrics(evaluation, str(folder / "eval.json")),
        bench=None if bench is None else check(Bench, bench, str(folder / "bench.json")).model_dump(),
    )


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8; {AGAIN}") from error


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}; {AGAIN}") from error


def _read_log(path: Path) -> dict[tuple[int, str], list[LossPoint]]:
    """Losses by (stage, name). The last line may be torn: the run may still be going on, or have been killed."""
    curves: dict[tuple[int, str], list[LossPoint]] = {}
    lines = (_read_text(path) or "").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            point = check(LossPoint, json.loads(line), f"{path} line {number}")
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged at line {number}: {error}; {AGAIN}") from error
        curves.setdefault((point.stage, point.name), []).append(point)
    return curves
