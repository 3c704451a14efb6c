"""What several commands share: arguments and options with their help, the recipe they name, the command line."""

import shlex
import sys
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
        "Left out: the recipe's teacher, which is SmolLM2-135M-Instruct unless the recipe says otherwise.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="A folder that `convert` wrote, or any causal language model.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="The recipe: mixer, selector, training stages and evaluation. One that ships with Subquad, or your own "
        ".yaml file. For minutes on two CPU cores: quick, and the -quick form of each of these, which are for GPUs: "
        "kl-guided, kl-guided-full, mohawk, mohawk-hybrid, llamba, radlads, lolcats, liger, "
        "mamba-in-llama, retrieval-aware, distill-then-replace, cab; of images cab-vision and cab-features.",
        show_default="quick; of images cab-vision-quick or cab-features-quick",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="What the teacher is for: text-generation, image-classification (a classifier), or "
        "image-feature-extraction (an encoder without a head).",
        show_default="recipe's",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, such as stages.0.tokens=50k or mixer.name=gla. May be given many times.",
    ),
]
ScaleOption = Annotated[
    float,
    typer.Option(
        "--tokens-scale",
        metavar="FACTOR",
        help="Multiply all token budgets of the recipe: 0.01 tries it out at a hundredth of its cost.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.", show_default="runs/NAME OF THE RECIPE"),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE",
        help="Text to train and measure on, instead of the recipe's: a .txt, .jsonl, .jsonl.gz or .parquet file, a "
        "folder of them, or the id of a `datasets` data set (org/name[:config:split:column]). May be given many times. "
        "Of images one: a folder of idx files, a folder with one of images for each class, or the id of a data set.",
    ),
]
MixerOption = Annotated[
    str | None,
    typer.Option(
        "--mixer",
        metavar="NAME",
        help="What takes the place of attention, instead of the recipe's: linear, hedgehog, liger, retention, gla, "
        "mamba2, discrete_mamba2, gated_deltanet, kda, rwkv7 or sliding_window. "
        "Options of the mixer go through --set mixer.options.NAME=VALUE.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="BUDGET",
        help="How much may stay attention, instead of the recipe's budget: a number of layers or heads (15), a share "
        "of them (50%), the cache's bytes at a context length (64MiB@32k), a decoding speed in that of the teacher "
        "(1.5x@32k), or the plan that the greedy selector finds (opt, best).",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of a run in --out that was interrupted.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Delete an earlier run in --out first (never a folder of anything else).")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what it would take (time, memory, disk), from ten seconds of trying it out, and write nothing.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of the new weights and the order of the text.", show_default="recipe's"),
]
PickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Accept pickled weights (.bin, .pt): a pickle can run code of its author's."),
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]


def command_line() -> str:
    """The command line as the user could type it again."""
    return shlex.join(["subquad", *sys.argv[1:]])


FOR_TASK = {"image-classification": "cab-vision-quick", "image-feature-extraction": "cab-features-quick"}


def recipe_of(name: str | None, changes: list[str] | None, tokens_scale: float = 1.0, **options: object) -> "Recipe":
    """The recipe with --set and the options that are short for one; without a name, what suits the task."""
    from subquad.recipes.load import load_recipe

    if name is None:
        name = FOR_TASK.get(str(options.get("task")), "quick")

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
