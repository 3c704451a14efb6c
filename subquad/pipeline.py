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
from typing import Any, cast

import torch
from rich.progress import Progress

from subquad.attention import find_attention
from subquad.data.text import Corpus, load_corpus
from subquad.distill.ledger import StageResult
from subquad.distill.loop import run_stage
from subquad.distill.objectives import check_head
from subquad.errors import UserError
from subquad.evaluate import samples
from subquad.measure import measured_rows, verdicts, window_plan
from subquad.mixers import mixer_options
from subquad.plan import ATTENTION, AttentionShape, Plan
from subquad.recipe import Recipe, load_recipe
from subquad.report import print_table, write_model_card, write_report
from subquad.run import Run, facts, start_run
from subquad.select import SELECTORS, Budget, Choice, check_selector, choose_plan, uniform_layers
from subquad.student import Student
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
    recipe = _settled(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    with run.timed("load"):
        source = _teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, layers=layers)
    with run.timed("data"):
        corpus = _corpus(run, source)
    run.say(f"teacher: {source.name}; text: {len(corpus.train):,} tokens to train on")

    linear = _all_linear(run, source, corpus)
    results = _train(run, linear, source, corpus, scope="all-linear")
    if given_plan is None:
        chosen, scores = _select(run, linear, source, corpus)
    else:
        chosen, scores = given_plan, {}
        run.write("plan.yaml", chosen.to_yaml())
    run.say(f"plan: {chosen.pattern()}")

    student = _student(source, chosen, corpus, mixers_from=linear)
    results += _train(run, student, source, corpus, scope="plan")

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
    recipe = _settled(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    work = out.with_name(f"{out.stem}.work")
    run = start_run(recipe, work, resume=False, overwrite=True)
    source = _teacher(run, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    corpus = _corpus(run, source)
    linear = _all_linear(run, source, corpus)
    if recipe.selector.by != "uniform":  # which measures nothing
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


def evaluate_model(
    model: str | Path,
    *,
    teacher: str | None = None,
    data: list[str] | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measures a student's folder (or any causal language model) beside its teacher; returns metrics.json's rows.

    `teacher` and `data` default to those of the recipe that made the student. Raises UserError where these are unknown.
    """
    recipe_file = Path(model) / "recipe.yaml"
    if teacher is None and not recipe_file.is_file():
        raise UserError(f"{model} does not say what its teacher is: give --teacher")
    recipe = load_recipe(recipe_file if recipe_file.is_file() else "quick")
    recipe = _settled(recipe, teacher or recipe.teacher, data)
    source = load_teacher(recipe.teacher, dtype=recipe.dtype)
    lm = load_teacher(str(model), dtype=recipe.dtype).model
    for one in (source.model, lm):
        check_head(one)
    corpus = load_corpus(
        recipe.data.sources,
        source.tokenizer,
        max_tokens=recipe.data.max_tokens,
        heldout_fraction=recipe.data.heldout_fraction,
    )
    plan = lm.plan if isinstance(lm, Student) else Plan.all_attention(_shapes(lm))
    name = "student" if isinstance(lm, Student) else "model"
    plans = {"teacher": Plan.all_attention(_shapes(source.model)), name: plan}
    metrics = measured_rows({name: lm}, source, corpus, plans, recipe.evaluate, recipe.dtype)
    text = json.dumps(metrics | {"teacher_name": source.name}, indent=1)
    if json_path is not None:
        Path(json_path).write_text(text, encoding="utf-8")
    return dict(json.loads(text))


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The model's continuation of `prompt` (or, with `chat`, its answer), greedy at temperature 0."""
    loaded = load_teacher(str(model))
    lm, tokenizer = loaded.model, loaded.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(lm.device)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast(Any, lm).generate(  # of GenerationMixin, which transformers' types hide
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=max_new_tokens, **how
    )
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


# Starting ------------------------------------------------------------------------------------------------------------


def _settled(recipe: Recipe | str | Path, teacher: str, data: list[str] | None) -> Recipe:
    """The recipe with what was given beside it written in, and what only selectors and mixers can check, checked."""
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
    return recipe


def _teacher(run: Run, **how: Any) -> Teacher:
    """The recipe's teacher, on this process's device; refused by name if it cannot be converted."""
    source = load_teacher(run.recipe.teacher, dtype=run.recipe.dtype, device=str(run.accelerator.device), **how)
    find_attention(source.model)
    check_head(source.model)
    return source


def _corpus(run: Run, source: Teacher) -> Corpus:
    data = run.recipe.data
    with run.accelerator.main_process_first():
        return load_corpus(
            data.sources, source.tokenizer, max_tokens=data.max_tokens, heldout_fraction=data.heldout_fraction
        )


def _shapes(model: Any) -> list[AttentionShape]:
    return [site.shape for site in find_attention(model)]


def _student(source: Teacher, plan: Plan, corpus: Corpus, mixers_from: Student | None = None) -> Student:
    """A student with this plan: calibrated, or with the mixers of another one."""
    torch.manual_seed(0)  # the few new weights that start at random: gates' inner projections
    student = Student.from_teacher(source.model, plan, mixers_from=mixers_from)
    if mixers_from is None or plan.mixers.keys() - mixers_from.plan.mixers.keys():
        length = min(CALIBRATION_TOKENS, len(corpus.train))
        student.calibrate(corpus.batch(0, batch=1, sequence_length=length, seed=0).to(student.device))
    return student


def _all_linear(run: Run, source: Teacher, corpus: Corpus) -> Student:
    mixer = run.recipe.mixer
    with run.timed("calibrate"):
        return _student(source, Plan.by_layer(_shapes(source.model), [], mixer.name, mixer.options), corpus)


# Working -------------------------------------------------------------------------------------------------------------


def _train(run: Run, student: Student, source: Teacher, corpus: Corpus, scope: str) -> list[StageResult]:
    """The stages of one scope, in order."""
    results = []
    for index, stage in enumerate(run.recipe.stages):
        if stage.scope == scope:
            with run.timed(stage.name):
                result = run_stage(
                    stage,
                    index=index,
                    student=student,
                    teacher_model=source.model,
                    corpus=corpus,
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


def _select(run: Run, linear: Student, source: Teacher, corpus: Corpus) -> tuple[Plan, dict[str, Any]]:
    """The plan and scores.json: read, when an interrupted run had got as far, else measured and written."""
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    selector = run.recipe.selector
    rows = math.ceil(selector.tokens / selector.sequence_length)
    tokens_BT = corpus.heldout_batch(rows, selector.sequence_length, part="selection")
    with run.timed("select"), Progress(console=run.console, transient=True) as bar:
        task = bar.add_task(f"select by {selector.by}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        choice: Choice = SELECTORS[selector.by](
            linear, teacher=source.model, tokens_BT=tokens_BT, progress=progress, **selector.options
        )
    plan, kept = choose_plan(linear, Budget.parse(selector.budget), choice)
    scores = choice.report | {
        "by": selector.by,
        "unit": "layer",
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
    spaced = uniform_layers(plan.num_layers, len(plan.attention_layers))
    even = Plan.by_layer(plan.shapes, spaced, recipe.mixer.name, recipe.mixer.options)
    with run.timed("evaluate"):
        models = {
            "student": student,
            "aligned": _student(source, plan, corpus, mixers_from=linear),
            "uniform": _student(source, even, corpus, mixers_from=linear),
            "untrained": _student(source, plan, corpus),
            "window": _student(source, window_plan(plan, recipe.dtype), corpus),
        }
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
