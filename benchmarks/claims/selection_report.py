"""The tables and the picture of selection's claims."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

from benchmarks.claims.retrieval_report import text_of, what
from benchmarks.claims.runs import Mean
from subquad.report.plots import STYLE, save_png
from subquad.utils import format as fmt
from subquad.utils.token_cost import TRAINING

COLOURS = {
    "kl": "#d04f6b",
    "uniform": "#7d8794",
    "alignment-loss": "#dd8a2b",
    "recall": "#4f7fcf",
    "halo": "#2f93a8",
}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    if "estimators" in report:
        console.print(estimators_table(report["estimators"], report["measure"]))
    if "budgets" in report:
        console.print(budgets_table(report["budgets"], report["measure"]))
    for task in dict.fromkeys(run["settings"]["task"] for run in report.get("greedy", [])):
        runs = [run for run in report["greedy"] if run["settings"]["task"] == task]
        console.print(greedy_table(task, runs))


def forward_equivalent(selection: Mapping[str, Any]) -> float:
    """Tokens of a forward pass that a selection is worth, a training step being TRAINING of them."""
    spent = selection["spent"]
    return float(spent["forward_tokens"] + TRAINING * spent["training_tokens"])


def less_full(cells: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The KL of every cell's students less that of the full procedure's, seed by seed."""
    full = [run["kl"] for run in cells[0]["runs"]]
    return [[run["kl"] - kl for run, kl in zip(cell["runs"], full, strict=True)] for cell in cells]


def estimators_table(cells: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """Agreement, cost, and what the plan is worth: its KL, and how that differs from the full procedure's, by seed."""
    seeds = len(cells[0]["runs"])
    title = f"selectors against the full procedure: mean of {seeds} seeds ± spread of one"
    table = Table(title=title, title_justify="left")
    agreement, cost = ("rank correlation", "first quarter", "with itself"), ("tokens, as forward", "of full", "seconds")
    table.add_column("selector")
    for heading in (*agreement, *cost, "KL", "KL, less full's", what(measure)):
        table.add_column(heading, justify="right")
    full = fmean(map(forward_equivalent, cells[0]["selections"]))
    for cell, differences in zip(cells, less_full(cells), strict=True):
        row = [""] * 6
        if cell["selections"]:
            cost = fmean(map(forward_equivalent, cell["selections"]))
            seconds = fmean(selection["seconds"] for selection in cell["selections"])
            row[3:] = f"{cost:,.0f}", fmt.percent(cost / full), f"{seconds:,.0f}"
        if cell["spearman"]:
            row[0] = Mean.of(cell["spearman"]).text(2)
            row[1] = fmt.percent(fmean(cell["overlap"]), 0)
        if cell["repeats"]:
            row[2] = Mean.of(cell["repeats"]).text(2)
        runs = cell["runs"]
        kl = Mean.of([run["kl"] for run in runs]).text()
        less = "" if cell is cells[0] else Mean.of(differences).text(signed=True)
        table.add_row(cell["name"], *row, kl, less, text_of([run["coverage"]["mean"] for run in runs], measure))
    return table


def budgets_table(cells: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """KL and retrieval over the share of attention kept."""
    seeds = len(cells[0]["runs"])
    table = Table(title=f"after the same distillation: mean of {seeds} seeds ± spread of one", title_justify="left")
    for heading in ("attention kept", "units", "selector", "KL", "perplexity", what(measure)):
        table.add_column(heading, justify="left" if heading == "selector" else "right")
    for cell in cells:
        runs = cell["runs"]
        table.add_row(
            fmt.percent(cell["share"]),
            str(cell["count"]),
            cell["name"],
            Mean.of([run["kl"] for run in runs]).text(),
            Mean.of([run["perplexity"] for run in runs]).text(2),
            text_of([run["coverage"]["mean"] for run in runs], measure),
        )
    return table


def greedy_table(task: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """Test scores over how many units are replaced; validation in brackets."""
    table = Table(
        title=f"{task}, no training after alignment: test accuracy (on the questions that chose), {len(runs)} seeds",
        title_justify="left",
    )
    table.add_column("order")
    for count in runs[0]["counts"]:
        table.add_column(f"{count} replaced", justify="right")
    for way in runs[0]["scores"]:
        runs_by_place = [[run["scores"][way][place] for run in runs] for place in range(len(runs[0]["counts"]))]
        table.add_row(
            way,
            *(
                f"{text_of([run['test'] for run in at], 'accuracy')} ({100 * fmean(o['validation'] for o in at):.1f}%)"
                for at in runs_by_place
            ),
        )
    table.caption = f"the teacher: {100 * fmean(run['base'] for run in runs):.1f}%"
    return table


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Worth of students over the cost of selection, in KL and in retrieval; KL over attention kept."""
    cells, measure = report["estimators"], report["measure"]
    scale = 100.0 if measure == "accuracy" else 1.0
    coverage = [[scale * run["coverage"]["mean"] for run in cell["runs"]] for cell in cells]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15.6 if "budgets" in report else 10.4, 4.2), layout="constrained")
        kl_axes, retrieval_axes, *others = figure.subplots(1, 3 if "budgets" in report else 2)
        _draw_worth(kl_axes, cells, less_full(cells))
        kl_axes.set_ylabel("held-out KL, less the full procedure's of the same seed")
        _draw_worth(retrieval_axes, cells, coverage)
        retrieval_axes.set_ylabel(what(measure) + (" (%)" if measure == "accuracy" else ""))
        for ax in others:
            _draw_budgets(ax, report["budgets"])
        save_png(figure, path, dpi=150)


def _draw_worth(ax: Axes, cells: Sequence[Mapping[str, Any]], values: Sequence[Sequence[float]]) -> None:
    """Values of every cell over its cost; a selector that measures nothing is a line.

    Names stand beside their marks, in the order of height.
    """
    full = fmean(map(forward_equivalent, cells[0]["selections"]))
    spots = []
    for cell, of_seeds in zip(cells, values, strict=True):
        mean = Mean.of(of_seeds)
        if not cell["selections"]:
            ax.axhline(mean.mean, color="#7d8794", linewidth=0.8, linestyle=":")
            ax.annotate(cell["name"], (1, mean.mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            continue
        cost = fmean(map(forward_equivalent, cell["selections"])) / full
        ax.errorbar(cost, mean.mean, mean.spread, color="#4f7fcf", marker="o", markersize=4, linewidth=1, capsize=2)
        spots.append((mean.mean, cost, cell["name"]))
    ax.set_xscale("log")
    ax.set_xlim(0.0005, 60)
    low, high = ax.get_ylim()
    gap = (high - low) * 0.035  # between two names on one side
    heights: dict[int, float] = {}  # of the last name, by column: the cheap, the others, the dear
    for height, cost, name in sorted(spots):
        column, align = bisect((0.05, 0.2), cost), "right" if cost < 0.05 else "left"
        heights[column] = max(height, heights.get(column, -float("inf")) + gap)
        spot = cost * (1.3 if align == "left" else 0.77), heights[column]
        look = {"arrowprops": {"arrowstyle": "-", "lw": 0.3}, "fontsize": 7, "va": "center", "ha": align}
        ax.annotate(name, (cost, height), xytext=spot, **look)
    ax.axvline(0.1, color=STYLE["text.color"], linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    ax.set_xlabel("cost of selecting, of retraining every candidate")
    ax.grid()


def _draw_budgets(ax: Axes, cells: Sequence[Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(cell["name"] for cell in cells):
        line_cells = [cell for cell in cells if cell["name"] == name]
        means = [Mean.of([run["kl"] for run in cell["runs"]]) for cell in line_cells]
        ax.errorbar(
            [cell["share"] for cell in line_cells],
            [m.mean for m in means],
            [m.spread for m in means],
            color=COLOURS.get(name, "#7d8794"),
            label=name,
            marker="o",
            markersize=4,
            capsize=2,
        )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    ax.set_xlabel("attention kept")
    ax.set_ylabel("held-out KL after distillation (nats per token)")
    ax.grid()
    ax.legend()
