"""The command that measures speed and memory: `subquad bench`."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import ModelArgument, command_line
from subquad.errors import UserError


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            "-a",
            metavar="TEACHER",
            help="The model to compare with, measured in turns: a Hub id, a folder, a GGUF file, default "
            "(SmolLM2-135M-Instruct), or none.",
            show_default="the student's teacher, if MODEL names it",
        ),
    ] = None,
    contexts: Annotated[
        str, typer.Option("--contexts", "-c", metavar="N,N,...", help="Context lengths in tokens; 1k is 1,024.")
    ] = "1k,2k,4k,8k,16k,32k,64k,128k",
    batches: Annotated[
        str, typer.Option("--batch", "-b", metavar="N,N,...", help="Batch sizes: sequences that run together.")
    ] = "1",
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="SECONDS",
            help="Approximate time limit for all measurements. What does not fit is extrapolated and marked.",
        ),
    ] = 300.0,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16.", show_default="recipe's"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:1.", show_default="a GPU if there is one"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the input tokens.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every number to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Also plot decoding speed and cache bytes to this file."),
    ] = None,
) -> None:
    """Measure a model's speed and memory over context length and batch size, compared with its teacher.

    Measures prefill, decoding, the time to the first token, `generate` itself, peak memory and cache. Also reports the
    context from which the student is faster, and each speed as a share of the machine's limit. docs/bench.md explains
    the output.

    Examples:

        subquad bench runs/quick

        subquad bench runs/quick --contexts 1k,4k,16k --batch 1,4 --seconds 600 --json bench.json --plot bench.png

        subquad bench Qwen/Qwen2.5-1.5B --against none --dtype bfloat16
    """
    lengths = numbers(contexts, "--contexts", "context lengths with commas between them, such as 1k,4k,16k")
    rows = numbers(batches, "--batch", "numbers of sequences with commas between them, such as 1,4")
    from rich.console import Console

    from subquad.bench.measure import bench as run
    from subquad.report import draw_bench, print_bench
    from subquad.utils.files import make_room, write_json

    for path in (json_path, plot):
        if path is not None:
            make_room(path)  # before the measurements, which take minutes
    progress, started = Console(stderr=True), time.monotonic()

    def say(text: str) -> None:
        left = max(0.0, started + seconds - time.monotonic())
        progress.print(f"{text}; about {left:,.0f} s left at most", highlight=False, style="dim")

    report = run(
        model,
        against=against,
        contexts=lengths,
        batches=rows,
        seconds=seconds,
        dtype=dtype,
        device=device,
        seed=seed,
        command=command_line(),
        say=say,
    )
    if json_path is not None:
        write_json(json_path, report)
    if plot is not None:
        draw_bench(report, plot)
    print_bench(report, Console())


def numbers(text: str, option: str, form: str) -> list[int]:
    """Parse `1k,4k,500` as numbers above 0, k being 1,024.

    Raises UserError, naming the option and its `form`, for anything else.
    """
    values = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(k?)", part.strip().lower())
        number = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if number < 1:
            raise UserError(f"{option} has '{part.strip()}': give {form}")
        values.append(number)
    return values
