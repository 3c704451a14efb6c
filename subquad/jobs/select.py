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
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.jobs.conversion import Conversion, checked_recipe, mixers_of
from subquad.jobs.train import align, candidate_training
from subquad.model.base import BaseStudent
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import Recipe
from subquad.select import (
    SELECTORS,
    Budget,
    Ranking,
    SelectionWork,
    SelectorInputs,
    TokenCost,
    choose_plan,
    make_selector,
    pareto,
)
from subquad.select.speed import DecodeCost, decode_cost
from subquad.select.units import kind_of, layers_in
from subquad.utils.progress import StageProgress

SPEED_TOKENS = 512  # that the teacher's speed is measured on, for the estimate of its cost


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
    # Check everything that can be checked before anything is loaded.
    recipe = checked_recipe(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite and not dry_run:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    how = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}

    # From earlier scores, or for the cost alone: nothing is measured and no work folder is left.
    if scores is not None or dry_run:
        with (
            tempfile.TemporaryDirectory() as folder,
            Conversion.open(recipe, Path(folder) / "run", **how) as conversion,
        ):
            if scores is None:
                _announce_costs(conversion)
                return None
            plan = _from_scores(conversion, Path(scores))
            if conversion.run.main:
                plan.save(out)
            conversion.run.say(f"plan: {plan.pattern()}\n{out} written")
            return plan

    # Align, select, and move the results beside `out` when all are there.
    work_folder = out.with_name(f"{out.stem}.work")
    with Conversion.open(recipe, work_folder, resume=resume, overwrite=not resume, **how) as conversion:
        linear = conversion.all_linear_students()
        if SELECTORS[recipe.selector.by].aligned:
            align(conversion, linear)
        plan, measured = select_plan(conversion, linear)
    run = conversion.run
    if run.main:
        scores_file = out.with_name("scores.json")
        run.write("scores.json", json.dumps(measured | {"command": command}, indent=1))
        os.replace(work_folder / "scores.json", scores_file)
        for named in named_plans(work_folder).values():
            os.replace(named, out.with_name(named.name.replace("plan", out.stem, 1)))
        os.replace(work_folder / "plan.yaml", out)
        shutil.rmtree(work_folder)
        run.say(f"plan: {plan.pattern()}\n{out} and {scores_file} written")
    return plan


def _from_scores(conversion: Conversion, file: Path) -> Plan:
    """The plan that an earlier selection's scores give under the recipe's budget."""
    recipe, teacher = conversion.recipe, conversion.teacher
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        same = scores["teacher_fingerprint"] == teacher.fingerprint and scores["mixer"] == recipe.mixer.name
        ranking = Ranking.of_scores(scores, teacher.shapes) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is not the scores.json of a selection with scores: run `subquad select` first"
        ) from None
    if ranking is None:
        raise UserError(
            f"{file} is of another teacher or mixer than {teacher.name} and {recipe.mixer.name}: select again, or give "
            "those (--mixer)"
        )
    aligned = {
        name: Student.from_teacher(teacher.model, Plan.by_layer(teacher.shapes, [], name, options))
        for name, options in mixers_of(recipe).items()
    }
    linear = aligned.pop(recipe.mixer.name)
    decoding = _decoding(SelectionWork(conversion.run.say), teacher, linear)
    budget = Budget.parse(recipe.selector.budget)
    return choose_plan(linear, budget, ranking, recipe.mixer.join, decoding, aligned)[0]


def _announce_costs(conversion: Conversion) -> None:
    """Says what aligning and selecting would cost."""
    recipe = conversion.recipe
    linear = conversion.all_linear_students()
    if SELECTORS[recipe.selector.by].aligned:
        for stage in recipe.stages:
            if stage.scope == "all-linear":
                times = f", {len(linear)} times" if len(linear) > 1 else ""
                conversion.run.say(f"{stage.name}: {stage.tokens:,} tokens of training{times}")
    selection_cost(conversion, linear)


def selection_cost(conversion: Conversion, linear: Mapping[str, BaseStudent]) -> TokenCost:
    """What selecting would cost, said and returned."""
    settings = conversion.recipe.selector
    inputs = _inputs(conversion, linear)
    cost = make_selector(settings.by, settings.options).cost(inputs)
    inputs.work.print_cost(cost)
    return cost.tokens


def select_plan(conversion: Conversion, linear: Mapping[str, BaseStudent]) -> tuple[Plan, dict[str, Any]]:
    """The plan and scores.json: read, if an interrupted run had got as far, else measured and written."""
    run, settings = conversion.run, conversion.recipe.selector
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    with run.timed("select"), StageProgress(run.console, f"select by {settings.by}", unit="piece") as bar:
        inputs = _inputs(conversion, linear)
        work = inputs.work

        def show(done: int, total: int) -> None:
            tokens = work.actual_cost.forward_tokens + work.actual_cost.training_tokens
            bar.update(done, f"{tokens / (time.perf_counter() - work.start_time):,.0f} tokens/s", total)

        work.progress = show
        plan, scores = _choose(conversion, inputs)
    run.write("scores.json", json.dumps(scores, indent=1))
    run.write("plan.yaml", plan.to_yaml())
    run.accelerator.wait_for_everyone()
    return plan, scores


def named_plans(folder: Path) -> dict[str, Path]:
    """The plans beside the chosen one that a selector has names for, such as greedy's `best` and `opt`."""
    return {path.stem.removeprefix("plan-"): path for path in sorted(folder.glob("plan-*.yaml"))}


def teacher_speed(conversion: Conversion) -> float:
    """Tokens per second of the teacher's bare forward pass on a row of text, or a few images."""
    data, model = conversion.data, conversion.teacher.model
    length = data.tokens if isinstance(data, ImageSet) else None
    return bare_forward_speed(model, data.sample(SPEED_TOKENS).to(model.device), sequence_length=length)


def _inputs(conversion: Conversion, aligned: Mapping[str, BaseStudent]) -> SelectorInputs:
    """What the recipe's selector may look at; its work is kept in the run's folder."""
    recipe, run, settings = conversion.recipe, conversion.run, conversion.recipe.selector
    selector = SELECTORS[settings.by]
    alternatives = dict(aligned)
    linear = alternatives.pop(recipe.mixer.name)
    text_BT = torch.zeros(0, 0, dtype=torch.long)
    if selector.text:
        rows = math.ceil(settings.tokens / settings.sequence_length)
        text_BT = conversion.corpus.heldout_batch(rows, settings.sequence_length, part="selection")
    return SelectorInputs(
        linear,
        conversion.teacher,
        text_BT,
        Budget.parse(settings.budget),
        selector.unit if settings.unit is None else settings.unit,
        None if conversion.teacher.kind.of_images else conversion.corpus,
        candidate_training(conversion) if settings.options.get("retrain_tokens") else None,
        recipe.seed,
        SelectionWork(
            run.say,
            accelerator=run.accelerator,
            file=run.out / "selection.jsonl",
            speed=partial(teacher_speed, conversion),
        ),
        alternatives,
    )


def _choose(conversion: Conversion, inputs: SelectorInputs) -> tuple[Plan, dict[str, Any]]:
    """The selector's ranking, the plan that the budget makes of it, and scores.json."""
    recipe, settings, teacher = conversion.recipe, conversion.recipe.selector, conversion.teacher
    linear, work, budget = inputs.student, inputs.work, inputs.budget
    ranking = make_selector(settings.by, settings.options).run(inputs)
    decoding = _decoding(work, teacher, linear)
    plan, chosen = choose_plan(linear, budget, ranking, recipe.mixer.join, decoding, inputs.alternatives)
    for name in ranking.named:
        named, _ = choose_plan(linear, Budget(name, word=name), ranking, recipe.mixer.join)
        conversion.run.write(f"plan-{name}.yaml", named.to_yaml())
    scores = ranking.report | pareto(linear, budget, ranking, recipe.mixer.join) | work.report()
    scores |= {
        "by": settings.by,
        "unit": kind_of(inputs.unit),
        "units": [layers_in(unit) for unit in inputs.units] if kind_of(inputs.unit) == "group" else None,
        "worth": None if ranking.worth is None else list(ranking.worth),
        "alternatives": ranking.alternatives,
        "teacher_fingerprint": teacher.fingerprint,
        "mixer": recipe.mixer.name,
        "budget": settings.budget,
        "chosen": chosen,
        "seed": recipe.seed,
    }
    return plan, scores


def _decoding(work: SelectionWork, teacher: Teacher, linear: BaseStudent) -> Callable[[int], DecodeCost]:
    """What decoding steps take, measured when it is asked for.

    It is a piece of the work, so that all processes have the same, and an interrupted run the same again.
    """

    def measured(context: int) -> list[float]:
        assert isinstance(linear, Student)  # no other has a budget of decoding
        everything = Student.from_teacher(teacher.model, Plan.all_attention(linear.plan.shapes))
        found = decode_cost(everything, linear, context)
        return [*found.attention, *found.mixer, found.rest]

    def seconds(context: int) -> DecodeCost:
        found = work.map(f"decoding after {context}", 1, lambda _: measured(context), item_cost=TokenCost())[0].tolist()
        layers = linear.plan.num_layers
        return DecodeCost(found[:layers], found[layers:-1], found[-1])

    return seconds
