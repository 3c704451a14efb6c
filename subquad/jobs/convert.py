"""Main job: converts a teacher into a student, and evaluates it.

`convert` reads as the steps of a conversion: load, align all-linear students, select the heads that keep attention,
distill the selected plan, save it, evaluate it against its baselines. The run's folder holds the state of each step, so
an interrupted run resumes where it stopped: after a failure of the evaluation, nothing is trained again.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subquad.distill.state import StageResult
from subquad.evaluate.suite import check_heldout, evaluate_models
from subquad.jobs.baselines import baseline_plans, verdicts
from subquad.jobs.conversion import Conversion, checked_recipe
from subquad.jobs.run import Run, provenance
from subquad.jobs.select import check_selection, named_plans, select_plan
from subquad.jobs.train import align, train_stages
from subquad.model.base import BaseStudent
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from subquad.report import print_table, write_model_card, write_report
from subquad.utils import format as fmt
from subquad.utils.files import json_text, sha256_of_file


def convert(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "runs/quick",
    *,
    plan: str | Path | None = None,
    data: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    layers: int | None = None,
    command: str | None = None,
) -> BaseStudent:
    """Converts `teacher` by `recipe` into the folder `out`, and returns the student.

    `plan`: a plan file to use instead of selecting. `data`: text or images instead of the recipe's. `resume`: continue
    an interrupted run in `out`, or measure its trained student again; `overwrite`: delete an earlier run there first.
    `layers`: cut the teacher to its first layers (for trials). Writes the model, plan.yaml, scores.json, metrics.json,
    log.jsonl, report.html and README.md. If a selector names several plans and none is trained further, the other
    models are written into folders of these names. Raises UserError for invalid arguments.
    """
    # Check the settings before anything is loaded
    start_time = time.perf_counter()
    recipe = checked_recipe(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    load_options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "layers": layers}
    with Conversion.open(recipe, Path(out), resume=resume, overwrite=overwrite, **load_options) as conversion:
        run, recipe = conversion.run, conversion.recipe
        run.say(f"teacher: {conversion.teacher.name}; {conversion.data.amount}")

        # What would end the run after training ends it now
        check_heldout(recipe.evaluate, conversion.teacher, conversion.data)

        # Align all-linear students, and select a plan with them
        linear_students = conversion.all_linear_students(given_plan)
        if given_plan is None:
            check_selection(conversion, linear_students)
        results = align(conversion, linear_students)
        if given_plan is None:
            student_plan, scores = select_plan(conversion, linear_students)
        else:
            student_plan, scores = given_plan, {}
            run.write("plan.yaml", student_plan.to_yaml())
        run.say(f"plan: {student_plan.pattern()}")
        conversion.warn_of(student_plan)

        # Distill the student of this plan
        student = conversion.new_student(student_plan, mixers_from=linear_students.values())
        conversion.untie(student)
        results += train_stages(conversion, student, scope="plan")
        conversion.retie(student)

        # Save it before anything else can fail; then evaluate it, and write the rest
        if run.main:
            _save(conversion, student)
            _save_named_plans(conversion, student_plan, linear_students)
            with _student_is_safe(run):
                metrics = _measure(conversion, student, linear_students)
                run.seconds["total"] = time.perf_counter() - start_time
                metrics |= _costs(conversion, results, scores) | provenance(run, command) | _hashes(conversion)
                run.write("metrics.json", json_text(metrics))
                write_report(run.out)
                write_model_card(run.out)
                print_table(metrics, run.console)
            run.say(f"model, report.html and metrics.json are in {run.out}")
    return student


@contextmanager
def _student_is_safe(run: Run) -> Iterator[None]:
    """Says, if the block fails or is interrupted, that the trained student is saved and how to measure it again."""
    try:
        yield
    except BaseException:
        run.say(f"the trained student is saved in {run.out}: --resume measures it again, without training")
        raise


def _save(conversion: Conversion, student: BaseStudent, name: str = "") -> None:
    """Writes a model with its tokenizer or image processor into the run's folder, or the folder `name` in it."""
    with conversion.run.writing(name) as folder:
        student.save_pretrained(folder)
        conversion.teacher.reader.save_pretrained(folder)


def _save_named_plans(conversion: Conversion, student_plan: Plan, linear_students: Mapping[str, BaseStudent]) -> None:
    """Saves the students of the selector's other named plans, unless the recipe trains the selected plan further."""
    if any(stage.scope == "plan" for stage in conversion.recipe.stages):
        return
    run = conversion.run
    for name, file in named_plans(run.out).items():
        if (named_plan := Plan.load(file)).layers != student_plan.layers:
            _save(conversion, conversion.new_student(named_plan, mixers_from=linear_students.values()), name)
            run.say(f"the model of the selector's plan '{name}' is in {run.out / name}")


def _measure(
    conversion: Conversion, student: BaseStudent, linear_students: Mapping[str, BaseStudent]
) -> dict[str, Any]:
    """Rows, samples and verdicts of metrics.json: the student and the baselines of the same budget or cache bytes."""
    recipe, run, teacher, data = conversion.recipe, conversion.run, conversion.teacher, conversion.data
    with run.timed("evaluate"):
        baselines = {
            name: conversion.new_student(baseline.plan, linear_students.values() if baseline.aligned else ())
            for name, baseline in baseline_plans(recipe, student.plan).items()
        }
        models = {"student": student} | baselines
        heldout_data = "images" if teacher.kind.of_images else "text and retrieval"
        run.say(f"measuring the teacher and {fmt.count(len(models), 'model')} on held-out {heldout_data} ...")
        metrics = evaluate_models(models, teacher, data, recipe.evaluate, recipe.dtype, run.console)
    metrics["verdicts"] = verdicts(metrics, recipe.evaluate.contexts)
    return metrics


def _costs(conversion: Conversion, results: list[StageResult], scores: dict[str, Any]) -> dict[str, Any]:
    """Time, tokens and costs of each part, for metrics.json."""
    return {
        "teacher_name": conversion.teacher.name,
        "teacher_fingerprint": conversion.teacher.fingerprint,
        "stages": [result.as_dict() for result in results],
        "selection": {key: scores.get(key) for key in ("by", "budget", "spent", "seconds")},
        "seconds": conversion.run.seconds,
        "tokens": {result.name: result.tokens for result in results},
        "tokens_per_second": {result.name: result.tokens_per_second for result in results},
    }


def _hashes(conversion: Conversion) -> dict[str, Any]:
    """Sources of the data and hashes of the saved weights, for metrics.json."""
    weights = sorted(conversion.run.out.glob("*.safetensors"))
    return {"text": conversion.data.sources, "sha256": {file.name: sha256_of_file(file) for file in weights}}
