"""Several runs in one table and one picture: what each student is worth, over the bytes that its cache takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from subquad.report.plots import STUDENT, TEACHER, in_bytes, legend_above
from subquad.report.run_files import RunFiles
from subquad.results.metrics import Variant
from subquad.utils import format as fmt
from subquad.utils.format import NAN


@dataclass(frozen=True)
class Standing:
    """One run beside the others; what was not measured is NaN."""

    name: str
    run: RunFiles
    kl: float
    kl_stderr: float
    perplexity: float
    top1: float
    cache_bytes: float
    teacher_bytes: float

    @property
    def cache_ratio(self) -> float:
        return self.cache_bytes / self.teacher_bytes

    @property
    def tokens(self) -> float:
        """That were trained on, in all stages together."""
        return sum(stage.tokens for stage in self.run.metrics.stages)

    @property
    def seconds(self) -> float:
        return self.run.metrics.seconds.get("total", NAN)


@dataclass(frozen=True)
class Overview:
    """`context`: of the text, `cache_context`: of the cache; the ones all runs share, 0 where there is none."""

    standings: list[Standing]
    context: int
    cache_context: int
    same_text: bool

    @property
    def comparable(self) -> list[Standing]:
        """Those with a place in the picture."""
        return [one for one in self.standings if math.isfinite(one.kl) and math.isfinite(one.cache_bytes)]

    @property
    def front(self) -> list[Standing]:
        """Those that no other beats: none has less KL for as few bytes. In the order of their bytes."""
        return [
            one
            for one in sorted(self.comparable, key=lambda one: (one.cache_bytes, one.kl))
            if not any(_beats(other, one) for other in self.comparable)
        ]


def overview(runs: Sequence[tuple[str, RunFiles]]) -> Overview:
    """Several runs, each with the name that it goes by."""
    all_metrics = [run.metrics for _, run in runs]
    context = _shared([metrics.contexts for metrics in all_metrics])
    cache_context = _shared([metrics.cache_contexts for metrics in all_metrics])
    first = all_metrics[0]
    return Overview(
        [_standing(name, run, context, cache_context) for name, run in runs],
        context,
        cache_context,
        all(first.same_text(other, context) for other in all_metrics[1:]),
    )


def _shared(lengths: Sequence[Sequence[int]]) -> int:
    """The longest that all have."""
    return max(set(lengths[0]).intersection(*lengths[1:]), default=0)


def _standing(name: str, run: RunFiles, context: int, cache_context: int) -> Standing:
    student, teacher = run.metrics.student or Variant(), run.metrics.teacher or Variant()
    return Standing(
        name,
        run,
        student.kl.get(context, NAN),
        student.kl_stderr.get(context, NAN),
        student.perplexity.get(context, NAN),
        student.top1.get(context, NAN),
        student.cache_bytes.get(cache_context, NAN),
        teacher.cache_bytes.get(cache_context, NAN),
    )


def _beats(one: Standing, other: Standing) -> bool:
    no_worse = one.kl <= other.kl and one.cache_bytes <= other.cache_bytes
    return no_worse and (one.kl < other.kl or one.cache_bytes < other.cache_bytes)


def draw_overview(ax: Axes, found: Overview) -> None:
    """KL over cache bytes: the runs that no other beats are joined, the rest are hollow."""
    front = found.front
    ax.plot([one.cache_bytes for one in front], [one.kl for one in front], color=STUDENT, linewidth=1.2, zorder=1)
    for label, runs, fill in (
        ("not beaten", front, STUDENT),
        ("beaten by another run in both", [one for one in found.comparable if one not in front], "none"),
    ):
        if runs:
            points = [one.cache_bytes for one in runs], [one.kl for one in runs]
            style: dict[str, Any] = {"color": STUDENT, "markerfacecolor": fill, "clip_on": False}
            ax.plot(*points, linestyle="none", marker="o", label=label, **style)
    for one in found.comparable:  # above and to the right of its mark there is no line: the front falls
        ax.annotate(one.name, (one.cache_bytes, one.kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
    look: dict[str, Any] = {"linestyle": "none", "marker": "s", "color": TEACHER, "clip_on": False}
    teachers = sorted({one.teacher_bytes for one in found.comparable if math.isfinite(one.teacher_bytes)})
    ax.plot(teachers, [0.0] * len(teachers), label="teacher", **look)
    ax.margins(x=0.1)
    ax.set_ylim(0, 1.15 * max(one.kl for one in found.comparable) or 1)
    in_bytes(ax)
    ax.grid()
    ax.set_xlabel(f"cache of one sequence at {fmt.context(found.cache_context)} tokens")
    ax.set_ylabel(f"KL at {fmt.context(found.context)} tokens (nats)")
    legend_above(ax, ax.get_legend_handles_labels()[0])
