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
    """One run in a comparison of several; NaN where a number was not measured."""

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
        """Training tokens over all stages."""
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
        """Runs that have both coordinates of the picture."""
        return [run for run in self.standings if math.isfinite(run.kl) and math.isfinite(run.cache_bytes)]

    @property
    def front(self) -> list[Standing]:
        """Runs that no other beats in both KL and bytes, in the order of their bytes."""
        return [
            run
            for run in sorted(self.comparable, key=lambda run: (run.cache_bytes, run.kl))
            if not any(_beats(rival, run) for rival in self.comparable)
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
        all(first.same_text(metrics, context) for metrics in all_metrics[1:]),
    )


def _shared(lengths: Sequence[Sequence[int]]) -> int:
    """Longest of the lengths that all runs have."""
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


def _beats(standing: Standing, rival: Standing) -> bool:
    no_worse = standing.kl <= rival.kl and standing.cache_bytes <= rival.cache_bytes
    return no_worse and (standing.kl < rival.kl or standing.cache_bytes < rival.cache_bytes)


def draw_overview(ax: Axes, comparison: Overview) -> None:
    """KL over cache bytes: the runs that no other beats are joined, the rest are hollow."""
    front = comparison.front
    ax.plot([run.cache_bytes for run in front], [run.kl for run in front], color=STUDENT, linewidth=1.2, zorder=1)
    for label, runs, fill in (
        ("not beaten", front, STUDENT),
        ("beaten by another run in both", [run for run in comparison.comparable if run not in front], "none"),
    ):
        if runs:
            points = [run.cache_bytes for run in runs], [run.kl for run in runs]
            style: dict[str, Any] = {"color": STUDENT, "markerfacecolor": fill, "clip_on": False}
            ax.plot(*points, linestyle="none", marker="o", label=label, **style)
    for run in comparison.comparable:  # above and to the right of its mark there is no line: the front falls
        ax.annotate(run.name, (run.cache_bytes, run.kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
    square: dict[str, Any] = {"linestyle": "none", "marker": "s", "color": TEACHER, "clip_on": False}
    teachers = sorted({run.teacher_bytes for run in comparison.comparable if math.isfinite(run.teacher_bytes)})
    ax.plot(teachers, [0.0] * len(teachers), label="teacher", **square)
    ax.margins(x=0.1)
    ax.set_ylim(0, 1.15 * max(run.kl for run in comparison.comparable) or 1)
    in_bytes(ax)
    ax.grid()
    ax.set_xlabel(f"cache of one sequence at {fmt.context(comparison.cache_context)} tokens")
    ax.set_ylabel(f"KL at {fmt.context(comparison.context)} tokens (nats)")
    legend_above(ax, ax.get_legend_handles_labels()[0])
