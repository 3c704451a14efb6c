"""Speed and memory of image encoders as the resolution grows: a ViT compared with its students.

    python -m benchmarks.resolution [--quick] [--json FILE] [--plot FILE.png]

The teacher has DINOv2-S/14's shape (12 layers, width 384, 6 heads) and random weights, for speed does not depend on
them; the students have one mixer in every layer, scanning both ways.

Notable:
- One image of 16 x 16 up to 128 x 128 patches. All models run in turns, the first in one round is the last in the next;
  a round before the first warms up. Numbers are medians, with the lowest and the highest.
- Memory is the peak of a pass over what was held before it, weights included in neither, read in the round that warms
  up: of the resident set on a CPU, of PyTorch's allocator on a GPU.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table
from transformers import Dinov2Config, Dinov2Model

from benchmarks.common import command_of, facts, wide_console
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.plan import Plan
from subquad.report.plots import STYLE, save_png
from subquad.utils import format as fmt
from subquad.utils.files import write_json
from subquad.utils.memory import held_bytes, peak_memory_bytes, release_free_memory, reset_peak_memory
from subquad.utils.timing import seconds_of, take_turns

PATCH = 14
SIDES = (16, 32, 64, 128)  # patches
MIXERS = ("discrete_mamba2", "gated_deltanet", "gla")
ROUNDS = 3
COLOURS = {"ViT": "#7d8794", "discrete_mamba2": "#d04f6b", "gated_deltanet": "#4f7fcf", "gla": "#2f93a8"}


def models(device: torch.device) -> dict[str, Any]:
    """The teacher and a student for each mixer, which share all other weights."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH
    )
    teacher = Dinov2Model(config).eval().requires_grad_(False).to(device)  # type: ignore[arg-type]
    shapes = shapes_of(teacher)
    students = {
        name: ImageStudent.from_teacher(teacher, Plan.by_layer(shapes, [], name, {"bidirectional": True}))
        for name in MIXERS
    }
    return {"ViT": teacher, **{name: student.requires_grad_(False) for name, student in students.items()}}


@torch.no_grad()
def measured(all_models: Mapping[str, Any], side: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each model at one resolution."""
    pixels = torch.randn(1, 3, PATCH * side, PATCH * side, device=device)
    bytes_of = {}
    for name, model in all_models.items():
        release_free_memory()
        reset_peak_memory(device)
        before = held_bytes(device)
        model(pixels)
        bytes_of[name] = peak_memory_bytes(device) - before
    calls = {name: partial(seconds_of, partial(model, pixels), device) for name, model in all_models.items()}
    results = take_turns(calls, (rounds, rounds))
    seconds = {name: [result[name] for result in results] for name in all_models}
    return [
        {
            "model": name,
            "tokens": side * side,
            "pixels": PATCH * side,
            "seconds": median(samples),
            "low": min(samples),
            "high": max(samples),
            "peak_bytes": bytes_of[name],
        }
        for name, samples in seconds.items()
    ]


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Seconds and memory, by resolution."""
    table = Table(
        title="one image: seconds (lowest to highest), and peak memory over the weights", title_justify="left"
    )
    names = list(dict.fromkeys(row["model"] for row in report["rows"]))
    for heading in ("tokens", *names):
        table.add_column(heading, justify="right")
    for tokens in dict.fromkeys(row["tokens"] for row in report["rows"]):
        rows = {row["model"]: row for row in report["rows"] if row["tokens"] == tokens}
        cells = (_cell(rows[name]) for name in names)
        table.add_row(fmt.integer(tokens), *cells)
    console.print(table)


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['seconds']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {fmt.size(row['peak_bytes'])}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Images per second, and memory, over the tokens of an image."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.4), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, value, label in (
            (axes[0], lambda row: 1 / row["seconds"], "images per second"),
            (axes[1], lambda row: row["peak_bytes"], "peak memory of a pass"),
        ):
            _lines(ax, report["rows"], value)
            ax.set_ylabel(label)
        axes[1].set_yscale("log", base=2)
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt.size(value)))
        axes[0].legend(fontsize=8)
    save_png(figure, path, dpi=150)


def _lines(ax: Axes, rows: Sequence[Mapping[str, Any]], value: Any) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        model_rows = [row for row in rows if row["model"] == name]
        ax.plot(
            [row["tokens"] for row in model_rows],
            [value(row) for row in model_rows],
            "o-",
            color=COLOURS[name],
            label=name,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted({row["tokens"] for row in rows})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: fmt.context(int(tokens))))
    ax.set_xlabel("patches of an image")
    ax.grid(True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resolution", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="up to 32 x 32 patches, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw images per second and memory over tokens")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides, rounds = (SIDES[:2], 2) if arguments.quick else (SIDES, ROUNDS)
    report = facts(command_of("benchmarks.resolution", argv), {"sides": sides, "rounds": rounds}, device)
    one_at_a_time = partial(measured, models(device), rounds=rounds, device=device)
    report["rows"] = [row for side in sides for row in one_at_a_time(side)]
    print_report(report, wide_console())
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
