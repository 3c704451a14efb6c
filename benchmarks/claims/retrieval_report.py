"""The tables and the picture of retrieval-aware distillation's claims."""

from collections.abc import Mapping, Sequence
from math import log2
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator
from rich.console import Console
from rich.table import Table

from benchmarks.claims.runs import Mean
from subquad.report.plots import STYLE, save_png
from subquad.utils import format as fmt

COLOURS = {"scored": "#dd8a2b", "random": "#7d8794", "uniform layers": "#4f7fcf", "best layers": "#2f93a8"}
LABELS = {
    "scored": "heads by score",
    "random": "heads at random",
    "smaller state": "heads by score, smaller states",
    "parallel": "heads by score, parallel join",
}
LOOKS: dict[str, dict[str, Any]] = {
    "smaller state": {"color": "#a8612f", "marker": "v", "linestyle": ":"},
    "parallel": {"color": "#d04f6b", "marker": "D", "linestyle": "none"},
}
CACHE_CONTEXT = "2048"


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables."""
    measure = report["measure"]
    if "ablation" in report:
        console.print(ablation_table(report["ablation"], measure))
    for part in ("heads", "join", "state"):
        if part in report:
            console.print(cells_table(report[part], part, measure))
    if "serving" in report:
        console.print(serving_table(report["serving"]))


def text_of(values: Sequence[float], measure: str) -> str:
    """Coverage as a percentage, or nats lost."""
    mean = Mean.of(values)
    if measure == "logprob":
        return mean.text(2)
    spread = f" ± {100 * mean.spread:.1f}" if mean.count > 1 else ""
    return f"{100 * mean.mean:.1f}{spread}%"


def what(measure: str) -> str:
    return "retrieval coverage" if measure == "accuracy" else "nats lost per answer token"


def ablation_table(rows: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """Scores of the teacher without some of its heads."""
    table = Table(title=f"the teacher without some of its heads: {what(measure)}", title_justify="left")
    for heading in ("heads silenced", "the first by score", "at random"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = ([result["mean"] for result in row[kind]] for kind in ("scored", "random"))
        table.add_row(str(row["count"]), *(text_of(result, measure) for result in values))
    return table


def cells_table(cells: Sequence[Mapping[str, Any]], part: str, measure: str) -> Table:
    """Means over seeds, with the spread of a run."""
    seeds = len(cells[0]["runs"])
    table = Table(title=f"{part}: mean of {seeds} seeds ± spread of one", title_justify="left")
    varied = [key for key in cells[0]["settings"]]
    tasks = [task for task in cells[0]["runs"][0]["coverage"] if task != "mean"]
    for key in varied:
        table.add_column(key)
    for heading in ("heads", what(measure), *tasks, "KL", "cache at 2k"):
        table.add_column(heading, justify="right")
    for cell in cells:
        runs = cell["runs"]
        by_task = (text_of([run["coverage"][task] for run in runs], measure) for task in ("mean", *tasks))
        table.add_row(
            *(str(cell["settings"][key]) for key in varied),
            str(len(runs[0]["settings"]["heads"])),
            *by_task,
            Mean.of([run["kl"] for run in runs]).text(),
            fmt.size(fmean(run["cache_bytes"][CACHE_CONTEXT] for run in runs)),
        )
    return table


def serving_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Decoding, one sequence."""
    table = Table(title="decoding one sequence: tokens/s, median (quartiles)", title_justify="left")
    for heading in ("context", "kept by", "attention heads", "cache", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        speed = f"{row['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})"
        size = fmt.size(row["cache_bytes"])
        table.add_row(f"{row['context']:,}", row["plan"], str(row["attention_heads"]), size, speed)
    return table


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Coverage over cache bytes, all families; whiskers are the spread of a run."""
    measure, heads = report["measure"], report["heads"]
    nothing = [cell for cell in heads if cell["settings"]["count"] == 0]
    families = {family: [c for c in heads if c["settings"]["family"] == family] for family in COLOURS}
    families["random"] += nothing
    most_heads = max(cell["settings"]["count"] for cell in heads)
    families["smaller state"] = [c for c in report.get("state", []) if c["settings"]["count"] == most_heads]
    families["parallel"] = [
        cell
        for cell in report.get("join", [])
        if (cell["settings"]["join"], cell["settings"]["join_start"]) == ("parallel", "identity")
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        ax = figure.subplots()
        for family, cells in families.items():
            points = sorted(
                (fmean(run["cache_bytes"][CACHE_CONTEXT] for run in cell["runs"]), _coverage(cell)) for cell in cells
            )
            if points:
                sizes, means = [size for size, _ in points], [mean for _, mean in points]
                values, spreads = [mean.mean for mean in means], [mean.spread for mean in means]
                look = {"marker": "o", "linestyle": "-", "color": COLOURS.get(family)} | LOOKS.get(family, {})
                label = LABELS.get(family, family)
                ax.errorbar(sizes, values, yerr=spreads, markersize=4, capsize=2, label=label, **look)
        ax.axhline(1.0 if measure == "accuracy" else 0.0, color=STYLE["text.color"], linewidth=0.6, linestyle=":")
        ax.xaxis.set_major_locator(MultipleLocator(2.0 ** round(log2(ax.get_xlim()[1] / 8))))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.size(value)))
        if measure == "accuracy":
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        ax.set_xlabel("cache of one sequence at 2,048 tokens (float32)")
        ax.set_ylabel(what(measure))
        ax.grid()
        ax.legend(fontsize=8, frameon=True, facecolor="white", edgecolor="none", framealpha=0.9)
        save_png(figure, path, dpi=160)


def _coverage(cell: Mapping[str, Any]) -> Mean:
    return Mean.of([run["coverage"]["mean"] for run in cell["runs"]])
