"""The main job: a teacher in, a measured student out.

`convert` reads top to bottom as what happens: load, align an all-linear student, select the layers that keep attention,
distill the chosen plan, measure it beside its rivals, save. Everything it needs later it finds in the run's folder, so
that an interrupted run goes on where it stopped.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from subquad.attention import find_attention
from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus, load_corpus
from subquad.distill.heads import check_head
from subquad.distill.ledger import StageResult
from subquad.distill.loop import run_stage
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.evaluate import samples
from subquad.evaluate.harness import load_tasks
from subquad.measure import even_plan, measured_rows, verdicts, window_plan
from subquad.mixers import mixer_options
from subquad.plan import ATTENTION, AttentionShape, Plan
from subquad.recipe import Recipe, load_recipe
from subquad.report import print_table, write_model_card, write_report
from subquad.run import Run, facts, start_run
from subquad.select import MEASURING, READING, SELECTORS, Budget, Choice, Question, check_selector, choose_plan
from subquad.stage import Stage
from subquad.student import Student, tied
from subquad.teacher import Teacher, load_teacher

CALIBRATION_TOKENS = 1024


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
) -> Student:
    """Converts `teacher` by `recipe` into the folder `out`, and returns the student.

    `plan`: a plan file to use instead of selecting. `data`: text instead of the recipe's. `resume`: go on with an
    interrupted run in `out`; `overwrite`: delete an earlier run there first. `layers`: cut the teacher to its first
    layers (for trials). Leaves the model, plan.yaml, scores.json, metrics.json, log.jsonl, report.html and README.md.
    Raises UserError for anything wrong with what was given.
    """
    started = time.perf_counter()
    recipe = settled(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("load"):
        source = open_teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, layers=layers)
    with run.timed("data"):
        corpus = open_corpus(run, source)
    run.say(f"teacher: {source.name}; text: {len(corpus.train):,} tokens to train on")

    linear = _all_linear(run, source, corpus)
    results = _train(run, linear, source, corpus, scope="all-linear")
    if given_plan is None:
        chosen, scores = _select(run, linear, source, corpus)
    else:
        chosen, scores = given_plan, {}
        run.write("plan.yaml", chosen.to_yaml())
    run.say(f"plan: {chosen.pattern()}")

    student = _student(run, source, chosen, corpus, mixers_from=linear)
    if recipe.tied_embeddings in ("untie", "retie"):
        student.untie()
    results += _train(run, student, source, corpus, scope="plan")
    if recipe.tied_embeddings == "retie" and tied(source.model):
        student.retie()

    if run.main:
        metrics = _measure(run, source, corpus, student, linear)
        with run.writing() as folder:
            student.save_pretrained(folder)
            source.tokenizer.save_pretrained(folder)
        run.seconds["total"] = time.perf_counter() - started
        metrics |= _bill(run, source, results, scores) | facts(run, command)
        run.write("metrics.json", json.dumps(metrics, indent=1))
        write_report(run.out)
        write_model_card(run.out)
        print_table(metrics, run.console)
        run.say(f"model, report.html and metrics.json are in {run.out}")
    run.end()
    return student


def select(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "plan.yaml",
    *,
    data: list[str] | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> Plan:
    """Aligns an all-linear student, chooses the layers that keep attention, and writes the plan to the file `out`.

    scores.json is written beside it. Raises UserError for anything wrong with what was given, or when `out` exists.
    """
    recipe = settled(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    work = out.with_name(f"{out.stem}.work")
    run = start_run(recipe, work, resume=False, overwrite=True)
    source = open_teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    corpus = open_corpus(run, source)
    linear = _all_linear(run, source, corpus)
    if recipe.selector.by in MEASURING:
        _train(run, linear, source, corpus, scope="all-linear")
    plan, scores = _select(run, linear, source, corpus)
    run.end()
    if run.main:
        scores_file = out.with_name("scores.json")
        (work / "scores.json").write_text(json.dumps(scores | {"command": command}, indent=1), encoding="utf-8")
        os.replace(work / "scores.json", scores_file)
        os.replace(work / "plan.yaml", out)
        shutil.rmtree(work)
        run.say(f"plan: {plan.pattern()}\n{out} and {scores_file} written")
    return plan


# Starting ------------------------------------------------------------------------------------------------------------


def settled(recipe: Recipe | str | Path, teacher: str, data: list[str] | None) -> Recipe:
    """The recipe with what was given beside it, and checked by those who know its mixer, its selector and its tasks."""
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).model_copy(deep=True)
    recipe.teacher = teacher
    if data:
        recipe.data.sources = data
    streamed = [source for source in recipe.data.sources or [] if not Path(source).exists()]
    if streamed and recipe.data.max_tokens is None:  # a stream has no end: take what the stages will read
        read = sum(stage.tokens for stage in recipe.stages)
        recipe.data.max_tokens = max(1, round(1.1 * read))
    mixer_options(recipe.mixer.name, recipe.mixer.options)
    if recipe.mixer.name == ATTENTION:
        raise UserError("the recipe's mixer is attention itself, so there is nothing to convert: choose another mixer")
    check_selector(recipe.selector.by, recipe.selector.options)
    Budget.parse(recipe.selector.budget)
    load_tasks(recipe.evaluate.tasks)
    return recipe


def open_teacher(run: Run, **how: Any) -> Teacher:
    """The recipe's teacher, on this process's device; refused by name if it cannot be converted."""
    source = load_teacher(run.recipe.teacher, dtype=run.recipe.dtype, device=str(run.accelerator.device), **how)
    find_attention(source.model)
    check_head(source.model)
    if run.recipe.tied_embeddings == "refuse" and tied(source.model):
        raise UserError(
            f"the teacher '{source.name}' ties its output head to its input embedding, and the recipe refuses that "
            "(tied_embeddings): choose untie, retie or keep, or another teacher"
        )
    return source


def open_corpus(run: Run, source: Teacher) -> Corpus:
    data = run.recipe.data
    with run.accelerator.main_process_first():
        return load_corpus(
            data.sources, source.tokenizer, max_tokens=data.max_tokens, heldout_fraction=data.heldout_fraction
        )


def shapes_of(model: Any) -> list[AttentionShape]:
    return [site.shape for site in find_attention(model)]


def _student(run: Run, source: Teacher, plan: Plan, corpus: Corpus, mixers_from: Student | None = None) -> Student:
    """A student with this plan: its mixers are another one's where that has the same, and calibrated elsewhere."""
    torch.manual_seed(0)  # the few new weights that start at random: gates' inner projections
    start = run.recipe.mixer.join_start
    student = Student.from_teacher(source.model, plan, mixers_from=mixers_from, join_start=start)
    if student.new_mixers:
        length = min(CALIBRATION_TOKENS, len(corpus.train))
        student.calibrate(corpus.batch(0, batch=1, sequence_length=length, seed=0).to(student.device), student.new_mixers)
    return student


def _all_linear(run: Run, source: Teacher, corpus: Corpus) -> Student:
    mixer = run.recipe.mixer
    with run.timed("calibrate"):
        return _student(run, source, Plan.by_layer(shapes_of(source.model), [], mixer.name, mixer.options), corpus)


# Working -------------------------------------------------------------------------------------------------------------


def _train(run: Run, student: Student, source: Teacher, corpus: Corpus, scope: str) -> list[StageResult]:
    """The stages of one scope, in order."""
    results = []
    for index, stage in enumerate(run.recipe.stages):
        if stage.scope == scope:
            logits_from, text = _logits_from(run, stage, source, corpus)
            with run.timed(stage.name):
                result = run_stage(
                    stage,
                    index=index,
                    student=student,
                    teacher_model=source.model,
                    corpus=text,
                    logits_from=logits_from,
                    seed=run.recipe.seed,
                    out=run.out,
                    accelerator=run.accelerator,
                    progress=run.console if run.main else None,
                    resume=run.resume,
                )
            run.say(
                f"{stage.name}: {result.tokens:,} tokens at {result.tokens_per_second:.0f} tokens/s, "
                f"{result.share_of_bare_forward:.0%} of the teacher's bare forward pass"
            )
            results.append(result)
    return results


def _logits_from(run: Run, stage: Stage, source: Teacher, corpus: Corpus) -> tuple[Any, Corpus]:
    """What a stage's own teacher or its stored logits are, if it has such, and the text that these know."""
    if stage.teacher is not None:
        other = load_teacher(stage.teacher, dtype=run.recipe.dtype, device=str(run.accelerator.device))
        if other.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise UserError(
                f"stage '{stage.name}' cannot learn from {other.name}: its vocabulary is not that of {source.name}"
            )
        return other.model, corpus
    if stage.teacher_cache is not None:
        cache = TeacherCache.open(
            Path(stage.teacher_cache),
            teacher_fingerprint=source.fingerprint,
            tokenizer_hash=tokenizer_hash(source.tokenizer),
        )
        if cache.sequence_length != stage.sequence_length:
            raise UserError(
                f"stage '{stage.name}' has sequences of {stage.sequence_length} tokens, and the logits in "
                f"{stage.teacher_cache} are of {cache.sequence_length}: set sequence_length to that"
            )
        return cache, corpus.first(cache.tokens)
    return None, corpus


def _select(run: Run, linear: Student, source: Teacher, corpus: Corpus) -> tuple[Plan, dict[str, Any]]:
    """The plan and scores.json: read, when an interrupted run had got as far, else measured and written."""
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    selector = run.recipe.selector
    text_BT = torch.zeros(0, 0, dtype=torch.long)
    if selector.by in READING:
        rows = math.ceil(selector.tokens / selector.sequence_length)
        text_BT = corpus.heldout_batch(rows, selector.sequence_length, part="selection")
    budget = Budget.parse(selector.budget)
    with run.timed("select"), Progress(console=run.console, transient=True) as bar:
        task = bar.add_task(f"select by {selector.by}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        question = Question(linear, source, text_BT, budget, progress, run.say)
        choice: Choice = SELECTORS[selector.by](question, **selector.options)
    plan, kept = choose_plan(linear, budget, choice, run.recipe.mixer.join)
    scores = choice.report | {
        "by": selector.by,
        "unit": choice.unit,
        "mixer": run.recipe.mixer.name,
        "budget": selector.budget,
        "chosen": kept,
        "seed": run.recipe.seed,
    }
    run.write("scores.json", json.dumps(scores, indent=1))
    run.write("plan.yaml", plan.to_yaml())
    run.accelerator.wait_for_everyone()
    return plan, scores


def _measure(run: Run, source: Teacher, corpus: Corpus, student: Student, linear: Student) -> dict[str, Any]:
    """metrics.json's rows, samples and verdicts: the student beside the rivals of the same budget or cache bytes."""
    recipe, plan = run.recipe, student.plan
    even = even_plan(plan, recipe.mixer.name, recipe.mixer.options, recipe.dtype)
    with run.timed("evaluate"):
        models = {"student": student}
        if any(stage.scope == "all-linear" for stage in recipe.stages):
            models["aligned"] = _student(run, source, plan, corpus, mixers_from=linear)
        if even.layers != plan.layers:
            models["uniform"] = _student(run, source, even, corpus, mixers_from=linear)
        models["untrained"] = _student(run, source, plan, corpus)
        models["window"] = _student(run, source, window_plan(plan, recipe.dtype), corpus)
        run.say(f"measuring the teacher and {len(models)} models on held-out text and retrieval ...")
        plans = {"teacher": Plan.all_attention(plan.shapes)} | {name: model.plan for name, model in models.items()}
        metrics = measured_rows(models, source, corpus, plans, recipe.evaluate, recipe.dtype)
        prompts, length = recipe.evaluate.prompts, recipe.evaluate.max_new_tokens
        theirs = samples(source.model, source.tokenizer, prompts, length)
        mine = samples(student, source.tokenizer, prompts, length)
    metrics["samples"] = [
        {"prompt": one["prompt"], "teacher": other["text"], "student": one["text"]}
        for one, other in zip(mine, theirs, strict=True)
    ]
    metrics["verdicts"] = verdicts(metrics, recipe.evaluate.contexts)
    return metrics


def _bill(run: Run, source: Teacher, results: list[StageResult], scores: dict[str, Any]) -> dict[str, Any]:
    """What each part cost, for metrics.json."""
    return {
        "teacher_name": source.name,
        "teacher_fingerprint": source.fingerprint,
        "stages": [result.as_dict() for result in results],
        "selection": {key: scores.get(key) for key in ("by", "budget", "tokens", "seconds")},
        "seconds": run.seconds,
        "tokens": {result.name: result.tokens for result in results},
        "tokens_per_second": {result.name: result.tokens_per_second for result in results},
    }
