"""The commands that measure a converted model and show the results: `eval`, `generate`, `report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import DataOption, ModelArgument, SetOption, command_line


def evaluate(
    model: ModelArgument,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", "-t", help="The model to compare with.", show_default="the student's teacher"),
    ] = None,
    data: DataOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,FILE,...",
            help="Names of lm-eval tasks and JSONL files of your own questions, separated by commas. Needs lm-eval: "
            'pip install -e ".[eval]" in the checkout.',
            show_default="recipe's",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Measure only the first documents of each task.", show_default="recipe's"),
    ] = None,
    changes: SetOption = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all numbers to this file."),
    ] = None,
) -> None:
    """Compare a model with its teacher: KL, perplexity, agreement, retrieval, cache bytes, and samples of both.

    KL, perplexity and agreement are given by position in the text, retrieval by context length and depth of the fact.
    The text is held out from training. With --tasks, benchmarks and your own questions are measured too.

    Examples:

        subquad eval runs/quick

        subquad eval runs/quick --teacher default --data book.txt --json numbers.json

        subquad eval runs/quick --tasks arc_easy,swde,my.jsonl --limit 100

        subquad eval runs/quick --set evaluate.retrieval.count=40 --json runs/quick/eval.json
    """
    from rich.console import Console

    from subquad.jobs.evaluate import evaluate_model
    from subquad.report import print_table
    from subquad.utils.files import make_room

    if json_path is not None:
        make_room(json_path)  # before the measurements, which take minutes
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    metrics = evaluate_model(
        model,
        teacher=teacher,
        data=data,
        tasks=names,
        limit=limit,
        changes=changes,
        json_path=json_path,
        console=Console(stderr=True),
        command=command_line(),
    )
    print_table(metrics, Console())


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or with --chat the message to answer.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Maximum number of tokens to generate.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, help="0: always the most likely token; 1: sample from the model's distribution."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Format the prompt with the model's chat template (for instruction-tuned models)."),
    ] = False,
) -> None:
    """Generate text with a converted model.

    Prints only the continuation, so that it can be piped.

    Examples:

        subquad generate runs/quick "The history of the lighthouse begins"

        subquad generate runs/quick "Why is the sky blue?" --chat --temperature 0.7
    """
    from subquad.jobs.generate import generate as run
    from subquad.utils.text import is_well_formed

    if not is_well_formed(prompt):
        print("subquad: the prompt has broken characters, which are read as U+FFFD", file=sys.stderr)
    print(run(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML file to write.",
            show_default="report.html in the run's folder; for several runs, in the working directory",
        ),
    ] = None,
) -> None:
    """Redraw the report of a run, or of several runs side by side, from their files.

    The page is self-contained: plans, scores, loss curves, numbers, retrieval maps and samples; it loads nothing from
    elsewhere. An eval.json or bench.json that `eval` or `bench` wrote into a run's folder is included.

    Examples:

        subquad report runs/quick

        subquad report runs/quick runs/gla runs/mamba2 --out compared.html
    """
    from subquad.report import write_report
    from subquad.utils.files import make_room

    if out is None and len(runs) > 1:
        out = Path("report.html")
    if out is not None:
        make_room(out)
    print(write_report(*runs, out=out))
