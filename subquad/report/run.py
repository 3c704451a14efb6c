"""The files of one run, read and checked once for every form of the report.

A run may hold any part of what `convert` leaves (a folder with only a plan and its scores is fine): what is missing is
empty here, and the report leaves it out. What is there but damaged is the user's to know about: a `UserError`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from subquad.errors import UserError
from subquad.plan import Plan
from subquad.report import format as fmt
from subquad.report.number import NAN, Number
from subquad.report.scores import Scores

AGAIN = "run the command that wrote it again."
Model = TypeVar("Model", bound=BaseModel)

VARIANTS = {
    "teacher": "the model that was converted",
    "student": "the result",
    "aligned": "the chosen plan before the logit stage",
    "uniform": "the same budget spread evenly over the layers, at the point of “aligned”",
    "untrained": "the chosen plan before any training",
    "window": "a training-free sliding window with sinks, at the same cache bytes",
}
"""The rows of every table, in order, with what each is."""

HEADLINE_CONTEXT = 1024
"""Context length of the headline numbers where it was measured (below it a window alone sees nearly everything)."""


class Bucket(BaseModel):
    """What was measured between two positions of the text: from `start` up to the one it is listed under."""

    start: int
    kl: Number = NAN
    perplexity: Number = NAN
    top1: Number = NAN


class Band(BaseModel):
    """Retrieval of the facts that lie in one band of depth; nothing is known where there were no rows."""

    rows: int = 0
    accuracy: Number = NAN
    logprob: Number = NAN


class Answer(BaseModel):
    """Retrieval at one context length: share of answers right, mean log-probability of an answer token (nats).

    `by_depth`: the same in bands of equal width, from the beginning of the text to the question; none for tasks whose
    facts have no one depth.
    """

    accuracy: Number = NAN
    logprob: Number = NAN
    by_depth: list[Band] = []


class Measure(BaseModel):
    """One metric of a task; no standard error where lm-eval has none."""

    value: Number = NAN
    stderr: Number = NAN


class Variant(BaseModel):
    """What was measured of one model; dictionaries are keyed by context length in tokens."""

    kl: dict[int, Number] = {}
    kl_stderr: dict[int, Number] = {}
    kl_samples: dict[int, list[Number]] = {}
    perplexity: dict[int, Number] = {}
    top1: dict[int, Number] = {}
    buckets: dict[int, Bucket] = {}
    retrieval: dict[str, dict[int, Answer]] = {}
    tasks: dict[str, dict[str, Measure]] = {}
    cache_bytes: dict[int, Number] = {}
    attention_layers: list[int] = []
    plan_pattern: str | None = None


class StageRecord(BaseModel):
    """One stage as it went: `share_of_bare_forward` is its tokens/s over those of the teacher's bare forward pass."""

    name: str
    objective: str | dict[str, float] = ""
    seconds: Number = NAN
    tokens: Number = NAN
    tokens_per_second: Number = NAN
    bare_forward_tokens_per_second: Number = NAN
    share_of_bare_forward: Number = NAN
    final_loss: Number = NAN


class Sample(BaseModel):
    """One prompt and what the two models went on to write."""

    prompt: str
    teacher: str = ""
    student: str = ""


class Metrics(BaseModel):
    """metrics.json."""

    teacher: Variant | None = None
    student: Variant | None = None
    aligned: Variant | None = None
    uniform: Variant | None = None
    untrained: Variant | None = None
    window: Variant | None = None
    stages: list[StageRecord] = []
    selection: dict[str, Any] = {}
    seconds: dict[str, Number] = {}
    peak_rss_bytes: Number = NAN
    seed: int | None = None
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    command: str | None = None
    commit: str | None = None
    samples: list[Sample] = []
    teacher_name: str | None = None
    verdicts: list[str] = []

    @property
    def variants(self) -> dict[str, Variant]:
        """The models that were measured, in the order of the tables."""
        found = {name: getattr(self, name) for name in VARIANTS}
        return {name: variant for name, variant in found.items() if variant is not None}

    @property
    def contexts(self) -> list[int]:
        """Context lengths at which held-out text was measured, ascending."""
        return sorted({c for v in self.variants.values() for table in (v.kl, v.perplexity, v.top1) for c in table})

    @property
    def headline_context(self) -> int | None:
        """The context length that the headline speaks of: `HEADLINE_CONTEXT` if measured, else the longest."""
        contexts = self.contexts
        return HEADLINE_CONTEXT if HEADLINE_CONTEXT in contexts else max(contexts, default=None)

    @property
    def cache_contexts(self) -> list[int]:
        """Context lengths of the cache table, ascending."""
        return sorted({c for v in self.variants.values() for c in v.cache_bytes})

    @property
    def retrieval_tasks(self) -> dict[str, list[int]]:
        """Every retrieval task with its context lengths, ascending."""
        tasks: dict[str, set[int]] = {}
        for variant in self.variants.values():
            for task, answers in variant.retrieval.items():
                tasks.setdefault(task, set()).update(answers)
        return {task: sorted(contexts) for task, contexts in tasks.items()}

    @property
    def buckets(self) -> dict[int, str]:
        """The stretches of text between two contexts, by where they end: `0–256`."""
        starts = {end: bucket.start for v in self.variants.values() for end, bucket in v.buckets.items()}
        return {end: f"{fmt.context(starts[end])}–{fmt.context(end)}" for end in sorted(starts)}

    @property
    def depth_tasks(self) -> dict[str, list[int]]:
        """The retrieval tasks whose facts have a depth, with the context lengths where it was measured, ascending."""
        tasks: dict[str, set[int]] = {}
        for variant in self.variants.values():
            for task, answers in variant.retrieval.items():
                known = {context for context, answer in answers.items() if any(band.rows for band in answer.by_depth)}
                if known:
                    tasks.setdefault(task, set()).update(known)
        return {task: sorted(contexts) for task, contexts in tasks.items()}

    @property
    def task_rows(self) -> dict[tuple[str, str], dict[str, Measure]]:
        """Every metric of every task, as (task, metric), with what was measured of each model."""
        rows: dict[tuple[str, str], dict[str, Measure]] = {}
        for name, variant in self.variants.items():
            for task, measures in variant.tasks.items():
                for metric, measure in measures.items():
                    rows.setdefault((task, metric), {})[name] = measure
        return rows

    def cache_ratio(self, context: int) -> float:
        """The student's cache bytes over the teacher's, at one context length; NaN where either is unknown."""
        if not (self.teacher and self.student):
            return NAN
        ours, theirs = self.student.cache_bytes.get(context, NAN), self.teacher.cache_bytes.get(context, NAN)
        return ours / theirs if theirs else NAN


class LossPoint(BaseModel):
    """One line of log.jsonl, as far as the report reads it."""

    stage: int
    name: str
    tokens: float
    loss: Number


@dataclass
class Run:
    """One run folder. `curves` holds the logged losses by stage, in the order they were trained."""

    folder: Path
    metrics: Metrics
    plan: Plan | None
    scores: Scores | None
    curves: dict[tuple[int, str], list[LossPoint]]
    recipe: str | None

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
            heads = [(layer, head) for layer, row in enumerate(self.plan.head_table()) for head in range(len(row))]
            layer, head = heads[index]
            return f"head {head} of layer {layer}"
        return f"{self.scores.unit} {index}"

    def plan_sentence(self) -> str:
        """What the plan keeps, in one sentence; empty without a plan."""
        if self.plan is None:
            return ""
        table = self.plan.head_table()
        mixers = sorted({mixer for heads in table for mixer in heads} - {"attention"})
        if not mixers:
            return f"All {len(table)} layers keep attention."
        kept = len(self.plan.attention_layers)
        if all(len(set(heads)) == 1 for heads in table):
            counts, others = f"{kept} of {len(table)} layers keep attention", "layers"
        else:
            heads_kept, heads_all = sum(h.count("attention") for h in table), sum(map(len, table))
            counts, others = f"{heads_kept} of {heads_all} heads keep attention", "heads"
        names = " and ".join(mixers)
        return f"{counts}; the other {others} run {names}, whose cost per token does not grow with context."

    def result_sentence(self) -> str:
        """KL and cache ratio in one sentence; empty where nothing was measured."""
        metrics, parts = self.metrics, []
        context = metrics.headline_context
        kl = metrics.student.kl.get(context, NAN) if metrics.student and context else NAN
        if math.isfinite(kl):
            distance = f"{fmt.nats(kl)} nats per token from its teacher (KL)"
            parts.append(f"on held-out text of {context} tokens the student is {distance}")
        longest = max(metrics.cache_contexts, default=0)
        ratio = metrics.cache_ratio(longest)
        if math.isfinite(ratio):
            share = f"{fmt.percent(ratio)} of the teacher’s"
            parts.append(f"at {fmt.context(longest)} tokens of context its cache takes {share}")
        sentence = ", and ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def check_metrics(metrics: Any, source: str = "metrics") -> Metrics:
    """Parsed JSON -> `Metrics`. Raises `UserError` that names the first field which does not fit."""
    return _check(Metrics, metrics, source)


def read_run(folder: Path | str) -> Run:
    """Reads what a run folder holds. Raises `UserError` when there is nothing to report, or a file is damaged."""
    folder = Path(folder)
    names = ("metrics.json", "scores.json", "plan.yaml", "log.jsonl")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"no run to report in '{folder}': it has none of {', '.join(names)}; give the --out of a run.")
    metrics, scores = _read_json(folder / "metrics.json"), _read_json(folder / "scores.json")
    return Run(
        folder=folder,
        metrics=check_metrics({} if metrics is None else metrics, str(folder / "metrics.json")),
        plan=Plan.load(folder / "plan.yaml") if (folder / "plan.yaml").is_file() else None,
        scores=None if scores is None else _check(Scores, scores, str(folder / "scores.json")),
        curves=_read_log(folder / "log.jsonl"),
        recipe=_read_text(folder / "recipe.yaml"),
    )


def _check(model: type[Model], value: Any, source: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise UserError(f"{source} cannot be reported: {where}: {first['msg']}; {AGAIN}") from error


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
            point = _check(LossPoint, json.loads(line), f"{path} line {number}")
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged at line {number}: {error}; {AGAIN}") from error
        curves.setdefault((point.stage, point.name), []).append(point)
    return curves
