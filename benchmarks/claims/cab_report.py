"""The tables and the picture of CAB's claims for language."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.claims.report import mean, values
from subquad.report.plots import STYLE, save_png
from subquad.utils import format as fmt

COLOURS = {"labels": "#7d8794", "distillation": "#4f7fcf", "matrix + hidden": "#c28a2c", "bridge": "#d04f6b"}
DASHES = {"fresh": "-", "teacher": "--"}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    for part in ("stages", "sides"):
        if part in report:
            console.print(cells_table(report[part], part))
    if "cost" in report:
        console.print(cost_table(report["cost"]))


def cells_table(cells: list[Mapping[str, Any]], part: str) -> Table:
    """Means over seeds, with the spread of a run."""
    teacher = cells[0]["runs"][0]["teacher_perplexity"]
    seeds = len(cells[0]["runs"])
    title = f"{part}: held-out text, mean of {seeds} seeds ± spread of one; the teacher's perplexity is {teacher:.1f}"
    table = Table(title=title, title_justify="left")
    varied = [key for key in ("tokens", "layers", "way", "start", "sides", "memory") if len(values(cells, key)) > 1]
    for key in varied:
        table.add_column(key)
    for heading in ("rates", "perplexity", "KL", "top-1"):
        table.add_column(heading, justify="right")
    for cell in cells:
        runs, settings = cell["runs"], cell["settings"]
        named = [f"{settings[key]:,}" if key == "tokens" else str(settings[key]) for key in varied]
        rates = " / ".join(f"{rate:g}" for rate in runs[0]["settings"]["rates"])
        numbers = [mean(runs, "perplexity").text(1), mean(runs, "kl").text(), fmt.percent(mean(runs, "top1").mean)]
        table.add_row(*named, rates, *numbers)
    return table


def cost_table(rows: list[Mapping[str, Any]]) -> Table:
    """Seconds and activations of a step."""
    title = f"a step of {rows[0]['tokens']:,} tokens, by the length of its sequences"
    table = Table(title=title, title_justify="left")
    for heading in ("length", "stage", "seconds", "activations"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in rows:
        table.add_row(
            fmt.integer(row["length"]), row["stage"], f"{row['seconds']:.2f}", fmt.size(row["activation_bytes"])
        )
    return table


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Perplexity over tokens for each way and start, one panel for each number of layers."""
    cells = report["stages"]
    panels, budgets = sorted(values(cells, "layers"), reverse=True), sorted(values(cells, "tokens"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels) + 0.4, 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, layers in zip(axes, panels, strict=True):
            layer_cells = [cell for cell in cells if cell["settings"]["layers"] == layers]
            for way, start in dict.fromkeys(
                (cell["settings"]["way"], cell["settings"]["start"]) for cell in layer_cells
            ):
                line = [c for c in layer_cells if (c["settings"]["way"], c["settings"]["start"]) == (way, start)]
                means = [mean(cell["runs"], "perplexity") for cell in line]
                ax.errorbar(
                    [cell["settings"]["tokens"] for cell in line], [m.mean for m in means], [m.spread for m in means],
                    color=COLOURS[way], linestyle=DASHES[start], label=f"{way}, {start}", marker="o", markersize=4,
                    capsize=2,
                )  # fmt: skip
            ax.set_title(f"{layers} layers")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.xaxis.set_major_locator(FixedLocator(budgets))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
            ax.set_xlabel("tokens, all stages together")
            ax.grid(True)
        axes[0].set_ylabel("held-out perplexity")
        axes[0].legend(fontsize=7, handlelength=3.5)
    save_png(figure, path, dpi=150)
