"""The commands that make students: `convert`, `select`, `distill`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.cli.options import (
    BudgetOption,
    DataOption,
    DryRunOption,
    MixerOption,
    OutOption,
    OverwriteOption,
    PickleOption,
    RecipeOption,
    RemoteCodeOption,
    ResumeOption,
    ScaleOption,
    SeedOption,
    SetOption,
    TaskOption,
    TeacherArgument,
    command_line,
    parameters_of,
    recipe_of,
)


def convert(
    teacher: TeacherArgument = None,
    recipe: RecipeOption = None,
    out: OutOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    mixer: MixerOption = None,
    budget: BudgetOption = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Use this plan.yaml (from an earlier run or written by hand) instead of selecting.",
        ),
    ] = None,
    changes: SetOption = None,
    tokens_scale: ScaleOption = 1.0,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Run the whole pipeline: align, select, distill, measure, save.

    Writes to --out a model that transformers loads, the plan, the scores, the metrics, the log, and report.html.

    Examples:

        subquad convert

        subquad convert Qwen/Qwen2.5-1.5B --recipe kl-guided --out runs/qwen

        subquad convert ./my-llama --data ./texts --budget 25% --set stages.0.tokens=1M

        subquad convert --recipe quick --out runs/quick --resume

        subquad convert Qwen/Qwen2.5-1.5B --recipe kl-guided --dry-run

        subquad convert ./my-vit --task image-classification --data ./my-images
    """
    chosen = recipe_of(recipe, changes, tokens_scale, task=task, mixer=mixer, budget=budget, seed=seed)
    arguments: dict[str, Any] = {
        "teacher": teacher or chosen.teacher,
        "recipe": chosen,
        "out": out or Path("runs") / chosen.name,
        "plan": plan,
        "data": data,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        from subquad.jobs.dry_run import dry_run as estimate

        estimate(**arguments)
    else:
        from subquad.jobs.convert import convert as run

        run(**arguments, resume=resume, overwrite=overwrite, command=command_line())


def select(
    teacher: TeacherArgument = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The plan to write; scores.json goes into the same folder."),
    ] = Path("plan.yaml"),
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="NAME",
            help="The selector, instead of the recipe's: kl, kl-removal, alignment-loss, recall, retrieval-heads, "
            "halo, gradient, fisher, gates, greedy, uniform or fixed. docs/select.md compares them.",
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            "--unit",
            metavar="KIND",
            help="What is kept or replaced as a whole: layer, head, or a number of neighbouring layers.",
            show_default="the selector's own",
        ),
    ] = None,
    budget: BudgetOption = None,
    mixer: MixerOption = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    changes: SetOption = None,
    tokens_scale: ScaleOption = 1.0,
    seed: SeedOption = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            help="The scores.json of an earlier selection, to apply another budget without measuring again.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the cost in tokens and time, and write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted selection.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Choose which layers or heads keep attention, and write the plan. No model is saved.

    A plan is a short YAML file: read it, edit it, and pass it to `distill` or `convert --plan`.

    Examples:

        subquad select --by kl --budget 50% --out plan.yaml

        subquad select Qwen/Qwen2.5-1.5B --by gradient --unit head --budget 64MiB@32k --mixer gla --dry-run

        subquad select --scores scores.json --budget 41MiB@32k --out smaller.yaml

        subquad select --by greedy --set selector.options.task=my-questions.jsonl --budget opt
    """
    chosen = recipe_of(recipe, changes, tokens_scale, by=by, unit=unit, budget=budget, mixer=mixer, seed=seed)
    from subquad.jobs.select import select as run

    run(
        teacher=teacher or chosen.teacher,
        recipe=chosen,
        out=out,
        scores=scores,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        data=data,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        command=command_line(),
    )


@parameters_of(convert, without=("mixer", "budget"))
def distill(
    plan: Annotated[
        Path,
        typer.Option("--plan", metavar="FILE", help="The plan to train, from `subquad select` or written by hand."),
    ],
    **options: Any,
) -> None:
    """Train a student for an existing plan: `convert` without the selection.

    Writes to --out the same files as `convert`, except scores.json.

    Examples:

        subquad distill --plan plan.yaml --out runs/mine

        subquad distill Qwen/Qwen2.5-1.5B --plan plan.yaml --recipe kl-guided --out runs/qwen --resume
    """
    convert(plan=plan, **options)
