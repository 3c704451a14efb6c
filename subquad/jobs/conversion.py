"""A conversion: checked settings, a run folder, the teacher and its data, opened once; it makes the students."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from subquad.data.batch import inputs_of
from subquad.data.images import ImageSet, load_images, processed_size
from subquad.data.text import Corpus, load_corpus
from subquad.errors import UserError
from subquad.evaluate.harness import load_tasks
from subquad.jobs.base_model import fresh_model
from subquad.jobs.run import Run, start_run
from subquad.mixers import mixer_options
from subquad.model.base import BaseStudent
from subquad.model.image_student import image_tokens
from subquad.model.interface import find_attention, shapes_of
from subquad.model.output_head import check_head
from subquad.model.student import Student, tied
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


@dataclass
class Conversion:
    """A recipe with everything it needs open: the run folder, the teacher, and its text or images.

    `base` is the model whose attention is replaced: the teacher's, or the student's own. The recipe's stages have the
    sequence length of the data where that is fixed (images).
    """

    recipe: Recipe
    run: Run
    teacher: Teacher
    base: PreTrainedModel
    data: Data

    @classmethod
    @contextmanager
    def open(
        cls, recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False, **how: Any
    ) -> Iterator["Conversion"]:
        """Starts or resumes a run in `out`, loads the teacher and reads the data; closes the run at the end.

        `how`: arguments of `load_pretrained`. Raises UserError for a folder, a teacher or data that will not do.
        """
        run = start_run(recipe, out, resume=resume, overwrite=overwrite)
        with run.timed("load"):
            teacher = open_teacher(recipe, str(run.accelerator.device), **how)
            own = recipe.student
            base = teacher.model if own is None else fresh_model(teacher, own, recipe.seed)
        with run.timed("data"), run.accelerator.main_process_first():
            data = read_data(recipe, teacher)
        if isinstance(data, ImageSet):  # an image is a sequence of its tokens, whatever the stages have
            stages = [stage.model_copy(update={"sequence_length": data.tokens}) for stage in recipe.stages]
            recipe = recipe.model_copy(update={"stages": stages})
        yield cls(recipe, run, teacher, base, data)
        run.end()

    @property
    def corpus(self) -> Corpus:
        """The data of a recipe for text."""
        assert isinstance(self.data, Corpus), "checked_recipe lets only recipes for text ask for it"
        return self.data

    def new_student(self, plan: Plan, mixers_from: Iterable[BaseStudent] = ()) -> BaseStudent:
        """A student with this plan. Mixers that one of `mixers_from` has too are taken, the others calibrated."""
        torch.manual_seed(0)  # the few new weights that start at random: gates' inner projections
        student = self.teacher.kind.student.from_teacher(
            self.base, plan, mixers_from=mixers_from, join_start=self.recipe.mixer.join_start
        )
        if student.new_mixers:
            sample = self.data.sample(CALIBRATION_TOKENS).to(student.device)
            student.calibrate(inputs_of(sample), student.new_mixers)
        return student

    def all_linear_students(self) -> dict[str, BaseStudent]:
        """A student without attention for each of the recipe's mixers, the recipe's own first."""
        shapes = shapes_of(self.base)
        with self.run.timed("calibrate"):
            return {
                name: self.new_student(Plan.by_layer(shapes, [], name, options))
                for name, options in mixers_of(self.recipe).items()
            }

    def untie(self, student: BaseStudent) -> None:
        """Gives the student an output head of its own if the recipe trains one."""
        if self.recipe.tied_embeddings in ("untie", "retie"):
            assert isinstance(student, Student)  # checked_recipe refuses the key for images
            student.untie()

    def retie(self, student: BaseStudent) -> None:
        """Makes the student's head and embedding one again if the teacher's are and the recipe wants it."""
        if self.recipe.tied_embeddings == "retie" and tied(self.base):
            assert isinstance(student, Student)
            student.retie()


def open_teacher(recipe: Recipe, device: str, **how: Any) -> Teacher:
    """The recipe's teacher, on this device. Raises UserError, naming it, if it cannot be converted."""
    teacher = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype, device=device, **how)
    find_attention(teacher.model)
    check_head(teacher.model)
    if recipe.tied_embeddings == "refuse" and tied(teacher.model):
        raise UserError(
            f"the teacher '{teacher.name}' ties its output head to its input embedding, and the recipe refuses that "
            "(tied_embeddings): choose untie, retie or keep, or another teacher"
        )
    return teacher


def read_data(recipe: Recipe, teacher: Teacher) -> Data:
    """What a recipe trains and measures on, as the teacher reads it. Raises UserError for data that will not do."""
    settings = recipe.data
    if not teacher.kind.of_images:
        return load_corpus(
            settings.sources,
            teacher.tokenizer,
            max_tokens=settings.max_tokens,
            heldout_fraction=settings.heldout_fraction,
        )
    [source] = settings.sources or []
    images = load_images(
        source,
        teacher.reader,
        channels=teacher.model.config.num_channels,
        tokens=image_tokens(teacher.model, processed_size(teacher.reader)),
        heldout_fraction=settings.heldout_fraction,
        max_images=settings.max_images,
        seed=recipe.seed,
    )
    asking = [stage.name for stage in recipe.stages if "labels" in stage.weights]
    if asking and not images.classes:
        raise UserError(f"stage '{asking[0]}' has the objective 'labels', and {source} has none: choose another")
    known = teacher.model.config.num_labels or 0
    if recipe.task == "image-classification" and len(images.classes) > known:
        raise UserError(
            f"{source} has {len(images.classes)} classes, and {teacher.name} knows {known}: give the images that it "
            "was trained for, or set the task to image-feature-extraction"
        )
    return images


def mixers_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The options of the recipe's mixer, and then of its alternatives, by name."""
    mixers: list[NamedMixer] = [recipe.mixer, *recipe.mixer.alternatives]
    return {mixer.name: mixer.options for mixer in mixers}
