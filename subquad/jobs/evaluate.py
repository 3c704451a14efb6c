"""The job behind `subquad eval`: a model is compared with its teacher."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.errors import UserError
from subquad.evaluate.suite import evaluate_models
from subquad.jobs.conversion import checked_recipe, read_data
from subquad.model.output_head import check_head
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import recipe_of
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
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
    """Compares a student's folder (or any causal language model) with its teacher; returns the rows of metrics.json.

    `teacher`, `data`, `tasks` and `limit` (documents a task) default to those of the recipe that made the student, of
    which `changes` (`evaluate.retrieval.count=20`) changes the rest. The model, whatever it is, is the row `student`.
    Progress is shown on `console`, if there is one. Raises UserError where anything of this is unknown.
    """
    # Settings: those of the recipe that made the model, with the caller's changes
    recipe, own_teacher = recipe_of(model, changes or [])
    teacher = teacher or own_teacher
    if teacher is None:
        raise UserError(f"{model} has no recipe.yaml that names its teacher: give --teacher")
    changed = {key: value for key, value in {"tasks": tasks, "task_limit": limit}.items() if value is not None}
    recipe.evaluate = recipe.evaluate.model_copy(update=changed)
    recipe = checked_recipe(recipe, teacher, data)

    # The two models and the data
    source = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype)
    student = load_pretrained(str(model), task=recipe.task, dtype=recipe.dtype).model
    for loaded in (source.model, student):
        check_head(loaded)
    corpus = read_data(recipe, source)

    # Their measures, and what both write after the recipe's prompts
    metrics = evaluate_models({"student": student}, source, corpus, recipe.evaluate, recipe.dtype, console)
    metrics |= {"teacher_name": source.name, "teacher_fingerprint": source.fingerprint}
    metrics |= environment(student.device, command)
    check_written(Metrics, metrics)
    if json_path is not None:
        write_json(Path(json_path), metrics)
    return dict(json.loads(json.dumps(metrics)))
