"""`subquad recipe`: the list names every shipped recipe, what is shown and what is copied load again."""

import sys

import pytest
import yaml
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.recipes.load import RECIPES, load_recipe, recipe_names


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["subquad"])


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["recipe", *arguments])


def test_the_list_has_a_line_and_a_description_for_every_recipe():
    result = run("list")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line and line[0] != " "}
    assert {*rows} - {"text-generation", "image-classification", "image-feature-extraction"} == {*recipe_names()}
    assert rows["quick"] == ["hedgehog", "kl", "50%", "28k"]
    assert rows["cab-vision"] == ["discrete_mamba2", "uniform", "0", "7.58B"]
    assert lines.index("text-generation             mixer            selector           budget  tokens") > 0
    assert all(line.isascii() and "\x1b" not in line for line in lines)


def test_every_recipe_has_a_description_of_its_own():
    for name in recipe_names():
        own = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        assert 20 < len(own["description"]) < 120 and own["description"].endswith("."), name
        assert f"  {own['description'][:60]}" in run("list").output, name


@pytest.mark.parametrize("name", ["quick", "cab-features-quick"])
def test_what_is_shown_is_the_recipe_with_its_comment(name, tmp_path):
    result = run("show", name)
    assert result.exit_code == 0, result.output
    (tmp_path / "shown.yaml").write_text(result.output, encoding="utf-8")
    assert load_recipe("shown.yaml") == load_recipe(name)
    assert {*yaml.safe_load(result.output)} == {*type(load_recipe(name)).model_fields}, "every default is filled in"
    assert result.output.startswith((RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0])
    assert run("show", "./shown.yaml").output == result.output


def test_show_takes_changes_like_convert():
    result = run("show", "quick", "--set", "mixer.name=gla", "--tokens-scale", "0.1")
    shown = yaml.safe_load(result.output)
    assert shown["mixer"] == load_recipe("quick", ["mixer.name=gla"]).mixer.model_dump()
    assert [stage["tokens"] for stage in shown["stages"]] == [800, 2000]


@pytest.mark.parametrize("name", recipe_names())
def test_every_copy_loads_by_itself(name):
    assert run("copy", name, "deep/my copy.yaml").output == "deep/my copy.yaml\n"
    copied = load_recipe("deep/my copy.yaml")
    assert copied == load_recipe(name).model_copy(update={"name": "my copy"})
    original = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    with open("deep/my copy.yaml", encoding="utf-8") as file:
        assert file.read() == original.replace(f"\nname: {name}\n", "\nname: my copy\n"), "the comments are there"


def test_a_copy_goes_into_this_folder_and_replaces_nothing_unasked(tmp_path):
    assert run("copy", "quick").output == "quick.yaml\n"
    (tmp_path / "quick.yaml").write_text("edited")
    refused = run("copy", "quick")
    assert (refused.exit_code, refused.stderr) == (2, "subquad: quick.yaml exists; give --overwrite to replace it\n")
    assert (tmp_path / "quick.yaml").read_text() == "edited"
    assert run("copy", "quick", "--overwrite").exit_code == 0
    assert load_recipe("./quick.yaml") == load_recipe("quick")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "quik"], "unknown recipe 'quik': did you mean 'quick'?"),
        (["show", "none.yaml"], "recipe file 'none.yaml' does not exist"),
        (["show", "quick", "--set", "mixers.name=gla"], "unknown key 'mixers'"),
        (["copy", "mohwk"], "unknown recipe 'mohwk': did you mean 'mohawk'?"),
        (["copy", "quick", "quick.txt"], "the file quick.txt cannot be a recipe: give a name that ends in .yaml"),
        (["copy", "quick", ".", "--overwrite"], "the file . cannot be a recipe"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"subquad: {message}") and result.stderr.count("\n") == 1
