"""The tables and the picture of a measured report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.ops.contenders import MODES
from benchmarks.ops.measures import GROWTH_STEPS, MATMUL
from subquad.report.console import make_table
from subquad.report.plots import MIXER_COLOURS, SPARE_COLOURS, STYLE, save_png
from subquad.utils import format as fmt


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """All tables, after a warning if the machine was not ours alone."""
    taken = report["cores_taken_by_others"]
    if taken > 0.1:
        console.print(f"Other processes took {taken:.1f} cores: these times say little. Run it again, alone.")
    labels = {c["name"]: c["label"] for c in report["contenders"]}
    for mode in MODES if "times" in report else ():
        console.print(times_table(report, mode, labels))
        console.print(faster_table(report, mode, labels))
    makers = {"decode": decode_table, "memory": memory_table, "compile": compile_table}
    for part, table in makers.items():
        if part in report:
            console.print(table(report, labels))


def times_table(report: Mapping[str, Any], mode: str, labels: Mapping[str, str]) -> Table:
    """Milliseconds, spread, and share of the machine's limit."""
    title = f"{mode}: ms and share of a matrix product's speed; in grey, from minimum to maximum"
    rows = [row for row in report["times"] if row["mode"] == mode]
    lengths = sorted({row["length"] for row in rows})
    table = _table(title, "", *(f"{fmt.context(length)} tokens" for length in lengths))
    for name in [*labels, MATMUL]:
        cells = {row["length"]: _time_cell(row) for row in rows if row["contender"] == name}
        table.add_row(labels.get(name, "one matrix product"), *(cells[length] for length in lengths))
    return table


def _time_cell(row: Mapping[str, Any]) -> str:
    if row["seconds"] is None:
        return fmt.DASH
    extremes = f"[dim]{_ms(row['low'])}–{_ms(row['high'])}[/]"
    if row["contender"] == MATMUL:
        return f"{_ms(row['seconds'])}\n{extremes}\n[dim]{row['flops_per_second'] / 1e9:,.0f} GFLOP/s[/]"
    return f"{_ms(row['seconds'])} [dim]{fmt.percent(row['share_of_matmul']):>6}[/]\n{extremes}"


def faster_table(report: Mapping[str, Any], mode: str, labels: Mapping[str, str]) -> Table:
    """Ours against each rival."""
    rows = [row for row in report["faster"] if row["mode"] == mode]
    lengths = sorted({row["length"] for row in report["times"]})
    title = f"{mode}: times faster than the rival"
    table = _table(title, "", *(f"{fmt.context(length)} tokens" for length in lengths))
    pairs = dict.fromkeys((row["rival"], row["contender"]) for row in rows)
    for rival, name in sorted(pairs, key=lambda pair: list(labels).index(pair[0])):
        cells = {r["length"]: r["faster"]["median"] for r in rows if (r["rival"], r["contender"]) == (rival, name)}
        table.add_row(f"{labels[name]} : {labels[rival]}", *(_times(cells.get(length)) for length in lengths))
    return table


def decode_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Microseconds a step, early and late."""
    positions = report["settings"]["positions"]
    headings = ["", "batch", "state", *(f"step at {p:,}" for p in positions), "copy of the state"]
    table = _table("decoding: µs a step (median)", *headings, "step : copy", "late : early")
    for row in report["decode"]:
        steps = [row["step"].get(p, row["step"].get(str(p)))["seconds"] for p in positions]
        table.add_row(
            labels[row["contender"]],
            str(row["batch"]),
            fmt.size(row["state_bytes"]),
            *(f"{1e6 * seconds:,.0f}" for seconds in steps),
            f"{1e6 * row['copy']['seconds']:,.1f}",
            _times(row["step_over_copy"]["median"]),
            _times(row["late_over_early"]["median"]),
        )
    return table


def memory_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Peak of forward and backward, and growth in decoding."""
    length = fmt.context(report["settings"]["memory_length"])
    steps = f"in {GROWTH_STEPS:,} steps"
    peak = f"peak of forward+backward at {length} tokens"
    table = _table("memory", "", peak, f"the state grows {steps}", f"the process grows {steps}")
    for row in report["memory"]:
        sizes = [row.get(key) for key in ("peak_bytes", "state_growth_bytes", "process_growth_bytes")]
        table.add_row(labels[row["contender"]], *(fmt.DASH if size is None else fmt.size(size) for size in sizes))
    return table


def compile_table(report: Mapping[str, Any], labels: Mapping[str, str]) -> Table:
    """Eager and compiled."""
    length = report["settings"]["compile_length"]
    title = f"torch.compile at {fmt.context(length)} tokens: ms"
    table = _table(title, "", "mode", "eager", "compiled", "times faster", "first call (s)")
    for row in report["compile"]:
        if "failed" in row:
            table.add_row(labels[row["contender"]], row["mode"], row["failed"])
            continue
        table.add_row(
            labels[row["contender"]],
            row["mode"],
            _ms(row["eager"]["seconds"]),
            _ms(row["compiled"]["seconds"]),
            _times(row["faster"]["median"]),
            f"{row['compile_seconds']:.0f}",
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = make_table(f"\n{title}", headings)
    table.min_width = len(title)  # a title is wrapped at the table's width
    return table


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _times(value: float | None) -> str:
    if value is None:
        return fmt.DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Time over length, one panel a mode, as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        panels = figure.subplots(1, len(MODES), sharey=True)
        for ax, mode in zip(panels, MODES, strict=True):
            draw_mode(ax, report, mode)
        panels[0].set_ylabel("time of one call (ms)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3)
        save_png(figure, path, dpi=200)


def draw_mode(ax: Axes, report: Mapping[str, Any], mode: str) -> None:
    """One line a contender: a colour a rule, ours solid, rivals broken; the band is minimum to maximum."""
    colours = {
        "softmax": MIXER_COLOURS["attention"],
        "no decay": MIXER_COLOURS["hedgehog"],
        "scalar decay": MIXER_COLOURS["mamba2"],
        "vector decay": MIXER_COLOURS["gla"],
        "delta": MIXER_COLOURS["gated_deltanet"],
        "vector delta": SPARE_COLOURS[0],
        "dplr": SPARE_COLOURS[1],
    }
    ends = ("low", "seconds", "high")
    rivals = iter(3 * [("--", "x"), (":", "+"), ("-.", "v")])
    for c in report["contenders"]:
        rows = [r for r in report["times"] if (r["contender"], r["mode"]) == (c["name"], mode) and r["seconds"]]
        lengths = [row["length"] for row in rows]
        line, marker = ("-", "o") if c["ours"] else next(rivals)
        label = f"ours: {c['label']}" if c["ours"] else c["label"]
        colour, (low, middle, high) = colours[c["rule"]], ([1e3 * row[end] for row in rows] for end in ends)
        ax.plot(lengths, middle, linestyle=line, marker=marker, color=colour, markersize=4, label=label)
        ax.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_title(mode)
    ax.set_xlabel("length (tokens)")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(report["settings"]["lengths"]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.context(round(value))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.grid()
