"""The tables and the picture of MOHAWK's claims."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.claims.runs import Mean
from subquad.report.plots import STYLE, save_png
from subquad.utils import format as fmt

COLOURS = {"matrix + hidden + logits": "#d04f6b", "hidden + logits": "#4f7fcf", "logits": "#7d8794"}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    for part, table in (("stages", cells_table), ("mlp", cells_table), ("stages", speed_table)):
        if part in report:
            console.print(table(report[part], part))
    if "matrices" in report:
        console.print(each_table(report["matrices"]["each"]))
        console.print(trained_table(report["matrices"]["trained"]))


def cells_table(cells: list[Mapping[str, Any]], part: str) -> Table:
    """Means over seeds, with the spread of a run."""
    seeds = len(cells[0]["runs"])
    table = Table(
        title=f"{part}: held-out KL in nats per token; mean of {seeds} seeds ± spread of one", title_justify="left"
    )
    varied = [key for key in ("tokens", "mixer", "start", "way", "trainable") if len(values(cells, key)) > 1]
    for key in varied:
        table.add_column(key)
    for heading in ("rates", "KL", "top-1", "copying", "dictionary, log p"):
        table.add_column(heading, justify="right")
    for cell in cells:
        runs, settings = cell["runs"], cell["settings"]
        named = [f"{settings[key]:,}" if key == "tokens" else str(settings[key]) for key in varied]
        numbers = [
            " / ".join(f"{rate:g}" for rate in runs[0]["settings"]["rates"]),
            mean(runs, "kl").text(),
            fmt.percent(mean(runs, "top1").mean),
            fmt.percent(fmean(run["copy"]["accuracy"] for run in runs)),
            f"{fmean(run['dictionary']['logprob'] for run in runs):.2f}",
        ]
        table.add_row(*named, *numbers)
    return table


def speed_table(cells: list[Mapping[str, Any]], part: str) -> Table:
    """Cost of each stage: means over the runs with the most tokens."""
    most = max(cell["settings"]["tokens"] for cell in cells)
    stages = [
        stage for cell in cells if cell["settings"]["tokens"] == most for run in cell["runs"] for stage in run["stages"]
    ]
    table = Table(title="what a stage costs", title_justify="left")
    for heading in ("stage", "tokens/s", "of the teacher's forward", "peak memory"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name in dict.fromkeys(stage["name"] for stage in stages):
        same_stages = [stage for stage in stages if stage["name"] == name]
        table.add_row(
            name,
            f"{fmean(stage['tokens_per_second'] for stage in same_stages):,.0f}",
            fmt.percent(fmean(stage["share_of_bare_forward"] for stage in same_stages), 0),
            fmt.size(max(stage["peak_memory_bytes"] for stage in same_stages)),
        )
    return table


def each_table(each: Mapping[str, Any]) -> Table:
    """Families of matrices."""
    table = Table(title="a teacher's matrices, each held by the best of a family: |M - A|_F", title_justify="left")
    for heading in ("family", "error"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family, errors in each["errors"].items():
        table.add_row(family, Mean.of(errors).text())
    return table


def trained_table(runs: list[Mapping[str, Any]]) -> Table:
    """Mixers after the matrix stage."""
    table = Table(title="mixers after a matrix stage: mean |M - A|_F on held-out text", title_justify="left")
    for heading in ("mixer", "state", "before", "after"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    for mixer, state in dict.fromkeys((run["settings"]["mixer"], run["settings"]["state_dim"]) for run in runs):
        mixer_runs = [run for run in runs if (run["settings"]["mixer"], run["settings"]["state_dim"]) == (mixer, state)]
        table.add_row(mixer, str(state), mean(mixer_runs, "before").text(2), mean(mixer_runs, "after").text(2))
    return table


def values(cells: list[Mapping[str, Any]], key: str) -> set[Any]:
    return {cell["settings"][key] for cell in cells}


def mean(runs: list[Mapping[str, Any]], key: str) -> Mean:
    return Mean.of([run[key] for run in runs])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """KL over tokens for each way, one panel for each mixer and start."""
    cells = report["stages"]
    panels = list(dict.fromkeys((cell["settings"]["mixer"], cell["settings"]["start"]) for cell in cells))
    budgets = sorted(values(cells, "tokens"))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 0.4, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, (mixer, start) in zip(axes, panels, strict=False):
            for way, colour in COLOURS.items():
                line_cells = [
                    cell
                    for cell in cells
                    if (cell["settings"]["mixer"], cell["settings"]["start"], cell["settings"]["way"])
                    == (mixer, start, way)
                ]
                tokens = [cell["settings"]["tokens"] for cell in line_cells]
                means = [mean(cell["runs"], "kl") for cell in line_cells]
                ax.errorbar(
                    tokens, [m.mean for m in means], [m.spread for m in means],
                    color=colour, label=way, marker="o", markersize=4, capsize=2,
                )  # fmt: skip
            whose = "the teacher\u2019s" if start == "teacher" else "fresh"
            ax.set_title(f"{mixer}, {whose} projections", fontsize=9)
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(budgets))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
            ax.margins(x=0.15)
            ax.grid(True)
        for ax in axes[-columns:]:
            ax.set_xlabel("tokens, all stages together")
        for ax in axes[::columns]:
            ax.set_ylabel("held-out KL (nats per token)")
        axes[0].legend(fontsize=8)
        save_png(figure, path, dpi=150)
