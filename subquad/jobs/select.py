"""Selection: from aligned all-linear students to a plan, as part of a conversion or on its own."""

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
from subquad.select.budget import kept_layers
from subquad.select.speed import DecodeCost, decode_cost
from subquad.select.units import kind_of, layers_in
from subquad.utils.files import json_text
from subquad.utils.progress import StageProgress

SPEED_TOKENS = 512  # tokens on which the teacher's speed is measured, for estimates of cost


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
    """Aligns an all-linear student if the selector needs it, selects the heads that keep attention, writes the plan.

    scores.json is written next to `out`. `scores`: the scores.json of an earlier selection, for another budget; nothing
    is measured again, and only the plan is written. `dry_run`: print the cost only, write nothing and return None.
    `resume`: continue an interrupted selection. Raises UserError for invalid arguments, and if `out` exists and
    `overwrite` is not set.
    """
    # Check the settings before anything is loaded.
    recipe = checked_recipe(recipe, teacher, data)
    out = Path(out)
    if out.exists() and not overwrite and not dry_run:
        raise UserError(f"{out} exists; give --overwrite to replace it")
    load_options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}

    # From earlier scores, or for the cost only: without measurements and without a work folder.
    if scores is not None or dry_run:
        with (
            tempfile.TemporaryDirectory() as folder,
            Conversion.open(recipe, Path(folder) / "run", **load_options) as conversion,
        ):
            if scores is None:
                _print_costs(conversion)
                return None
            plan = _from_scores(conversion, Path(scores))
            if conversion.run.main:
                plan.save(out)
            conversion.run.say(f"plan: {plan.pattern()}\n{out} written")
            return plan

    # Align, select, and move the results next to `out` when all are written.
    work_folder = out.with_name(f"{out.stem}.work")
    with Conversion.open(recipe, work_folder, resume=resume, overwrite=not resume, **load_options) as conversion:
        linear_students = conversion.all_linear_students()
        if SELECTORS[recipe.selector.by].aligned:
            check_selection(conversion, linear_students)
            align(conversion, linear_students)
        plan, selection_scores = select_plan(conversion, linear_students)
    run = conversion.run
    if run.main:
        scores_file = out.with_name("scores.json")
        run.write("scores.json", json_text(selection_scores | {"command": command}))
        os.replace(work_folder / "scores.json", scores_file)
        for file in named_plans(work_folder).values():
            os.replace(file, out.with_name(file.name.replace("plan", out.stem, 1)))
        os.replace(work_folder / "plan.yaml", out)
        shutil.rmtree(work_folder)
        run.say(f"plan: {plan.pattern()}\n{out} and {scores_file} written")
        conversion.warn_of(plan)
    return plan


def _from_scores(conversion: Conversion, file: Path) -> Plan:
    """Plan under the recipe's budget, from the scores of an earlier selection."""
    recipe, teacher = conversion.recipe, conversion.teacher
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        is_same_model = scores["teacher_fingerprint"] == teacher.fingerprint and scores["mixer"] == recipe.mixer.name
        kept = sorted({*scores.get("kept_layers", []), *kept_layers(recipe.selector, teacher.shapes)})
        plans = {
            name: Plan.by_layer(teacher.shapes, kept, name, options) for name, options in mixers_of(recipe).items()
        }
        ranking = Ranking.of_scores(scores, plans[recipe.mixer.name]) if is_same_model else None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is not the scores.json of a selection with scores: run `subquad select` first"
        ) from None
    if ranking is None:
        raise UserError(
            f"{file} is of another teacher or mixer than {teacher.name} and {recipe.mixer.name}: select again, or give "
            "those (--mixer)"
        )
    alternatives = {name: Student.from_teacher(teacher.model, plan) for name, plan in plans.items()}
    student = alternatives.pop(recipe.mixer.name)
    decoding_cost = _decoding_cost(SelectionWork(conversion.run.say), teacher, student)
    budget = Budget.parse(recipe.selector.budget)
    return choose_plan(student, budget, ranking, recipe.mixer.join, decoding_cost, alternatives)[0]


def _print_costs(conversion: Conversion) -> None:
    """Prints the cost of aligning and selecting."""
    recipe = conversion.recipe
    linear_students = conversion.all_linear_students()
    if SELECTORS[recipe.selector.by].aligned:
        for stage in recipe.stages:
            if stage.scope == "all-linear":
                times = f", {len(linear_students)} times" if len(linear_students) > 1 else ""
                conversion.run.say(f"{stage.name}: {stage.tokens:,} tokens of training{times}")
    selection_cost(conversion, linear_students)


def selection_cost(conversion: Conversion, linear_students: Mapping[str, BaseStudent]) -> TokenCost:
    """Prints and returns the cost of selecting."""
    settings = conversion.recipe.selector
    inputs = _inputs(conversion, linear_students)
    cost = make_selector(settings.by, settings.options).cost(inputs)
    inputs.work.print_cost(cost)
    return cost.tokens


def check_selection(conversion: Conversion, linear_students: Mapping[str, BaseStudent]) -> None:
    """Raises UserError for inputs that the recipe's selector cannot use, before anything is trained for it."""
    settings = conversion.recipe.selector
    if not settings.options.get("retrain_tokens"):  # whose stage may load another teacher
        make_selector(settings.by, settings.options).cost(_inputs(conversion, linear_students))


def select_plan(conversion: Conversion, linear_students: Mapping[str, BaseStudent]) -> tuple[Plan, dict[str, Any]]:
    """Plan and scores.json: read if the resumed run has written them, else measured and written."""
    run, settings = conversion.run, conversion.recipe.selector
    plan_file, scores_file = run.out / "plan.yaml", run.out / "scores.json"
    if run.resume and plan_file.is_file() and scores_file.is_file():
        return Plan.load(plan_file), json.loads(scores_file.read_text(encoding="utf-8"))
    with run.timed("select"), StageProgress(run.console, f"select by {settings.by}", unit="piece") as bar:
        inputs = _inputs(conversion, linear_students)
        work = inputs.work

        def show(pieces: int, total: int) -> None:
            tokens = work.actual_cost.forward_tokens + work.actual_cost.training_tokens
            bar.update(pieces, f"{tokens / (time.perf_counter() - work.start_time):,.0f} tokens/s", total)

        work.progress = show
        plan, scores = _choose(conversion, inputs)
    run.write("scores.json", json_text(scores))
    run.write("plan.yaml", plan.to_yaml())
    run.accelerator.wait_for_everyone()
    return plan, scores


def named_plans(folder: Path) -> dict[str, Path]:
    """Files of the selector's named plans besides the selected one, such as greedy's `best` and `opt`."""
    return {path.stem.removeprefix("plan-"): path for path in sorted(folder.glob("plan-*.yaml"))}


def teacher_speed(conversion: Conversion) -> float:
    """Tokens per second of the teacher's bare forward pass on a row of text, or a few images."""
    data, model = conversion.data, conversion.teacher.model
    length = data.tokens if isinstance(data, ImageSet) else None
    tokens = min(SPEED_TOKENS, conversion.longest)
    return bare_forward_speed(model, data.sample(tokens).to(model.device), sequence_length=length)


def _inputs(conversion: Conversion, linear_students: Mapping[str, BaseStudent]) -> SelectorInputs:
    """Inputs of the recipe's selector, whose work is saved in the run's folder."""
    recipe, run, settings = conversion.recipe, conversion.run, conversion.recipe.selector
    selector = SELECTORS[settings.by]
    alternatives = dict(linear_students)
    linear_student = alternatives.pop(recipe.mixer.name)
    text_BT = torch.zeros(0, 0, dtype=torch.long)
    if selector.text:
        rows = math.ceil(settings.tokens / settings.sequence_length)
        text_BT = conversion.corpus.heldout_batch(rows, settings.sequence_length, part="selection")
    return SelectorInputs(
        linear_student,
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
    """Plan that the selector's ranking gives under the budget, and scores.json."""
    recipe, settings, teacher = conversion.recipe, conversion.recipe.selector, conversion.teacher
    student, work, budget = inputs.student, inputs.work, inputs.budget
    ranking = make_selector(settings.by, settings.options).run(inputs)
    decoding_cost = _decoding_cost(work, teacher, student)
    plan, chosen_units = choose_plan(student, budget, ranking, recipe.mixer.join, decoding_cost, inputs.alternatives)
    for name in ranking.named:
        named_plan, _ = choose_plan(student, Budget(name, word=name), ranking, recipe.mixer.join)
        conversion.run.write(f"plan-{name}.yaml", named_plan.to_yaml())
    scores = ranking.report | pareto(student, budget, ranking, recipe.mixer.join) | work.report()
    kind, kept = kind_of(inputs.unit), student.plan.attention_layers
    lists_layers = kind == "group" or (kind == "layer" and bool(kept))
    scores |= {
        "by": settings.by,
        "unit": kind,
        "units": [layers_in(unit) for unit in inputs.units] if lists_layers else None,
        "kept_layers": kept,
        "worth": None if ranking.worth is None else list(ranking.worth),
        "alternatives": ranking.alternatives,
        "teacher_fingerprint": teacher.fingerprint,
        "mixer": recipe.mixer.name,
        "budget": settings.budget,
        "chosen": chosen_units,
        "seed": recipe.seed,
    }
    return plan, scores


def _decoding_cost(work: SelectionWork, teacher: Teacher, student: BaseStudent) -> Callable[[int], DecodeCost]:
    """Function from a context to the seconds of a decoding step, measured on demand.

    The measurement is a piece of `work`, so all processes share its result, and a resumed run reads it again.
    """

    def measure(context: int) -> list[float]:
        assert isinstance(student, Student)  # checked_recipe rejects budgets of decoding for images
        all_attention = Student.from_teacher(teacher.model, Plan.all_attention(student.plan.shapes))
        cost = decode_cost(all_attention, student, context)
        return [*cost.attention, *cost.mixer, cost.rest]

    def cost_at(context: int) -> DecodeCost:
        name = f"decoding after {context}"
        seconds = work.map(name, 1, lambda _: measure(context), item_cost=TokenCost())[0].tolist()
        layers = student.plan.num_layers
        return DecodeCost(seconds[:layers], seconds[layers:-1], seconds[-1])

    return cost_at
