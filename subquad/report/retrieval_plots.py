"""The picture of retrieval by context length and depth of the fact: the heat map of the needle-in-a-haystack test."""

import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from subquad.report.plots import INK, STYLE, WIDTH
from subquad.results.metrics import Answer, Band, Metrics, Variant
from subquad.utils import format as fmt

RIGHT = "#4f9d69"
SHADES = LinearSegmentedColormap.from_list("right", [to_rgba(INK, 0.05), to_rgba(RIGHT, 0.9)])


def depth_picture(metrics: Metrics, task: str) -> Figure:
    """The teacher's map and the student's, side by side."""
    contexts = metrics.depth_tasks[task]
    models = {name: metrics.variants[name] for name in ("teacher", "student") if name in metrics.variants}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for ax, (name, variant) in zip(axes, models.items(), strict=True):
            draw_depths(ax, variant, task, contexts)
            ax.set_title(name)
        figure.supxlabel("context (tokens)", fontsize=8.5)
        figure.supylabel("depth of the fact", fontsize=8.5)
    return figure


def draw_depths(ax: Axes, variant: Variant, task: str, contexts: list[int]) -> None:
    """Contexts from left to right, depth from top (the beginning of the text) to bottom (the question).

    A cell is coloured and labelled by the share of answers right, in percent; without rows it stays empty.
    """
    answers = variant.retrieval.get(task, {})
    columns = [answers.get(context, Answer()).by_depth for context in contexts]
    depths = max(map(len, columns), default=0)
    table = [[bands[depth] if bands else Band() for bands in columns] for depth in range(depths)]
    ax.pcolormesh([[band.accuracy for band in row] for row in table], cmap=SHADES, vmin=0, vmax=1)
    for depth, row in enumerate(table):
        for column, band in enumerate(row):
            if math.isfinite(band.accuracy):
                ax.text(column + 0.5, depth + 0.5, f"{100 * band.accuracy:.0f}", ha="center", va="center")
    ax.set_xticks([column + 0.5 for column in range(len(contexts))], [fmt.context(context) for context in contexts])
    ax.set_yticks([depth + 0.5 for depth in range(depths)], [fmt.band(depth, depths) for depth in range(depths)])
    ax.set_ylim(depths, 0)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
