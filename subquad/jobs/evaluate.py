"""Job of `subquad eval`: compares a model with its teacher."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.errors import UserError
from subquad.evaluate.suite import evaluate_models
from subquad.jobs.conversion import checked_recipe, read_data
from subquad.jobs.fitting import fitted
from subquad.model.output_head import causal_lm, check_head
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import recipe_of_model
from subquad.utils.environment import environment
from subquad.utils.files import json_text, write_json


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

    `teacher`, `data`, `tasks` and `limit` (documents per task) default to those of the recipe that made the student.
    `changes` override other settings of this recipe (`evaluate.retrieval.count=20`). The model is the row `student`.
    Progress is shown on `console`. Raises UserError for a model, a teacher or data that cannot be found.
    """
    # Settings: those of the recipe that made the model, with the caller's changes
    recipe, own_teacher = recipe_of_model(model, changes or [])
    teacher = teacher or own_teacher
    if teacher is None:
        raise UserError(f"{model} has no recipe.yaml that names its teacher: give --teacher")
    updates = {key: value for key, value in {"tasks": tasks, "task_limit": limit}.items() if value is not None}
    recipe.evaluate = recipe.evaluate.model_copy(update=updates)
    recipe = checked_recipe(recipe, teacher, data)

    # The two models and the data
    loaded_teacher = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype)
    student = load_pretrained(str(model), task=recipe.task, dtype=recipe.dtype).model
    for lm in (loaded_teacher.model, student):
        check_head(lm)
    dataset = read_data(recipe, loaded_teacher)
    for remark in dataset.remarks:
        (console or Console(quiet=True)).print(remark, highlight=False, soft_wrap=True)
    if not loaded_teacher.kind.of_images:
        recipe, _, cut = fitted(recipe, loaded_teacher, [causal_lm(student)])
        if cut and console is not None:
            console.print(cut, highlight=False, soft_wrap=True)

    # Metrics of both, and their continuations of the recipe's prompts
    metrics = evaluate_models({"student": student}, loaded_teacher, dataset, recipe.evaluate, recipe.dtype, console)
    metrics |= {"teacher_name": loaded_teacher.name, "teacher_fingerprint": loaded_teacher.fingerprint}
    metrics |= environment(student.device, command)
    if json_path is not None:
        write_json(Path(json_path), metrics)
    return dict(json.loads(json_text(metrics)))
