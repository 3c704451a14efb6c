"""The job behind `subquad eval`: a model is measured beside its teacher."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.errors import UserError
from subquad.evaluate.suite import evaluate_models
from subquad.jobs.conversion import checked_recipe, read_data
from subquad.model.output_head import check_head
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import load_recipe
from subquad.utils.environment import environment
from subquad.utils.files import write_json


def evaluate_model(
    model: str | Path,
    *,
    teacher: str | None = None,
    data: list[str] | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    changes: list[str] | None = None,
    json_path: str | Path | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures a student's folder (or any causal language model) beside its teacher; returns metrics.json's rows.

    `teacher`, `data`, `tasks` and `limit` (documents a task) default to those of the recipe that made the student, of
    which `changes` (`evaluate.retrieval.count=20`) changes the rest. The model, whatever it is, is the row `student`.
    Progress is shown on `console`, if there is one. Raises UserError where anything of this is unknown.
    """
    recipe_file = Path(model) / "recipe.yaml"
    if teacher is None and not recipe_file.is_file():
        raise UserError(f"{model} does not say what its teacher is: give --teacher")
    recipe = load_recipe(recipe_file if recipe_file.is_file() else "quick", changes or [])
    given = {key: value for key, value in {"tasks": tasks, "task_limit": limit}.items() if value is not None}
    recipe.evaluate = recipe.evaluate.model_copy(update=given)
    recipe = checked_recipe(recipe, teacher or recipe.teacher, data)
    source = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype)
    measured = load_pretrained(str(model), task=recipe.task, dtype=recipe.dtype).model
    for one in (source.model, measured):
        check_head(one)
    corpus = read_data(recipe, source)
    metrics = evaluate_models({"student": measured}, source, corpus, recipe.evaluate, recipe.dtype, console)
    metrics |= {"teacher_name": source.name, "teacher_fingerprint": source.fingerprint}
    metrics |= environment(measured.device, command)
    if json_path is not None:
        write_json(Path(json_path), metrics)
    return dict(json.loads(json.dumps(metrics)))
