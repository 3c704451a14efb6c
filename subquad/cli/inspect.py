"""The read-only commands: `plan show`, `compare` and `env`."""

from pathlib import Path
from typing import Annotated

import typer

plans = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@plans.callback()
def plan() -> None:
    """Show plans.

    Examples:

        subquad plan show plan.yaml
    """


@plans.command()
def show(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan.yaml, or a run folder or model folder that has one.")
    ],
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Data type of the cached keys and values: float32, bfloat16, float16 or float64."),
    ] = "float32",
) -> None:
    """Draw a plan: its layers and heads, its mixers with their options, and its cache bytes.

    Examples:

        subquad plan show plan.yaml

        subquad plan show runs/quick --dtype bfloat16
    """
    from rich.console import Console

    from subquad.plan import find_plan
    from subquad.report import print_plan

    print_plan(find_plan(plan), Console(), dtype)


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The folder of a run, finished or not.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The folder of another run.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the differences to this file.")
    ] = None,
) -> None:
    """Show the differences between two runs: recipe, plan, results, stages, time, versions and machine.

    If both were measured on the same text, the difference in KL is given with its standard error over the rows.

    Examples:

        subquad compare runs/quick runs/seed1

        subquad compare runs/quick runs/gla --json differences.json
    """
    from rich.console import Console

    from subquad.report.compare import compare_runs, print_comparison

    print_comparison(compare_runs(run_a, run_b, json_path=json_path), Console())


def env() -> None:
    """Print versions, hardware and settings to paste into a bug report.

    Of the environment variables, only those that change results, speed or what is loaded are printed; access tokens
    never are.

    Examples:

        subquad env
    """
    from subquad.utils.environment import environment_report

    for label, value in environment_report().items():
        print(f"{label + ':':<24}{value}")
