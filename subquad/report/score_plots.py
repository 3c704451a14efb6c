"""The pictures of a selection: scores of layers, groups or heads, the greedy selector's path, the Pareto front."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from subquad.report.plots import (
    INK,
    MIXER_COLOURS,
    SPARE_COLOURS,
    STUDENT,
    TEACHER,
    WIDTH,
    in_bytes,
    legend_above,
    picture,
)
from subquad.results.scores import Picked, ReplacementPath, Scores
from subquad.utils import format as fmt
from subquad.utils.format import NAN

SCORED = {
    "accuracy": "accuracy lost without it",
    "logprob": "nats lost without it",
    **dict.fromkeys(("kl", "kl-removal", "gradient", "fisher"), "KL in nats"),
    "alignment-loss": "distance",
    "halo": "recall lost / rest lost",
    "gates": "log-odds of the gate",
}
"""What scores are, by their measure or, where they have none, by their selector."""


def scores_picture(scores: Scores) -> Figure:
    """Selection scores: bars of layers, or a map of heads."""
    if scores.unit != "head":
        return picture(lambda ax: draw_layer_scores(ax, scores), height=2.35)
    cells = max(map(len, scores.rows), default=1) * min(0.92 * WIDTH / max(len(scores.rows), 1), 0.3)
    return picture(lambda ax: draw_head_scores(ax, scores), height=min(max(cells, 1.0), 3.2) + 0.9)


def draw_head_scores(ax: Axes, scores: Scores) -> None:
    """A map, layers from left to right and heads from top to bottom; heads that keep attention have an outline, with A
    or G for an aggregate or a gather head."""
    colour = MIXER_COLOURS["attention"]
    shades = LinearSegmentedColormap.from_list("scores", [to_rgba(INK, 0.07), to_rgba(colour, 1.0)])
    heads = max(map(len, scores.rows))
    table = [[row[head] if head < len(row) else NAN for row in scores.rows] for head in range(heads)]
    values = [0.0, 1e-9, *(value for row in table for value in row if math.isfinite(value))]
    mesh = ax.pcolormesh(table, cmap=shades, vmin=min(values), vmax=max(values), shading="flat")
    units = [(layer, head) for layer, row in enumerate(scores.rows) for head in range(len(row))]
    for layer, head in (units[index] for index in scores.chosen):
        ax.add_patch(Rectangle((layer, head), 1, 1, fill=False, edgecolor=INK, linewidth=1.0))
        role = scores.roles[layer][head] if scores.roles else ""
        mark = {"aggregate": "A", "gather": "G"}.get(role, "")
        ax.text(layer + 0.5, head + 0.5, mark, ha="center", va="center", fontsize=6)
    ax.set_ylim(heads, 0)
    ax.set_xticks(*_middles(len(scores.rows)))
    ax.set_yticks(*_middles(heads))
    ax.set_xlabel("layer")
    ax.set_ylabel("head")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, fraction=0.05)
    bar.set_label(_what_is_scored(scores))
    bar.outline.set_visible(False)


def _middles(count: int) -> tuple[list[float], list[str]]:
    """Places and labels of at most ten ticks in the middle of cells."""
    shown = range(0, count, -(-count // 10))
    return [index + 0.5 for index in shown], [str(index) for index in shown]


def draw_layer_scores(ax: Axes, scores: Scores) -> None:
    """One bar a layer, or group of them, with its bounds; those that keep attention stand out in its colour."""
    attending, values, labels = set(scores.chosen), [row[0] for row in scores.rows], scores.labels
    linear = MIXER_COLOURS.get(scores.mixer, SPARE_COLOURS[0])
    colours = [MIXER_COLOURS["attention"] if layer in attending else linear for layer in range(len(values))]
    ax.bar(range(len(values)), values, color=colours, width=0.8)
    for unit, (low, high) in scores.bounds.items():
        ax.vlines(unit, low, high, color=INK, linewidth=0.8)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xlim(-0.6, len(values) - 0.4)
    fitting = max(60 // (1 + max(map(len, labels))), 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=min(fitting, 10), integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda unit, _: labels[int(unit)] if unit in range(len(labels)) else ""))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.grid(axis="y")
    ax.set_xlabel("layers" if scores.unit == "group" else "layer")
    ax.set_ylabel(_what_is_scored(scores))
    legend = {"keeps attention": MIXER_COLOURS["attention"], f"becomes {scores.mixer or 'linear'}": linear}
    legend_above(ax, [Patch(facecolor=colour, label=label) for label, colour in legend.items()])


def _what_is_scored(scores: Scores) -> str:
    return SCORED.get(scores.measure) or SCORED.get(scores.by, f"score ({scores.by})")


def draw_path(ax: Axes, path: ReplacementPath, unit: str) -> None:
    """The score on validation documents over the units replaced; of the plans picked also on test documents, hollow."""
    ax.plot(path.scores, color=TEACHER, linewidth=1.4, label="validation")
    ax.axhline(path.floor, color=INK, linewidth=0.9, linestyle=":", label="floor")
    names: dict[Picked, list[str]] = {}
    for plan in path.picked:
        names.setdefault(plan._replace(name=""), []).append(plan.name)
    looks = (("o", TEACHER), ("D", STUDENT), ("s", MIXER_COLOURS["gated_deltanet"]))
    for (plan, plan_names), (marker, colour) in zip(names.items(), looks, strict=False):
        ax.plot([plan.steps] * 2, [plan.validation, plan.test], color=colour, linewidth=0.8)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
        ax.plot(plan.steps, plan.validation, **style, markersize=5, label=" = ".join(plan_names))
        ax.plot(plan.steps, plan.test, **style, markersize=7, fillstyle="none")
    ax.plot([], [], color=INK, marker="o", linestyle="none", markersize=7, fillstyle="none", label="test")
    ax.set_xlim(-0.5, len(path.steps) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.grid(axis="y")
    ax.set_xlabel(f"{unit}s replaced")
    ax.set_ylabel("score")
    legend_above(ax, ax.get_legend_handles_labels()[0])


def draw_front(ax: Axes, scores: Scores, cost: float) -> None:
    """The share of the measured worth that plans can keep, over their bytes, and the plan chosen, of `cost` bytes."""
    costs, values = [point.cost for point in scores.front], [point.value for point in scores.front]
    ax.plot(costs, values, color=TEACHER, linewidth=1.2, marker="o", markersize=3, label="best plans")
    if math.isfinite(cost):
        look: dict[str, Any] = {"color": STUDENT, "marker": "D", "linestyle": "none", "markersize": 6}
        ax.plot(cost, scores.kept_share, **look, label="the plan chosen")
    in_bytes(ax)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.percent(value, 0)))
    ax.grid()
    ax.set_xlabel(f"cache of one sequence at {fmt.context(scores.front_context)} tokens")
    ax.set_ylabel("worth kept")
    legend_above(ax, ax.get_legend_handles_labels()[0])
