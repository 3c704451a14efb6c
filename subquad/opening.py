"""What every job begins with: settings that are checked, a teacher, its text, and a first student."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from subquad.data.text import Corpus, load_corpus
from subquad.distill.heads import check_head
from subquad.errors import UserError
from subquad.evaluate.harness import load_tasks
from subquad.fresh import fresh_model
from subquad.interface import find_attention
from subquad.mixers import mixer_options
from subquad.plan import ATTENTION, AttentionShape, Plan
from subquad.recipe import NamedMixer, Recipe, load_recipe
from subquad.run import Run
from subquad.select import SELECTORS, check_alternatives, check_selector
from subquad.student import Student, tied
from subquad.teacher import Teacher, load_teacher

CALIBRATION_TOKENS = 1024


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
    for name, options in mixers_of(recipe).items():
        mixer_options(name, options)
    if recipe.mixer.name == ATTENTION:
        raise UserError("the recipe's mixer is attention itself, so there is nothing to convert: choose another mixer")
    check_selector(recipe.selector)
    if recipe.student is not None and SELECTORS[recipe.selector.by].text:
        raise UserError(
            f"selector '{recipe.selector.by}' asks what the teacher's attention does in the student, which has a model "
            "of its own in this recipe (student): choose uniform or fixed"
        )
    check_alternatives(recipe)
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
    own = run.recipe.student
    run.base = source.model if own is None else fresh_model(source, own, run.recipe.seed)
    return source


def open_corpus(run: Run, source: Teacher) -> Corpus:
    data = run.recipe.data
    with run.accelerator.main_process_first():
        return load_corpus(
            data.sources, source.tokenizer, max_tokens=data.max_tokens, heldout_fraction=data.heldout_fraction
        )


def shapes_of(model: Any) -> list[AttentionShape]:
    return [site.shape for site in find_attention(model)]


def plan_of(model: Any) -> Plan:
    """A student's own plan; any other model's is all attention."""
    return model.plan if isinstance(model, Student) else Plan.all_attention(shapes_of(model))


def new_student(run: Run, plan: Plan, corpus: Corpus, mixers_from: Iterable[Student] = ()) -> Student:
    """A student with this plan: its mixers are another one's where that has the same, and calibrated elsewhere."""
    torch.manual_seed(0)  # the few new weights that start at random: gates' inner projections
    start = run.recipe.mixer.join_start
    student = Student.from_teacher(run.base, plan, mixers_from=mixers_from, join_start=start)
    if student.new_mixers:
        length = min(CALIBRATION_TOKENS, len(corpus.train))
        student.calibrate(
            corpus.batch(0, batch=1, sequence_length=length, seed=0).to(student.device), student.new_mixers
        )
    return student


def mixers_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The options of the recipe's mixer, and then of its alternatives, by name."""
    mixers: list[NamedMixer] = [recipe.mixer, *recipe.mixer.alternatives]
    return {mixer.name: mixer.options for mixer in mixers}


def all_linear(run: Run, corpus: Corpus) -> dict[str, Student]:
    """A student without attention for each of the recipe's mixers, the recipe's own first."""
    shapes = shapes_of(run.base)
    with run.timed("calibrate"):
        return {
            name: new_student(run, Plan.by_layer(shapes, [], name, of_mixer), corpus)
            for name, of_mixer in mixers_of(run.recipe).items()
        }
