"""The main job: a teacher in, a measured student out.

`convert` reads top to bottom as what happens: load, align an all-linear student, select what keeps attention, distill
the chosen plan, measure it beside its rivals, save. Everything it needs later it finds in the run's folder, so that an
interrupted run goes on where it stopped.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subquad.data.text import Corpus
from subquad.distill.state import StageResult
from subquad.evaluate import paired_samples
from subquad.evaluate.suite import evaluate_models
from subquad.jobs.baselines import even_plan, verdicts, window_plan
from subquad.jobs.conversion import Data, all_linear, checked_recipe, new_student, open_data, open_teacher
from subquad.jobs.run import Run, provenance, start_run
from subquad.jobs.select import named_plans, select_plan
from subquad.jobs.train import align, train_stages
from subquad.model.base import BaseStudent, plan_of
from subquad.model.student import Student, tied
from subquad.plan import Plan
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import Recipe
from subquad.report import print_table, write_model_card, write_report
from subquad.utils import format as fmt
from subquad.utils.files import sha256_of_file


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

    `plan`: a plan file to use instead of selecting. `data`: text, or images, instead of the recipe's. `resume`: go on
    with an interrupted run in `out`; `overwrite`: delete an earlier run there first. `layers`: cut the teacher to its
    first layers (for trials). Leaves the model, plan.yaml, scores.json, metrics.json, log.jsonl, report.html and
    README.md; where a selector names several plans and none is trained further, the other models lie in folders of
    these names.
    Raises UserError for anything wrong with what was given.
    """
    started = time.perf_counter()
    recipe = checked_recipe(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("load"):
        source = open_teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, layers=layers)
    with run.timed("data"):
        corpus = open_data(run, source)
    run.say(f"teacher: {source.name}; {corpus.amount}")

    linear = all_linear(run, corpus)
    results = align(run, linear, source, corpus)
    if given_plan is None:
        chosen, scores = select_plan(run, linear, source, corpus)
    else:
        chosen, scores = given_plan, {}
        run.write("plan.yaml", chosen.to_yaml())
    run.say(f"plan: {chosen.pattern()}")

    student = new_student(run, chosen, corpus, mixers_from=linear.values())
    if isinstance(student, Student) and recipe.tied_embeddings in ("untie", "retie"):
        student.untie()
    results += train_stages(run, student, source, corpus, scope="plan")
    if isinstance(student, Student) and recipe.tied_embeddings == "retie" and tied(run.base):
        student.retie()

    if run.main:
        metrics = _measure(run, source, corpus, student, linear)
        with run.writing() as folder:
            _save(student, source, folder)
        if not any(stage.scope == "plan" for stage in recipe.stages):  # else the others would need its training, too
            for name, file in named_plans(run.out).items():
                if (named := Plan.load(file)).layers != chosen.layers:
                    with run.writing(name) as folder:
                        _save(new_student(run, named, corpus, mixers_from=linear.values()), source, folder)
                    run.say(f"the plan '{name}' of the selector is a model too, in {run.out / name}")
        run.seconds["total"] = time.perf_counter() - started
        metrics |= _bill(run, source, results, scores) | provenance(run, command) | _hashes(run, corpus)
        run.write("metrics.json", json.dumps(metrics, indent=1))
        write_report(run.out)
        write_model_card(run.out)
        print_table(metrics, run.console)
        run.say(f"model, report.html and metrics.json are in {run.out}")
    run.end()
    return student


def _save(student: BaseStudent, source: Teacher, folder: Path) -> None:
    student.save_pretrained(folder)
    source.reader.save_pretrained(folder)


def _measure(
    run: Run, source: Teacher, data: Data, student: BaseStudent, linear: Mapping[str, BaseStudent]
) -> dict[str, Any]:
    """metrics.json's rows, samples and verdicts: the student beside the rivals of the same budget or cache bytes."""
    recipe, plan = run.recipe, student.plan
    with run.timed("evaluate"):
        # A student with a model of its own has no rivals: they are made of the teacher's weights.
        models = {"student": student} | ({} if recipe.student else _rivals(run, plan, data, linear))
        what = "text and retrieval" if isinstance(data, Corpus) else "images"
        run.say(f"measuring the teacher and {fmt.count(len(models), 'model')} on held-out {what} ...")
        plans = {"teacher": plan_of(source.model)} | {name: model.plan for name, model in models.items()}
        metrics = evaluate_models(models, source, data, plans, recipe.evaluate, recipe.dtype, run.console)
        if isinstance(data, Corpus):
            prompts, length = recipe.evaluate.prompts, recipe.evaluate.max_new_tokens
            metrics["samples"] = paired_samples(source.model, student, source.tokenizer, prompts, length)
    metrics["verdicts"] = verdicts(metrics, recipe.evaluate.contexts)
    return metrics


def _rivals(run: Run, plan: Plan, data: Data, linear: Mapping[str, BaseStudent]) -> dict[str, BaseStudent]:
    """Students of the same budget or cache bytes that were trained less, or not."""
    recipe = run.recipe
    even = even_plan(plan, recipe.mixer.name, recipe.mixer.options, recipe.dtype)
    rivals = {}
    if any(stage.scope == "all-linear" for stage in recipe.stages):
        rivals["aligned"] = new_student(run, plan, data, mixers_from=linear.values())
    if even.layers != plan.layers:
        rivals["uniform"] = new_student(run, even, data, mixers_from=linear.values())
    rivals["untrained"] = new_student(run, plan, data)
    if isinstance(data, Corpus):  # an encoder has no cache, whose bytes a window could have
        rivals["window"] = new_student(run, window_plan(plan, recipe.dtype), data)
    return rivals


def _bill(run: Run, source: Teacher, results: list[StageResult], scores: dict[str, Any]) -> dict[str, Any]:
    """What each part cost, for metrics.json."""
    return {
        "teacher_name": source.name,
        "teacher_fingerprint": source.fingerprint,
        "stages": [result.as_dict() for result in results],
        "selection": {key: scores.get(key) for key in ("by", "budget", "spent", "seconds")},
        "seconds": run.seconds,
        "tokens": {result.name: result.tokens for result in results},
        "tokens_per_second": {result.name: result.tokens_per_second for result in results},
    }


def _hashes(run: Run, data: Data) -> dict[str, Any]:
    """Of what was read and the weights that were written, for metrics.json."""
    return {
        "text": data.sources,
        "sha256": {file.name: sha256_of_file(file) for file in sorted(run.out.glob("*.safetensors"))},
    }
