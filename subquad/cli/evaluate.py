"""The commands that look at a model's quality: `eval`, `generate`, `report`."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.options import (
    DataOption,
    ModelArgument,
    SetOption,
    command_line,
)


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
            help="Tasks of lm-eval's by name, and JSONL files of your own questions, with commas between them; "
            "needs pip install 'subquad[eval]'.",
            show_default="recipe's",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Documents of each task to measure, its first ones.", show_default="recipe's"
        ),
    ] = None,
    changes: SetOption = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the numbers to this file."),
    ] = None,
) -> None:
    """Measure a model beside its teacher: KL, perplexity, agreement, retrieval, cache bytes; and let both write.

    KL, perplexity and agreement by position in the text, retrieval by context length and depth of the fact. The text is
    held out: training never saw it. With --tasks also benchmarks, and your own questions.

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
        make_room(json_path)  # now, for what follows takes a while
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
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write at most.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="0: always the likeliest token; 1: sample as the model says."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt in the model's chat template (for instruction-tuned models).")
    ] = False,
) -> None:
    """Let a converted model write.

    Prints the continuation alone, so that it can be piped on.

    Examples:

        subquad generate runs/quick "The history of the lighthouse begins"

        subquad generate runs/quick "Why is the sky blue?" --chat --temperature 0.7
    """
    from subquad.jobs.generate import generate as run

    print(run(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The page to write.",
            show_default="report.html, in the folder of the run; for several runs, in this folder",
        ),
    ] = None,
) -> None:
    """Draw the report of a run again, or of several runs side by side, from the files of the runs.

    The page is self-contained: plans, scores, loss curves, numbers, maps of retrieval, samples; nothing is loaded from
    elsewhere. What `eval` and `bench` wrote into a run's folder as eval.json and bench.json is shown, too.

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
