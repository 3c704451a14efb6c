"""The tables and the picture of CAB's claims for vision."""

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

COLOURS = {"labels": "#7d8794", "soft distillation": "#4f7fcf", "matrix + hidden": "#c28a2c", "bridge": "#d04f6b"}
DASHES = {"fresh": "-", "teacher": "--"}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    for part in ("stages", "sides"):
        if part in report:
            console.print(cells_table(report[part], part, report["teacher_accuracy"]))


def cells_table(cells: list[Mapping[str, Any]], part: str, teacher: float) -> Table:
    """Means over seeds, with the spread of a run."""
    seeds = len(cells[0]["runs"])
    counted = fmt.integer(cells[0]["runs"][0]["count"])
    title = (
        f"{part}: {counted} test images, mean of {seeds} seeds ± spread of one; the teacher's accuracy is {teacher:.1%}"
    )
    table = Table(title=title, title_justify="left")
    varied = [key for key in ("share", "way", "start", "sides", "memory") if len(values(cells, key)) > 1]
    for key in varied:
        table.add_column("images" if key == "share" else key)
    for heading in ("rates", "accuracy (%)", "as the teacher (%)", "KL"):
        table.add_column(heading, justify="right")
    for cell in cells:
        runs, settings = cell["runs"], cell["settings"]
        named = [f"{settings[key]:.0%}" if key == "share" else str(settings[key]) for key in varied]
        rates = " / ".join(f"{rate:g}" for rate in runs[0]["settings"]["rates"])
        shares = [mean([{key: 100 * run[key]} for run in runs], key).text(1) for key in ("accuracy", "agreement")]
        table.add_row(*named, rates, *shares, mean(runs, "kl").text())
    return table


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy over the share of the images, for each way and start."""
    cells = report["stages"]
    shares = sorted(values(cells, "share"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.subplots()
        for way, start in dict.fromkeys((cell["settings"]["way"], cell["settings"]["start"]) for cell in cells):
            line = [c for c in cells if (c["settings"]["way"], c["settings"]["start"]) == (way, start)]
            means = [mean(cell["runs"], "accuracy") for cell in line]
            ax.errorbar(
                [cell["settings"]["share"] for cell in line], [100 * m.mean for m in means],
                [100 * m.spread for m in means], color=COLOURS[way], linestyle=DASHES[start], label=f"{way}, {start}",
                marker="o", markersize=4, capsize=2,
            )  # fmt: skip
        ax.axhline(100 * report["teacher_accuracy"], color="#7d8794", linewidth=1, linestyle=":", label="teacher")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(shares))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        ax.set_xlabel("images to train on")
        ax.set_ylabel("test accuracy (%)")
        ax.grid(True)
        ax.legend(fontsize=7, handlelength=3.5)
    save_png(figure, path, dpi=150)
