"""The command line: parses, calls, prints; no logic.

Notable:
- torch and transformers are imported inside the commands, so that `--help` answers at once.
- One place (`_Commands.invoke`) decides how a command ends: a `UserError` or a full disk is one line on stderr and exit
  code 2, Ctrl-C is 130 with the command that goes on from there, anything else is our fault: a traceback and exit
  code 1.
- Under `accelerate launch --num_processes N -m subquad ...` every process runs the same command; what is printed for
  people comes from the pipeline, which knows the main process.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from subquad.cli_bench import bench
from subquad.cli_options import (
    BudgetOption,
    DataOption,
    DryRunOption,
    MixerOption,
    ModelArgument,
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
    recipe_of,
)
from subquad.cli_plans import compare, plans
from subquad.cli_teachers import cache_teacher, train_teacher, train_vit
from subquad.errors import UserError
from subquad.utils.files import is_disk_full


class _Commands(TyperGroup):
    """The commands in the order of a day's work, and the exit codes of all of them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"subquad: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"\nsubquad: stopped{_how_to_resume(ctx.invoked_subcommand)}", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if not is_disk_full(error):
                raise
            again = _how_to_resume(ctx.invoked_subcommand)
            print(f"subquad: the disk is full ({error}): free some space{again}", file=sys.stderr)
            raise SystemExit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """The entry point of the `subquad` script and of `python -m subquad`."""
    app(prog_name="subquad")


def _how_to_resume(command: str | None) -> str:
    if (
        command not in ("convert", "select", "distill", "cache-teacher", "train-teacher", "train-vit")
        or "--dry-run" in sys.argv
    ):
        return ""
    again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return f"; go on from the last checkpoint with:\n  {shlex.join(['subquad', *again, '--resume'])}"


def _version(wanted: bool) -> None:
    if wanted:
        from subquad import __version__

        print(f"subquad {__version__}")
        raise typer.Exit


@app.callback()
def subquad(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained Transformer into a hybrid whose cost per token hardly grows with context.

    Subquad keeps attention where it matters, puts linear-time mixers in its place everywhere else, and distills the
    original model (the teacher) into the result (the student). Start with:

        subquad convert

    Every command explains itself: subquad convert --help. Exit codes: 0 done, 2 something in what you gave (one line
    says what), 1 a fault of Subquad, 130 interrupted.
    """


@app.command()
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
            help="Use this plan.yaml (from an earlier run, or written by hand) and select nothing.",
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
    """Convert a teacher, from start to end: align, select, distill, measure, save.

    Leaves in --out a model that transformers loads, the plan, the scores, the metrics, the log, and report.html.

    Examples:

        subquad convert

        subquad convert Qwen/Qwen2.5-1.5B --recipe kl-guided --out runs/qwen

        subquad convert ./my-llama --data ./texts --budget 25% --set stages.0.tokens=1M

        subquad convert --recipe quick --out runs/quick --resume

        subquad convert Qwen/Qwen2.5-1.5B --recipe kl-guided --dry-run

        subquad convert ./my-vit --task image-classification --data ./my-images
    """
    chosen = recipe_of(recipe, changes, tokens_scale, task=task, mixer=mixer, budget=budget, seed=seed)
    what: dict[str, Any] = {
        "teacher": teacher or chosen.teacher,
        "recipe": chosen,
        "out": out or Path("runs") / chosen.name,
        "plan": plan,
        "data": data,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        from subquad.jobs.dry_run import preview

        preview(**what)
    else:
        from subquad.jobs.convert import convert as run

        run(**what, resume=resume, overwrite=overwrite, command=command_line())


@app.command()
def select(
    teacher: TeacherArgument = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The plan to write; scores.json goes beside it.")
    ] = Path("plan.yaml"),
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="NAME",
            help="The selector, instead of the recipe's: kl, kl-removal, alignment-loss, recall, retrieval-heads, "
            "halo, gradient, fisher, gates, greedy, uniform or fixed. docs/select.md says what they measure and cost.",
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            "--unit",
            metavar="KIND",
            help="What is kept or replaced as a whole: layer, head, or so many neighbouring layers.",
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
            help="The scores.json of an earlier selection: nothing is measured again, and the budget decides anew.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, in tokens and time, and write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted selection.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plan that is already there.")] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Decide which layers or heads keep attention, and write the plan. No model is saved.

    A plan is a short YAML file: read it, change it, and give it to `distill` or `convert --plan`.

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


@app.command()
def distill(
    plan: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="The plan to train, from `subquad select` or by hand.")
    ],
    teacher: TeacherArgument = None,
    recipe: RecipeOption = None,
    out: OutOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    changes: SetOption = None,
    tokens_scale: ScaleOption = 1.0,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Train a student for a plan you already have: like `convert`, without the selection.

    Leaves in --out what `convert` leaves there, except scores.json.

    Examples:

        subquad distill --plan plan.yaml --out runs/mine

        subquad distill Qwen/Qwen2.5-1.5B --plan plan.yaml --recipe kl-guided --out runs/qwen --resume
    """
    convert(
        teacher=teacher,
        recipe=recipe,
        out=out,
        task=task,
        data=data,
        plan=plan,
        changes=changes,
        tokens_scale=tokens_scale,
        seed=seed,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


@app.command("eval")
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


@app.command()
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


@app.command()
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


app.add_typer(plans, name="plan")
app.command("compare")(compare)
app.command("bench")(bench)
app.command("cache-teacher")(cache_teacher)
app.command("train-teacher")(train_teacher)
app.command("train-vit")(train_vit)
