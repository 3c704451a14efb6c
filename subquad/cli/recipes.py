"""The commands that read recipes: `subquad recipe list`, `show` and `copy`."""

import re
import shutil
import textwrap
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli.options import ScaleOption, SetOption
from subquad.errors import UserError, nearest

if TYPE_CHECKING:
    from subquad.recipes.schema import Recipe

recipes = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
ROW = "{:<28}{:<17}{:<17}{:>8}{:>8}"


@recipes.callback()
def recipe() -> None:
    """List, show and copy recipes.

    Examples:

        subquad recipe list

        subquad recipe show quick

        subquad recipe copy quick my-recipe.yaml
    """


@recipes.command("list")
def list_recipes() -> None:
    """List the shipped recipes by task, with mixer, selector, budget and the training tokens of all stages.

    The -quick recipes run in minutes on two CPU cores; the others are for GPUs.

    Examples:

        subquad recipe list
    """
    from subquad.recipes.load import load_recipe, recipe_names

    by_task = sorted((load_recipe(name) for name in recipe_names()), key=lambda shipped: (shipped.task, shipped.name))
    for task, group in groupby(by_task, key=lambda shipped: shipped.task):
        typer.secho(ROW.format(task, "mixer", "selector", "budget", "tokens"), bold=True)
        for shipped in group:
            print(_row(shipped))
        print()


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe, or your own .yaml file.")],
    changes: SetOption = None,
    tokens_scale: ScaleOption = 1.0,
) -> None:
    """Print a recipe as YAML with every default filled in, below the comment at the top of its file.

    What it prints is a recipe too: redirected to a file, it sets every value explicitly.

    Examples:

        subquad recipe show quick

        subquad recipe show my-recipe.yaml --set mixer.name=gla --tokens-scale 0.1
    """
    from subquad.recipes.load import RECIPES, load_recipe, recipe_names

    shown = load_recipe(name, changes or (), tokens_scale)
    file = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    print(_header(file.read_text(encoding="utf-8")) + shown.to_yaml(), end="")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The file to write.", show_default="NAME.yaml")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
) -> None:
    """Copy a shipped recipe, with its comments, to a file of your own to edit.

    The copy is named after its file, so that its runs go to a folder of their own. Where it `extends` another shipped
    recipe, it still does.

    Examples:

        subquad recipe copy quick

        subquad recipe copy kl-guided my-recipe.yaml
    """
    import yaml

    from subquad.recipes.load import RECIPES, recipe_names
    from subquad.utils.files import make_room, write_aside

    if name not in recipe_names():
        raise UserError(f"unknown recipe '{name}': {nearest(name, recipe_names())}")
    file = file or Path(f"{name}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"the file {file} cannot be a recipe: give a name that ends in .yaml")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists; give --overwrite to replace it")
    make_room(file)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    named = yaml.safe_dump({"name": file.stem}, allow_unicode=True, width=1000).strip()
    with write_aside(file) as aside:
        aside.write_text(re.sub(r"^name: .*$", lambda _: named, text, count=1, flags=re.MULTILINE), encoding="utf-8")
    print(file)


def _row(shipped: "Recipe") -> str:
    """A recipe's line in the list, with its description below."""
    tokens = _short(sum(stage.tokens for stage in shipped.stages))
    selector = shipped.selector
    row = ROW.format(shipped.name, shipped.mixer.name, selector.by, selector.budget, tokens)
    width = shutil.get_terminal_size().columns
    return row + "\n" + textwrap.fill(shipped.description, width, initial_indent="  ", subsequent_indent="  ")


def _short(count: int) -> str:
    """A number of tokens in three figures, as recipes write it: 28k, 700M, 7.58B."""
    number, unit = float(count), ""
    for larger in ("k", "M", "B"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{number:.3g}{unit}"


def _header(text: str) -> str:
    """The comment at the top of a recipe's file."""
    return "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
