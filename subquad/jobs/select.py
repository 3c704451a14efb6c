"""The selector at work: from an aligned all-linear student to a plan, as part of a conversion or on its own."""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subquad.data.images import ImageSet
from subquad.data.text import Corpus
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.jobs.conversion import Data, all_linear, checked_recipe, mixers_of, open_data, open_teacher
from subquad.jobs.run import Run, start_run
from subquad.jobs.train import align, candidate_training
from subquad.model.base import BaseStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import Recipe
from subquad.select import (
    SELECTORS,
    Budget,
    Ranking,
    SelectorInputs,
    TokenCost,
    Work,
    choose_plan,
    make_selector,
    pareto,
)
from subquad.select.speed import DecodeCost, decode_cost
from subquad.select.units import kind_of, layers_in
from subquad.utils.progress import StageProgress

SPEED_TOKENS = 512  # that the teacher's speed is measured on, for the bill


def select(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "plan.yaml",
    *,
    data: list[str] | None = None,
    scores: str | Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> Plan | None:
    """Aligns an all-linear student where the selector needs it, chooses what keeps attention, and writes the plan.

    scores.json is written beside `out`. `scores`: that of an earlier selection, for another budget: nothing is measured
    again, and only the plan is written. `dry_run`: only the bill is said, and nothing written (None is returned).
    `resume`: go on with an interrupted selection. Raises UserError for anything wrong with what was given, or when
    `out` exists and is not to be overwritten.
    """
    recipe = checked_recipe(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite and not dry_run:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    how = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    if scores is not None:
        with tempfile.TemporaryDirectory() as folder:
            run = start_run(recipe, Path(folder) / "run", resume=False, overwrite=False)
            plan = _from_scores(run, Path(scores), **how)
            run.end()
        if run.main:
            plan.save(out)
        run.say(f"plan: {plan.pattern()}\n{out} written")
        return plan
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            _bill(start_run(recipe, Path(folder) / "run", resume=False, overwrite=False), **how)
        return None
    work = out.with_name(f"{out.stem}.work")
    run = start_run(recipe, work, resume=resume, overwrite=not resume)
    source = open_teacher(run, **how)
    corpus = open_data(run, source)
    linear = all_linear(run, corpus)
    if SELECTORS[recipe.selector.by].aligned:
        align(run, linear, source, corpus)
    plan, found = select_plan(run, linear, source, corpus)
    run.end()
    if run.main:
        scores_file = out.with_name("scores.json")
        (work / "scores.json").write_text(json.dumps(found | {"command": command}, indent=1), encoding="utf-8")
        os.replace(work / "scores.json", scores_file)
        for named in named_plans(work).values():
            os.replace(named, out.with_name(named.name.replace("plan", out.stem, 1)))
        os.replace(work / "plan.yaml", out)
        shutil.rmtree(work)
        run.say(f"plan: {plan.pattern()}\n{out} and {scores_file} written")
    return plan


def _from_scores(run: Run, file: Path, **how: Any) -> Plan:
    """The plan that an earlier selection's scores give under the recipe's budget."""
    recipe, budget = run.recipe, Budget.parse(run.recipe.selector.budget)
    source = open_teacher(run, **how)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = found["teacher_fingerprint"] == source.fingerprint and found["mixer"] == recipe.mixer.name
        choice = Ranking.of_scores(found, shapes_of(source.model)) if known else None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is not the scores.json of a selection with scores: run `subquad select` first"
        ) from None
    if choice is None:
        raise UserError(
            f"{file} is of another teacher or mixer than {source.name} and {recipe.mixer.name}: select again, or give "
            "those (--mixer)"
        )
    aligned = {
        name: Student.from_teacher(source.model, Plan.by_layer(shapes_of(source.model), [], name, options))
        for name, options in mixers_of(recipe).items()
    }
    linear = aligned.pop(recipe.mixer.name)
    seconds = _decoding(Work(run.say), source, linear)
    return choose_plan(linear, budget, choice, recipe.mixer.join, seconds, aligned)[0]


def _bill(run: Run, **how: Any) -> None:
    """Says what aligning and selecting would cost."""
    source = open_teacher(run, **how)
    data = open_data(run, source)
    linear = all_linear(run, data)
    if SELECTORS[run.recipe.selector.by].aligned:
        for stage in run.recipe.stages:
            if stage.scope == "all-linear":
                times = f", {len(linear)} times" if len(linear) > 1 else ""
                run.say(f"{stage.name}: {stage.tokens:,} tokens of training{times}")
    selection_cost(run, linear, source, data)
    run.end()


def selection_cost(run: Run, linear: Mapping[str, BaseStudent], source: Teacher, data: Data) -> TokenCost:
    """What selecting would cost, said and returned."""
    work = _work(run, source, data)
    settings = run.recipe.selector
    cost = make_selector(settings.by, settings.options).cost(_inputs(run, linear, source, data, work))
    work.announce(cost)
    return cost.tokens


def select_plan(
    run: Run, linear: Mapping[str, BaseStudent], source: Teacher, data: Data
) -> tuple[Plan, dict[str, Any]]:
    """The plan and scores.json: read, when an interrupted run had got as far, else measured and written."""
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    work = _work(run, source, data)
    with run.timed("select"), StageProgress(run.console, f"select by {run.recipe.selector.by}", unit="piece") as bar:

        def show(done: int, total: int) -> None:
            tokens = work.spent.forward_tokens + work.spent.training_tokens
            bar.update(done, f"{tokens / (time.perf_counter() - work.started):,.0f} tokens/s", total)

        work.progress = show
        plan, scores = _choose(run, linear, source, data, work)
    run.write("scores.json", json.dumps(scores, indent=1))
    run.write("plan.yaml", plan.to_yaml())
    run.accelerator.wait_for_everyone()
    return plan, scores


def named_plans(folder: Path) -> dict[str, Path]:
    """The plans beside the chosen one that a selector has names for, such as greedy's `best` and `opt`."""
    return {path.stem.removeprefix("plan-"): path for path in sorted(folder.glob("plan-*.yaml"))}


def teacher_speed(source: Teacher, data: Data) -> float:
    """Tokens per second of the teacher's bare forward pass on a row of text, or a few images."""
    length = data.tokens if isinstance(data, ImageSet) else None
    return bare_forward_speed(source.model, data.sample(SPEED_TOKENS).to(source.model.device), sequence_length=length)


def _work(run: Run, source: Teacher, data: Data) -> Work:
    speed = partial(teacher_speed, source, data)
    return Work(run.say, accelerator=run.accelerator, file=run.out / "selection.jsonl", speed=speed)


def _inputs(run: Run, aligned: Mapping[str, BaseStudent], source: Teacher, data: Data, work: Work) -> SelectorInputs:
    recipe, settings = run.recipe, run.recipe.selector
    selector = SELECTORS[settings.by]
    alternatives = dict(aligned)
    linear = alternatives.pop(recipe.mixer.name)
    text_BT = torch.zeros(0, 0, dtype=torch.long)
    if selector.text:
        assert isinstance(data, Corpus)  # as `checked_recipe` ensures
        rows = math.ceil(settings.tokens / settings.sequence_length)
        text_BT = data.heldout_batch(rows, settings.sequence_length, part="selection")
    return SelectorInputs(
        linear,
        source,
        text_BT,
        Budget.parse(settings.budget),
        selector.unit if settings.unit is None else settings.unit,
        data if isinstance(data, Corpus) else None,
        candidate_training(run, source, data) if settings.options.get("retrain_tokens") else None,
        recipe.seed,
        work,
        alternatives,
    )


def _choose(
    run: Run, aligned: Mapping[str, BaseStudent], source: Teacher, data: Data, work: Work
) -> tuple[Plan, dict[str, Any]]:
    recipe, settings = run.recipe, run.recipe.selector
    question = _inputs(run, aligned, source, data, work)
    linear, alternatives, budget = question.student, question.alternatives, question.budget
    choice = make_selector(settings.by, settings.options).run(question)

    seconds = _decoding(work, source, linear)
    plan, kept = choose_plan(linear, budget, choice, recipe.mixer.join, seconds, alternatives)
    for name in choice.named:
        named, _ = choose_plan(linear, Budget(name, word=name), choice, recipe.mixer.join)
        run.write(f"plan-{name}.yaml", named.to_yaml())
    scores = choice.report | pareto(linear, budget, choice, recipe.mixer.join) | work.report()
    scores |= {
        "by": settings.by,
        "unit": kind_of(question.unit),
        "units": [layers_in(unit) for unit in question.units] if kind_of(question.unit) == "group" else None,
        "worth": None if choice.worth is None else list(choice.worth),
        "alternatives": choice.alternatives,
        "teacher_fingerprint": source.fingerprint,
        "mixer": recipe.mixer.name,
        "budget": settings.budget,
        "chosen": kept,
        "seed": recipe.seed,
    }
    return plan, scores


def _decoding(work: Work, source: Teacher, linear: BaseStudent) -> Callable[[int], DecodeCost]:
    """What decoding steps take, measured when it is asked for.

    It is a piece of the work, so that all processes have the same, and an interrupted run the same again.
    """

    def measured(context: int) -> list[float]:
        assert isinstance(linear, Student)  # no other has a budget of decoding
        everything = Student.from_teacher(source.model, Plan.all_attention(linear.plan.shapes))
        found = decode_cost(everything, linear, context)
        return [*found.attention, *found.mixer, found.rest]

    def seconds(context: int) -> DecodeCost:
        found = work.pieces(f"decoding after {context}", 1, lambda _: measured(context), each=TokenCost())[0].tolist()
        layers = linear.plan.num_layers
        return DecodeCost(found[:layers], found[layers:-1], found[-1])

    return seconds
