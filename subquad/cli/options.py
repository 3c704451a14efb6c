"""Arguments and options that several commands share, with their help; the recipe they name; the command line."""

import inspect
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from subquad.recipes.schema import Recipe

TeacherArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TEACHER",
        help="The pretrained model to start from: a Hugging Face Hub id, a local folder, or a GGUF file. "
        "Without it: the recipe's teacher, which is SmolLM2-135M-Instruct unless the recipe names another.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="A folder that `convert` wrote, or any causal language model.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="The recipe: mixer, selector, training stages and evaluation. A shipped one (see subquad recipe list) or "
        "your own .yaml file. In minutes on two CPU cores: quick, and the -quick forms of most of the others, which "
        "are for GPUs: kl-guided, kl-guided-full, mohawk, mohawk-hybrid, llamba, radlads, lolcats, liger, "
        "mamba-in-llama, retrieval-aware, distill-then-replace, cab; for images cab-vision and cab-features.",
        show_default="quick; for images cab-vision-quick or cab-features-quick",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="The teacher's task: text-generation, image-classification (a classifier), or image-feature-extraction "
        "(an encoder without a head).",
        show_default="recipe's",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, such as stages.0.tokens=50k or mixer.name=gla. Can be repeated.",
    ),
]
ScaleOption = Annotated[
    float,
    typer.Option(
        "--tokens-scale",
        metavar="FACTOR",
        help="Multiply all token counts of the recipe: 0.01 tries it at a hundredth of its cost.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.", show_default="runs/RECIPE"),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE",
        help="Text to train and measure on, instead of the recipe's: a .txt, .jsonl, .jsonl.gz or .parquet file, a "
        "folder of them, or the id of a `datasets` data set (org/name[:config:split:column]). Can be repeated. For "
        "images, exactly one: a folder of idx files, a folder with one subfolder of images per class, or the id of a "
        "data set.",
    ),
]
MixerOption = Annotated[
    str | None,
    typer.Option(
        "--mixer",
        metavar="NAME",
        help="The mixer that replaces attention, instead of the recipe's: linear, hedgehog, liger, retention, gla, "
        "mamba2, discrete_mamba2, gated_deltanet, kda, rwkv7 or sliding_window. "
        "Set its options with --set mixer.options.NAME=VALUE.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="BUDGET",
        help="How much attention to keep, instead of the recipe's budget: a number of layers or heads (15), a share "
        "of them (50%), cache bytes at a context length (64MiB@32k), a decoding speed relative to the teacher's "
        "(1.5x@32k), or the plan that the greedy selector finds (opt, best). Layers in which the teacher itself has a "
        "sliding window are counted only under bytes and speed.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run in --out from its last checkpoint.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Delete an earlier run in --out first (never a folder with other contents).")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Estimate time, memory and disk from a ten-second trial, and write nothing.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, help="Seed of the new weights and of the order of the data.", show_default="recipe's"
    ),
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Accept pickled weights (.bin, .pt), which can run arbitrary code when loaded."
    ),
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint.")
]


def parameters_of(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: typer reads a function's `**options` as the parameters of `command`, except those named `without`.

    Parameters that the function declares itself come first and take precedence.
    """
    shared = inspect.signature(command).parameters

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        *declared, _options = inspect.signature(function).parameters.values()
        left_out = {*without, *(parameter.name for parameter in declared)}
        inherited = [parameter for name, parameter in shared.items() if name not in left_out]
        function.__signature__ = inspect.Signature([*declared, *inherited])  # type: ignore[attr-defined]
        return function

    return decorate


def command_line() -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["subquad", *sys.argv[1:]])


DEFAULT_RECIPES = {"image-classification": "cab-vision-quick", "image-feature-extraction": "cab-features-quick"}


def recipe_of(name: str | None, changes: list[str] | None, tokens_scale: float = 1.0, **options: object) -> "Recipe":
    """Load a recipe with `--set` changes and the options that stand for one; without a name, the task's default.

    `options`: values of --budget, --by, --unit, --mixer, --seed and --task; None where one was not given.
    Raises UserError for an unknown recipe, key or value.
    """
    from subquad.recipes.load import load_recipe

    if name is None:
        name = DEFAULT_RECIPES.get(str(options.get("task")), "quick")

    keys = {
        "budget": "selector.budget",
        "by": "selector.by",
        "unit": "selector.unit",
        "mixer": "mixer.name",
        "seed": "seed",
        "task": "task",
    }
    settings = [f"{keys[option]}={value}" for option, value in options.items() if value is not None]
    return load_recipe(name, [*(changes or []), *settings], tokens_scale)
