"""metrics.json of a run, which `subquad eval --json` writes as well: what was measured, and what it took.

Whatever is missing is empty here: a file may be older than what is measured today.
"""

import math
from typing import Any

from subquad.results.record import Record, check
from subquad.utils import format as fmt
from subquad.utils.format import NAN, Number

VARIANTS = {
    "teacher": "the model that was converted",
    "student": "the result",
    "aligned": "the chosen plan before the logit stage",
    "uniform": "the same budget spread evenly over the layers, at the point of “aligned”",
    "untrained": "the chosen plan before any training",
    "window": "a training-free sliding window with sinks, at the same cache bytes",
}
"""Models that are measured, in the order of the tables, each with its description."""

HEADLINE_CONTEXT = 1024
"""Context length of the headline numbers where it was measured (below it a window alone sees nearly everything)."""


class Bucket(Record):
    """Means over the positions of the text from `start` up to the one that it is listed under."""

    start: int
    kl: Number = NAN
    cross_entropy: Number = NAN
    perplexity: Number = NAN
    top1: Number = NAN


class Band(Record):
    """Retrieval of the facts that lie in one band of depth; nothing is known where there were no rows."""

    rows: int = 0
    accuracy: Number = NAN
    logprob: Number = NAN


class Answer(Record):
    """Retrieval at one context length: share of answers right, mean log-probability of an answer token (nats).

    `by_depth`: the same in bands of equal width, from the beginning of the text to the question; none for tasks whose
    facts have no one depth.
    """

    accuracy: Number = NAN
    logprob: Number = NAN
    by_depth: list[Band] = []


class ImageFidelity(Record):
    """Means over images. `kl`, `agreement` and `accuracy`: of classifiers only; `saliency`: of saliency models.

    `samples`: divergences, or else distances, of groups of images, for comparisons in pairs.
    """

    count: int = 0
    accuracy: Number = NAN
    accuracy_stderr: Number = NAN
    agreement: Number = NAN
    agreement_stderr: Number = NAN
    kl: Number = NAN
    kl_stderr: Number = NAN
    distance: Number = NAN
    distance_stderr: Number = NAN
    saliency: Number = NAN
    saliency_stderr: Number = NAN
    samples: list[Number] = []


IMAGE_MEASURES = {
    "accuracy": "accuracy",
    "agreement": "same class as the teacher",
    "kl": "KL to the teacher, nats",
    "distance": "distance of features",
    "saliency": "difference of saliency maps",
}
"""Measures of images, with the headings of the tables."""


class Measure(Record):
    """One metric of a task; no standard error where lm-eval has none."""

    value: Number = NAN
    stderr: Number = NAN


class Variant(Record):
    """Measures of one model; dictionaries are keyed by context length in tokens."""

    kl: dict[int, Number] = {}
    kl_stderr: dict[int, Number] = {}
    kl_samples: dict[int, list[Number]] = {}
    perplexity: dict[int, Number] = {}
    cross_entropy: dict[int, Number] = {}
    top1: dict[int, Number] = {}
    buckets: dict[int, Bucket] = {}
    retrieval: dict[str, dict[int, Answer]] = {}
    tasks: dict[str, dict[str, Measure]] = {}
    images: ImageFidelity | None = None
    cache_bytes: dict[int, Number] = {}
    attention_layers: list[int] = []
    plan_pattern: str | None = None


class StageRecord(Record):
    """Result of a stage: `share_of_bare_forward` is its tokens/s over those of the teacher's bare forward pass."""

    name: str
    objective: str | dict[str, float] = ""
    steps: Number = NAN
    tokens: Number = NAN
    seconds: Number = NAN
    tokens_per_second: Number = NAN
    bare_forward_tokens_per_second: Number = NAN
    share_of_bare_forward: Number = NAN
    peak_memory_bytes: Number = NAN
    ended_on_plateau: bool = False
    first_loss: Number = NAN
    final_loss: Number = NAN
    final_parts: dict[str, Number] = {}


class Sample(Record):
    """A prompt and its continuations by the two models."""

    prompt: str
    teacher: str = ""
    student: str = ""


class Selection(Record):
    """Settings of the selector, and the work that it took."""

    by: str | None = None
    budget: str | int | float | None = None
    spent: dict[str, Number] | None = None
    seconds: Number = NAN


class SourceRecord(Record):
    """A text that was read, and the hash of its bytes.

    Where rows were skipped or repaired: `rows` that were read, how many of them were `skipped`, by reason, and in how
    many broken characters were replaced (`repaired`).
    """

    name: str
    sha256: str
    rows: int = 0
    skipped: dict[str, int] = {}
    repaired: int = 0


class Metrics(Record):
    """metrics.json, and what `subquad eval --json` writes."""

    teacher: Variant | None = None
    student: Variant | None = None
    aligned: Variant | None = None
    uniform: Variant | None = None
    untrained: Variant | None = None
    window: Variant | None = None
    stages: list[StageRecord] = []
    selection: Selection = Selection()
    seconds: dict[str, Number] = {}  # by part of the run
    tokens: dict[str, Number] = {}  # by stage
    tokens_per_second: dict[str, Number] = {}
    peak_rss_bytes: Number = NAN
    seed: int | None = None
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    command: str | None = None
    commit: str | None = None
    teacher_fingerprint: str | None = None
    text: list[SourceRecord] = []
    sha256: dict[str, str] = {}
    samples: list[Sample] = []
    teacher_name: str | None = None
    verdicts: list[str] = []
    unmeasured: list[str] = []  # sentences on what failed while measuring, and on numbers that are not finite

    @property
    def variants(self) -> dict[str, Variant]:
        """The models that were measured, in the order of the tables."""
        measured = {name: getattr(self, name) for name in VARIANTS}
        return {name: variant for name, variant in measured.items() if variant is not None}

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
    def image_measures(self) -> dict[str, str]:
        """Measures taken on images, each with its heading."""
        fidelities = [variant.images for variant in self.variants.values() if variant.images]
        return {
            measure: heading
            for measure, heading in IMAGE_MEASURES.items()
            if any(math.isfinite(getattr(fidelity, measure)) for fidelity in fidelities)
        }

    @property
    def image_count(self) -> int:
        """Images that were measured on."""
        return max((variant.images.count for variant in self.variants.values() if variant.images), default=0)

    @property
    def task_rows(self) -> dict[tuple[str, str], dict[str, Measure]]:
        """Every metric of every task, as (task, metric), with what was measured of each model."""
        rows: dict[tuple[str, str], dict[str, Measure]] = {}
        for name, variant in self.variants.items():
            for task, measures in variant.tasks.items():
                for metric, measure in measures.items():
                    rows.setdefault((task, metric), {})[name] = measure
        return rows

    @property
    def ledger(self) -> list[StageRecord]:
        """The stages and then the selection, as rows of one table: the tokens, the time and the speed of each."""
        selection = self.selection
        if selection.by is None:
            return self.stages
        tokens = sum((selection.spent or {}).values())
        return [
            *self.stages,
            StageRecord(
                name="selection",
                objective=f"by {selection.by}, budget {selection.budget}",
                seconds=selection.seconds,
                tokens=tokens or NAN,
                tokens_per_second=tokens / selection.seconds if tokens and selection.seconds > 0 else NAN,
            ),
        ]

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of what the run read and wrote, by name: the teacher, the texts, the weights files."""
        teacher = {"teacher": self.teacher_fingerprint} if self.teacher_fingerprint else {}
        return teacher | {source.name: source.sha256 for source in self.text} | self.sha256

    def same_text(self, other: "Metrics", context: int) -> bool:
        """Whether both were measured on the same text with the same teacher, which then has the same perplexity."""
        teachers = (metrics.teacher or Variant() for metrics in (self, other))
        return math.isclose(*(teacher.perplexity.get(context, NAN) for teacher in teachers), rel_tol=1e-4)

    def cache_ratio(self, context: int) -> float:
        """The student's cache bytes over the teacher's, at one context length; NaN where either is unknown."""
        if not (self.teacher and self.student):
            return NAN
        teacher_bytes = self.teacher.cache_bytes.get(context, NAN)
        return self.student.cache_bytes.get(context, NAN) / teacher_bytes if teacher_bytes else NAN


def check_metrics(metrics: Any, source: str = "metrics") -> Metrics:
    """Parsed JSON -> `Metrics`. Raises `UserError` that names the first field which does not fit."""
    return check(Metrics, metrics, source)
