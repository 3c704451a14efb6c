"""Report of `subquad bench`: a table for each batch size, conclusions in sentences, and a picture.

An extrapolated number is marked by `~` in a table, and by a hollow mark on a dashed line in the picture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.report.console import make_table, style_of
from subquad.report.plots import STUDENT, STYLE, VARIANT_COLOURS, save_png
from subquad.utils import format as fmt
from subquad.utils.format import NAN

NAMES = {
    "decode": "decoding",
    "prefill": "prefill",
    "first_token": "time to first token",
    "generate": "generate",
}
WIDTH = 120
Row: TypeAlias = Mapping[str, Any]
Report: TypeAlias = Mapping[str, Any]


def print_bench(report: Report, console: Console) -> None:
    """The tables, one a batch, and what follows from them."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # a file has room; 80 columns would break every cell
    for batch in report["settings"]["batches"]:
        console.print(_table(report, batch))
        console.print()
    for line in findings(report):
        console.print(Text(f"· {line}"))


def _table(report: Report, batch: int) -> Table:
    titles = " against ".join(f"{name} {about['title']}" for name, about in report["models"].items())
    title = f"{titles}; batch {batch}, {report['settings']['dtype']}; beside each speed its share of the roofline"
    speeds = ("prefill tokens/s", "first token", "decode tokens/s", "generate ms/token")
    table = make_table(title, ["context", "", *speeds, "peak memory", "cache"], words=(1,))
    for context in dict.fromkeys(row["context"] for row in report["cells"]):
        for index, name in enumerate(report["models"]):
            rows = {row["measure"]: row for row in _rows(report, name, batch) if row["context"] == context}
            cells = [
                _cell(rows["prefill"], fmt.integer(_number(rows["prefill"]["tokens_per_second"]))),
                _cell(rows["first_token"], _seconds(_number(rows["first_token"]["seconds"]))),
                _cell(rows["decode"], _figures(_number(rows["decode"]["tokens_per_second"]))),
                _cell(rows["generate"], _figures(1e3 * _number(rows["generate"]["seconds"]))),
                _peak(list(rows.values())),
                fmt.size(rows["decode"]["cache_bytes"]),
            ]
            first = "" if index else fmt.context(context)
            table.add_row(first, name, *cells, style=style_of(name))
    return table


def _cell(row: Row, text: str) -> str:
    if row["seconds"] is None:
        return fmt.DASH
    return f"{'' if row['measured'] else '~'}{text} [not bold dim]{fmt.percent(row['roofline']['share'], 0):>4}[/]"


def _seconds(value: float) -> str:
    return f"{_figures(1e3 * value)}{fmt.NBSP}ms" if value < 1 else fmt.duration(value)


def _peak(rows: Sequence[Row]) -> str:
    """The highest of all measures."""
    highest = max(rows, key=lambda row: row["peak_bytes"] or 0)
    return f"{'' if highest['measured'] else '~'}{fmt.size(_number(highest['peak_bytes']))}"


def _figures(value: float) -> str:
    """Three figures, more where they stand before the point."""
    return fmt.DASH if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None) -> float:
    return NAN if value is None else value


def _rows(report: Report, name: str, batch: int, measure: str | None = None) -> list[Row]:
    return [
        row
        for row in report["cells"]
        if (row["model"], row["batch"]) == (name, batch) and measure in (None, row["measure"])
    ]


def findings(report: Report) -> list[str]:
    """Conclusions, a line each: overtaking, growth with context, the roofline, spread, extrapolation."""
    roof, machine = report["roof"], report["machine"]
    where = f"{machine['processor']}, {fmt.count(machine['threads'], 'thread')}"
    return [
        *_overtakes(report),
        *_growth(report),
        *report["notes"],
        f"the machine ({where if machine['device'] == 'cpu' else machine['device']}) copies "
        f"{roof['bytes_per_second'] / 1e9:,.1f} GB/s and multiplies matrices at "
        f"{roof['flops_per_second'] / 1e9:,.0f} GFLOP/s in {report['settings']['dtype']}: the roofline",
        *_spread(report),
        *_extrapolated(report),
    ]


def _overtakes(report: Report) -> list[str]:
    """Contexts from which the first model is faster, a line for each batch size."""
    lines = []
    for batch in report["settings"]["batches"]:
        crossings = [crossing for crossing in report["overtakes"] if crossing["batch"] == batch]
        parts = [f"{NAMES[crossing['measure']]} {_where(crossing)}" for crossing in crossings]
        if parts:
            first, second = report["models"]
            lines.append(f"the {first} overtakes the {second}, batch {batch}: {', '.join(parts)}")
    return lines


def _where(crossing: Mapping[str, Any]) -> str:
    doubt = " (extrapolated)" if crossing["extrapolated"] else ""
    return (f"from {crossing['context']:,.0f} tokens on" if crossing["where"] == "from" else crossing["where"]) + doubt


def _growth(report: Report) -> list[str]:
    """Time of a token of `generate` at the longest context over that at the shortest."""
    lines = []
    for batch in report["settings"]["batches"]:
        parts, doubt = [], ""
        for name in report["models"]:
            rows = [row for row in _rows(report, name, batch, "generate") if row["seconds"]]
            if len(rows) > 1:
                parts.append(f"{name} ×{rows[-1]['seconds'] / rows[0]['seconds']:.2f}")
                doubt = doubt if rows[-1]["measured"] else " (extrapolated)"
        if parts:
            ends = f"{fmt.context(rows[-1]['context'])} against {fmt.context(rows[0]['context'])}"
            lines.append(f"a token of generate at {ends} tokens, batch {batch}: {', '.join(parts)}{doubt}")
    return lines


def _spread(report: Report) -> list[str]:
    measured = [row for row in report["cells"] if row["measured"]]
    if not measured:
        return []
    worst = max(measured, key=_apart)
    rounds = [row["samples"] for row in measured]
    where = f"{NAMES[worst['measure']]} of the {worst['model']} at {fmt.context(worst['context'])} tokens"
    return [
        f"medians of {min(rounds)} to {max(rounds)} rounds; the quartiles are at most {fmt.percent(_apart(worst), 0)} "
        f"of the median apart ({where}, batch {worst['batch']})"
    ]


def _apart(row: Row) -> float:
    return float((row["high"] - row["low"]) / row["seconds"])


def _extrapolated(report: Report) -> list[str]:
    """Extrapolations, a line for each measure and formula: beyond which context, why, and how accurate."""
    several = len(report["settings"]["batches"]) > 1
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in report["cells"]:
        if not row["measured"] and row["seconds"] is not None:
            model = row["model"] + (f" at batch {row['batch']}" if several else "")
            groups.setdefault((row["measure"], row["formula"]), {}).setdefault(model, []).append(row)
    lines = []
    for (measure, formula), by_model in groups.items():
        parts = [
            f"{model} beyond {fmt.context(max(rows[0]['fitted_to'], default=0))} tokens "
            f"(too little {rows[0]['too_little']}; known within {fmt.percent(max(map(_apart, rows)), 0)})"
            for model, rows in by_model.items()
        ]
        lines.append(f"~ extrapolated, N being the context: {NAMES[measure]} as {formula}: {', '.join(parts)}")
    return lines


def draw_bench(report: Report, path: Path) -> None:
    """Decoding speed and cache over context, one line a model and batch, as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speed, cache = figure.subplots(1, 2)
        cache.set_yscale("log", base=2)
        draw_speed(speed, report, "decode")
        _draw(cache, report, "decode", "cache_bytes", "cache", fmt.size)
        cache.yaxis.set_major_locator(LogLocator(base=4, numticks=7))
        cache.yaxis.set_minor_locator(NullLocator())
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=3)
        save_png(figure, path, dpi=200)


def draw_speed(ax: Axes, report: Report, measure: str) -> None:
    """Tokens per second of all sequences over context, one line a model and batch; hollow where extrapolated."""
    _draw(ax, report, measure, "tokens_per_second", f"{NAMES[measure]} (tokens/s)", _figures)
    ax.set_ylim(bottom=0)


def _draw(ax: Axes, report: Report, measure: str, key: str, label: str, text: Callable[[float], str]) -> None:
    markers = "osD^v"
    for name in report["models"]:
        for index, batch in enumerate(report["settings"]["batches"]):
            rows = [row for row in _rows(report, name, batch, measure) if row[key] is not None]
            known = key == "cache_bytes"  # by the plan's arithmetic: at every context, exactly
            measured = [row for row in rows if known or row["measured"]]
            colour, marker = VARIANT_COLOURS.get(name, STUDENT), markers[index % len(markers)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
            several = f", batch {batch}" if len(report["settings"]["batches"]) > 1 else ""
            ax.plot(*_points(measured, key), linewidth=1.8, label=f"{name}{several}", **style)
            if len(measured) < len(rows):
                extrapolated = rows[max(len(measured) - 1, 0) :]
                ax.plot(*_points(extrapolated, key), linestyle="--", linewidth=1.2, color=colour, zorder=1)
                ax.plot(
                    *_points(rows[len(measured) :], key),
                    linestyle="none",
                    markerfacecolor="white",
                    label=f"{name}{several}, extrapolated",
                    **style,
                )
    contexts = [*dict.fromkeys(row["context"] for row in report["cells"])]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(contexts[:: 1 + len(contexts) // 9]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.context(round(value))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    ax.set_xlabel("context (tokens)")
    ax.set_ylabel(label)
    ax.grid()


def _points(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    return [row["context"] for row in rows], [row[key] for row in rows]
