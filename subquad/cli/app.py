"""The command line: parses, calls, prints; no logic.

Notable:
- torch and transformers are imported inside the commands, so that `--help` answers at once.
- One place (`_Commands.invoke`) decides how a command ends: a `UserError` or a full disk is one line on stderr and exit
  code 2, Ctrl-C is exit code 130 with the command that resumes, anything else is an internal error: a traceback and
  exit code 1.
- Under `accelerate launch --num_processes N -m subquad ...` every process runs the same command; progress and results
  are printed by the jobs, which know the main process.
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
        """Run a command; end with one line on stderr where the cause is not a fault of Subquad."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"subquad: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"\nsubquad: stopped{self._how_to_resume(ctx)}", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if not is_disk_full(error):
                raise
            print(f"subquad: the disk is full ({error}): free some space{self._how_to_resume(ctx)}", file=sys.stderr)
            raise SystemExit(2) from None

    def _how_to_resume(self, ctx: Any) -> str:
        """The tail of a message: the same command line with --resume, where the invoked command has this option."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        options = [] if command is None else [option for parameter in command.params for option in parameter.opts]
        if "--resume" not in options or "--dry-run" in sys.argv:
            return ""
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        return f"; resume from the last checkpoint with:\n  {shlex.join(['subquad', *arguments, '--resume'])}"


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


def _version(asked: bool) -> None:
    if asked:
        from subquad import __version__

        print(f"subquad {__version__}")
        raise typer.Exit


@app.callback()
def subquad(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained Transformer into a subquadratic or hybrid model.

    Subquad keeps attention where it matters, replaces it with linear-time mixers everywhere else, and distills the
    original model (the teacher) into the result (the student). Start with:

        subquad convert

    For the options of a command: subquad convert --help. Exit codes: 0 done, 2 invalid input (one line explains it),
    1 internal error, 130 interrupted.
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
