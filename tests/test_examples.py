"""The examples run: the script, and each recipe on a tiny teacher and text."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from subquad.data.questions import read_questions
from subquad.evaluate.retrieval import FLOORS
from subquad.jobs.convert import convert
from subquad.model.student import Student
from subquad.recipes.load import load_recipe
from subquad.recipes.stage import Stage
from tests.helpers import shortened

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))


def test_the_script_converts(teacher_folder, text, tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "convert.py"))
    settings = example["convert"].__globals__
    length = {"sequence_length": 32}
    settings |= {
        "LENGTH": 32,
        "OPTIONS": {"window": 8, "sinks": 1},
        "ALIGN": Stage(**settings["ALIGN"].model_dump() | length | {"tokens": 256}),
        "LOGITS": Stage(**settings["LOGITS"].model_dump() | length | {"tokens": 128}),
        "PROMPT": "w1 w2 w3",
    }
    student = example["convert"](teacher_folder, text, tmp_path)
    loaded = Student.from_pretrained(tmp_path)
    ids_BT = torch.randint(3, 97, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits, student(ids_BT).logits)
    assert len(student.plan.attention_layers) == 2, "half of three layers, rounded"
    output = capsys.readouterr().out
    assert f"plan: {student.plan.pattern()}\n" in output and "w1 w2 w3" in output
    assert "teacher: KL 0.000" in output and "student: KL 0." in output and "aligned: KL 0." in output


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs(file, teacher_folder, text, tmp_path, monkeypatch):
    monkeypatch.setitem(FLOORS, "logprob", -1e9)  # a random teacher retrieves nothing
    recipe = shortened(file)
    if "@" in recipe.selector.budget:
        recipe.selector.budget = "1MiB@8k"  # of 3: the tiny teacher's cache is smaller
    student = convert(teacher_folder, recipe, tmp_path / "run", data=text)
    assert len(student.plan.attention_layers) < 3
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [stage["name"] for stage in metrics["stages"]] == [stage.name for stage in load_recipe(file).stages]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_gives_its_command_and_says_what_it_is(file):
    assert f"--recipe examples/{file.name} --" in file.read_text(encoding="utf-8").partition("\nextends:")[0]
    assert load_recipe(file).name == file.stem
    assert f"[{file.name}]({file.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_questions_can_be_read():
    recipe = load_recipe(EXAMPLES / "one-task.yaml")
    assert recipe.selector.options["task"] == recipe.evaluate.tasks[0] == "examples/questions.jsonl"
    assert len(read_questions(EXAMPLES / "questions.jsonl")) == 12
