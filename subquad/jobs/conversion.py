"""What every job begins with: settings that are checked, a teacher, its text or images, and a first student."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from subquad.data.batch import inputs_of
from subquad.data.images import ImageSet, load_images, processed_size
from subquad.data.text import Corpus, load_corpus
from subquad.errors import UserError
from subquad.evaluate.harness import load_tasks
from subquad.jobs.base_model import fresh_model
from subquad.jobs.run import Run
from subquad.mixers import mixer_options
from subquad.model.base import BaseStudent
from subquad.model.image_student import image_tokens
from subquad.model.interface import find_attention, shapes_of
from subquad.model.output_head import check_head
from subquad.model.student import tied
from subquad.model.tasks import TASKS
from subquad.plan import ATTENTION, Plan
from subquad.pretrained.load import Teacher, load_pretrained
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import NamedMixer, Recipe
from subquad.select import SELECTORS, Budget, check_alternatives, check_selector

CALIBRATION_TOKENS = 1024

Data: TypeAlias = Corpus | ImageSet


def checked_recipe(recipe: Recipe | str | Path, teacher: str, data: list[str] | None) -> Recipe:
    """The recipe with what was given beside it, and checked by those who know its mixer, its selector and its tasks."""
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).model_copy(deep=True)
    recipe.teacher = teacher
    if data:
        recipe.data.sources = data
    streamed = [source for source in recipe.data.sources or [] if not Path(source).exists()]
    of_images = TASKS[recipe.task].of_images
    if not of_images and recipe.data.max_images is not None:
        raise UserError("data.max_images counts images, and the recipe is for text: give data.max_tokens")
    if not of_images and streamed and recipe.data.max_tokens is None:
        # A stream has no end: take what the stages will read.
        read = sum(stage.tokens for stage in recipe.stages)
        recipe.data.max_tokens = max(1, round(1.1 * read))
    for name, options in mixers_of(recipe).items():
        mixer_options(name, options)
    if recipe.mixer.name == ATTENTION:
        raise UserError("the recipe's mixer is attention itself, so there is nothing to convert: choose another mixer")
    check_selector(recipe.selector)
    if of_images:
        _check_images(recipe)
    if recipe.student is not None and SELECTORS[recipe.selector.by].text:
        raise UserError(
            f"selector '{recipe.selector.by}' asks what the teacher's attention does in the student, which has a model "
            "of its own in this recipe (student): choose uniform or fixed"
        )
    check_alternatives(recipe)
    load_tasks(recipe.evaluate.tasks)
    return recipe


def _check_images(recipe: Recipe) -> None:
    """Raises UserError for what a recipe on images cannot do."""
    if len(recipe.data.sources or []) != 1:
        raise UserError(f"{recipe.task} needs one set of images: name it with --data, as a folder or a `datasets` id")
    if SELECTORS[recipe.selector.by].text:
        raise UserError(
            f"selector '{recipe.selector.by}' measures on text, and the recipe is for {recipe.task}: choose uniform or "
            "fixed"
        )
    budget = Budget.parse(recipe.selector.budget)
    if budget.context is not None or budget.speedup is not None:
        raise UserError(
            f"the budget '{recipe.selector.budget}' is of a cache or of decoding, and a model of images has neither: "
            "give a number of layers or heads, or a share of them"
        )
    for key, given in (
        ("tied_embeddings is", recipe.tied_embeddings != "keep"),
        ("evaluate.tasks are", bool(recipe.evaluate.tasks)),
    ):
        if given:
            raise UserError(f"{key} of language models: leave it out")
    if recipe.data.max_tokens is not None:
        raise UserError("data.max_tokens counts text: give data.max_images")
    for stage in recipe.stages:
        if stage.teacher_cache is not None:
            raise UserError(f"stage '{stage.name}' has a teacher_cache, which holds answers to text: leave it out")


def open_teacher(run: Run, **how: Any) -> Teacher:
    """The recipe's teacher, on this process's device; refused by name if it cannot be converted."""
    recipe, device = run.recipe, str(run.accelerator.device)
    source = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype, device=device, **how)
    find_attention(source.model)
    check_head(source.model)
    if recipe.tied_embeddings == "refuse" and tied(source.model):
        raise UserError(
            f"the teacher '{source.name}' ties its output head to its input embedding, and the recipe refuses that "
            "(tied_embeddings): choose untie, retie or keep, or another teacher"
        )
    own = recipe.student
    run.base = source.model if own is None else fresh_model(source, own, recipe.seed)
    return source


def open_data(run: Run, source: Teacher) -> Data:
    """The recipe's text or images. An image is a sequence of its tokens, whatever the stages say of their length."""
    with run.accelerator.main_process_first():
        data = read_data(run.recipe, source)
    if isinstance(data, ImageSet):
        length = {"sequence_length": data.tokens}
        run.recipe.stages = [stage.model_copy(update=length) for stage in run.recipe.stages]
    return data


def read_data(recipe: Recipe, source: Teacher) -> Data:
    """What a recipe trains and measures on, as the teacher reads it."""
    data = recipe.data
    if not TASKS[recipe.task].of_images:
        fraction = data.heldout_fraction
        return load_corpus(data.sources, source.tokenizer, max_tokens=data.max_tokens, heldout_fraction=fraction)
    [images] = data.sources or []
    found = load_images(
        images,
        source.reader,
        channels=source.model.config.num_channels,
        tokens=image_tokens(source.model, processed_size(source.reader)),
        heldout_fraction=data.heldout_fraction,
        max_images=data.max_images,
        seed=recipe.seed,
    )
    asking = [stage.name for stage in recipe.stages if "labels" in stage.weights]
    if asking and not found.classes:
        raise UserError(f"stage '{asking[0]}' has the objective 'labels', and {images} has none: choose another")
    known = source.model.config.num_labels or 0
    if recipe.task == "image-classification" and len(found.classes) > known:
        raise UserError(
            f"{images} has {len(found.classes)} classes, and {source.name} knows {known}: give the images that it was "
            "trained for, or set the task to image-feature-extraction"
        )
    return found


def new_student(run: Run, plan: Plan, data: Data, mixers_from: Iterable[BaseStudent] = ()) -> BaseStudent:
    """A student with this plan: its mixers are another one's where that has the same, and calibrated elsewhere."""
    torch.manual_seed(0)  # the few new weights that start at random: gates' inner projections
    start = run.recipe.mixer.join_start
    student = TASKS[run.recipe.task].student.from_teacher(run.base, plan, mixers_from=mixers_from, join_start=start)
    if student.new_mixers:
        sample = data.sample(CALIBRATION_TOKENS).to(student.device)
        student.calibrate(inputs_of(sample), student.new_mixers)
    return student


def mixers_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The options of the recipe's mixer, and then of its alternatives, by name."""
    mixers: list[NamedMixer] = [recipe.mixer, *recipe.mixer.alternatives]
    return {mixer.name: mixer.options for mixer in mixers}


def all_linear(run: Run, data: Data) -> dict[str, BaseStudent]:
    """A student without attention for each of the recipe's mixers, the recipe's own first."""
    shapes = shapes_of(run.base)
    with run.timed("calibrate"):
        return {
            name: new_student(run, Plan.by_layer(shapes, [], name, of_mixer), data)
            for name, of_mixer in mixers_of(run.recipe).items()
        }
