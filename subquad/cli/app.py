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
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from subquad.cli.bench import bench
from subquad.cli.convert import convert, distill, select
from subquad.cli.evaluate import evaluate, generate, report
from subquad.cli.inspect import compare, env, plans
from subquad.cli.recipes import recipes
from subquad.cli.teachers import cache_teacher, train_teacher, train_vit
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


app.command("convert")(convert)
app.command("select")(select)
app.command("distill")(distill)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("report")(report)
app.add_typer(plans, name="plan")
app.command("compare")(compare)
app.command("bench")(bench)
app.add_typer(recipes, name="recipe")
app.command("cache-teacher")(cache_teacher)
app.command("train-teacher")(train_teacher)
app.command("train-vit")(train_vit)
app.command("env")(env)
