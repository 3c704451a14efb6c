"""The pictures: the plan, loss curves, KL by variant, cache bytes over context (and in score_plots.py, the selection).

Each `draw_*` fills one axes, so that the page (one inline SVG a picture), the README's summary PNG and a notebook
(`plan_picture`) share them. Backgrounds are transparent and all colours are of middle lightness; text and axes are
drawn in one ink, `INK`, which the page turns into `currentColor`, so that one picture serves light and dark alike.
A mixer has the same colour in every run. Figures are made without pyplot: no global state, no display.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from subquad.errors import UserError
from subquad.plan import Plan
from subquad.report.run_files import LossPoint, RunFiles, read_run
from subquad.results.metrics import Metrics
from subquad.utils import format as fmt
from subquad.utils.files import write_aside
from subquad.utils.format import NAN

INK = "#2b2f36"
STUDENT, TEACHER, WINDOW, OTHER = "#d04f6b", "#7d8794", "#a98b5d", "#b3a7bd"
VARIANT_COLOURS = {"teacher": TEACHER, "student": STUDENT, "window": WINDOW}
MIXER_COLOURS = {
    "attention": "#dd8a2b",
    "hedgehog": "#2f93a8",
    "gated_deltanet": "#7b6fc4",
    "gla": "#4f9d69",
    "mamba2": "#4f7fcf",
    "sliding_window": "#a98b5d",
}
SPARE_COLOURS = ("#c0619e", "#8a9a3b", "#5f8f8f", "#b5654a")


STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.18,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "subquad",
}
WIDTH = 5.0  # inches; small on purpose: on a phone the picture shrinks little, and its text stays readable


def picture(draw: Callable[[Axes], None], height: float = 2.6, width: float = WIDTH) -> Figure:
    """One axes in the house style. Sizes in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element to stand inside a page: text takes the page's font, ink becomes `currentColor`.

    `name` prefixes every id, so that pictures on one page do not share any.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"| version="1.1"', "", text, count=5)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def plan_picture(plan: Plan) -> Figure:
    """The plan as a picture: one column a layer, one row a head, coloured by mixer, with a legend."""
    return picture(lambda ax: draw_plan(ax, plan), height=_plan_height(plan, WIDTH, tallest=3.2))


def mixer_colours(plan: Plan) -> dict[str, str]:
    """A colour for every mixer the plan uses, attention first."""
    used = {mixer for heads in plan.head_table() for mixer in heads}
    names = sorted(used, key=lambda name: (name != "attention", name))
    spare = iter(SPARE_COLOURS * (1 + len(names)))
    return {name: MIXER_COLOURS.get(name) or next(spare) for name in names}


def draw_plan(ax: Axes, plan: Plan) -> None:
    """Layers from left to right, heads from top to bottom. One outline a mixer keeps the SVG of a large plan small."""
    table, colours = plan.head_table(), mixer_colours(plan)
    legend = []
    by_layer = all(len(set(heads)) == 1 for heads in table)
    for mixer, colour in colours.items():
        cells = [(layer, head) for layer, heads in enumerate(table) for head, name in enumerate(heads) if name == mixer]
        squares = [_square(layer, head) for layer, head in cells]
        ax.add_patch(PathPatch(Outline.make_compound_path(*squares), facecolor=colour, edgecolor="none"))
        count = fmt.count(len({layer for layer, _ in cells}), "layer") if by_layer else fmt.count(len(cells), "head")
        legend.append(Patch(facecolor=colour, label=f"{mixer} ({count})"))
    ax.set_xlim(-0.6, len(table) - 0.4)
    ax.set_ylim(max(map(len, table), default=1) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    ax.set_xlabel("layer")
    ax.set_ylabel("head")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    legend_above(ax, legend)


def stage_picture(points: list[LossPoint]) -> Figure:
    """The loss of a stage, and below it the learning rate, where it was logged."""
    if not any(math.isfinite(point.lr) for point in points):
        return picture(lambda ax: draw_loss(ax, points), height=2.1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        draw_loss(loss, points)
        draw_rate(rate, points)
        loss.set_xlabel("")
        figure.align_ylabels()
    return figure


def draw_rate(ax: Axes, points: list[LossPoint]) -> None:
    """The learning rate over tokens seen."""
    marker = "o" if len(points) == 1 else None
    rates = [point.lr for point in points]
    ax.plot([point.tokens for point in points], rates, color=TEACHER, linewidth=1.4, marker=marker, markersize=3)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=2))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.grid()
    ax.set_xlabel("tokens")
    ax.set_ylabel("rate")


def draw_loss(ax: Axes, points: list[LossPoint]) -> None:
    """Loss over tokens seen, as logged (faint) and averaged over a tenth of the stage."""
    points = [point for point in points if math.isfinite(point.loss)]
    tokens, losses = [point.tokens for point in points], [point.loss for point in points]
    reach = len(points) // 20
    smooth = [_mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))]
    if reach:
        ax.plot(tokens, losses, color=STUDENT, linewidth=0.8, alpha=0.35)
    ax.plot(tokens, smooth, color=STUDENT, linewidth=1.6, marker="o" if len(points) == 1 else None, markersize=3)
    if losses and min(losses) > 0 and max(losses) > 8 * min(losses):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(FuncFormatter(_count))
    ax.grid()
    ax.set_xlabel("tokens")
    ax.set_ylabel("loss")


def draw_kl(ax: Axes, metrics: Metrics, context: int) -> None:
    """KL to the teacher at one context length, one bar a variant, with standard errors where measured."""
    variants = {name: v for name, v in metrics.variants.items() if math.isfinite(v.kl.get(context, NAN))}
    values = [variant.kl[context] for variant in variants.values()]
    measured = [variant.kl_stderr.get(context, NAN) for variant in variants.values()]
    errors = [error if math.isfinite(error) else 0.0 for error in measured]
    rows = range(len(variants))
    ax.barh(rows, values, color=[VARIANT_COLOURS.get(name, OTHER) for name in variants], height=0.68)
    ax.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8)
    top = max((value + error for value, error in zip(values, errors, strict=True)), default=0) or 1
    for row, value, error in zip(rows, values, errors, strict=True):
        ax.text(value + error + 0.015 * top, row, fmt.nats(value), va="center", fontsize=8)
    ax.set_yticks(rows, list(variants))
    ax.set_xlim(0, 1.16 * top)
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"KL to the teacher at {context} tokens (nats per token)")


def draw_cache(ax: Axes, metrics: Metrics) -> None:
    """Bytes of cache for one sequence over its length, both axes logarithmic."""
    styles = {"teacher": "-", "student": "-", "window": (0, (2, 2))}
    for name, style in styles.items():
        table = metrics.variants[name].cache_bytes if name in metrics.variants else {}
        points = sorted((context, size) for context, size in table.items() if math.isfinite(size) and size > 0)
        if points:
            ax.plot(*zip(*points, strict=True), color=VARIANT_COLOURS[name], linestyle=style, linewidth=1.8, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    contexts = metrics.cache_contexts
    ax.xaxis.set_major_locator(FixedLocator(contexts[:: 1 + len(contexts) // 9]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.context(round(value))))
    ax.yaxis.set_major_locator(LogLocator(base=4, numticks=7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.size(value)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid()
    ax.set_xlabel("context (tokens)")
    ax.set_ylabel("cache of one sequence")
    legend_above(ax, ax.get_legend_handles_labels()[0])


def write_picture(run_dir: Path | str, path: Path | str) -> Path:
    """One PNG that sums a run up, for a README: plan, KL of the variants, cache bytes. 1800 pixels wide, white ground.

    Raises `UserError` when the run has no plan.yaml or no metrics.json.
    """
    run, path = read_run(run_dir), Path(path)
    context = run.metrics.headline_context
    if run.plan is None or context is None:
        raise UserError(
            f"no picture of '{run.folder}': it lacks plan.yaml or metrics.json; finish `subquad convert` first."
        )
    with matplotlib.rc_context(STYLE):
        save_png(_summary(run, run.plan, context), path, dpi=200)
    return path


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a picture on a white ground, and makes the folder for it where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi, facecolor="white")


def _summary(run: RunFiles, plan: Plan, context: int) -> Figure:
    plan_height = _plan_height(plan, 9, tallest=1.6)
    height = plan_height + 3.5
    figure = Figure(figsize=(9, height))
    title = 0.78 / height  # the part of the height that the lines of text take
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - title), w_pad=0.1, h_pad=0.08, hspace=0.03, wspace=0.04)
    figure.text(0.012, 1 - 0.14 * title, run.name, fontsize=12, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.5 * title, textwrap.fill(run.result_sentence(), 138), fontsize=8.5, va="top")
    axes = figure.subplot_mosaic([["plan", "plan"], ["kl", "cache"]], height_ratios=[plan_height, 2.5])
    draw_plan(axes["plan"], plan)
    draw_kl(axes["kl"], run.metrics, context)
    draw_cache(axes["cache"], run.metrics)
    return figure


def _plan_height(plan: Plan, width: float, tallest: float) -> float:
    """Inches for a plan drawn `width` inches wide: square cells where they fit, axis labels, a legend row for two."""
    table = plan.head_table()
    cell = min(0.92 * width / max(len(table), 1), 0.3)
    cells = min(max(cell * max(map(len, table), default=1), 1.0), tallest)
    return cells + 0.55 + 0.17 * math.ceil(len(mixer_colours(plan)) / 2)


def in_bytes(ax: Axes) -> None:
    """The horizontal axis counts bytes, of which there are none below 0: about six ticks at a power of two."""
    low, high = ax.get_xlim()
    ax.set_xlim(left=max(low, 0.0))
    ax.xaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2((high - max(low, 0.0)) / 6))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.size(value)))


def legend_above(ax: Axes, handles: list) -> None:
    """Adds a legend above the axes, in as many columns as the longest label leaves room for."""
    if not handles:
        return
    longest = max(len(handle.get_label()) for handle in handles)
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(max(72 // (longest + 5), 1), 3),
        borderaxespad=0.3,
        borderpad=0.2,
        handlelength=1.1,
        handleheight=0.9,
        columnspacing=1.4,
    )


def _square(layer: int, head: int, half: float = 0.44) -> Outline:
    left, right, top, bottom = layer - half, layer + half, head - half, head + half
    return Outline([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(value: float, _: int | None) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"
