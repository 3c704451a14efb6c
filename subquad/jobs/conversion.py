"""Conversion: checked settings, a run folder, the teacher and its data, opened once; it creates the students."""

from collections.abc import Iterable, Iterator, Sequence
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
from subquad.jobs.fitting import fitted
from subquad.jobs.run import Run, start_run
from subquad.mixers import mixer_options
from subquad.model.base import BaseStudent
from subquad.model.image_student import image_tokens
from subquad.model.interface import find_attention, shapes_of
from subquad.model.output_head import check_head
from subquad.model.student import Student, tied
from subquad.model.tasks import TASKS
from subquad.model.teacher_check import check_causal, check_finite, check_same, check_students
from subquad.plan import ATTENTION, AttentionShape, Plan
from subquad.pretrained.load import Teacher, load_pretrained
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import NamedMixer, Recipe, SelectorConfig
from subquad.report import saving_warning
from subquad.select import SELECTORS, Budget, check_alternatives, check_selector, kept_layers

CALIBRATION_TOKENS = 1024

Data: TypeAlias = Corpus | ImageSet


def checked_recipe(recipe: Recipe | str | Path, teacher: str, data: list[str] | None) -> Recipe:
    """Copy of the recipe with this teacher and data, checked with its mixers, its selector and its evaluation tasks."""
    # The caller's teacher and data
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).model_copy(deep=True)
    recipe.teacher = teacher
    if data:
        recipe.data.sources = data

    # The amount of data
    is_streamed = any(not Path(source).exists() for source in recipe.data.sources or [])
    of_images = TASKS[recipe.task].of_images
    if not of_images and recipe.data.max_images is not None:
        raise UserError("data.max_images counts images, and the recipe is for text: give data.max_tokens")
    if not of_images and is_streamed and recipe.data.max_tokens is None:
        # A stream has no end: take the tokens that the stages will read.
        training_tokens = sum(stage.tokens for stage in recipe.stages)
        recipe.data.max_tokens = max(1, round(1.1 * training_tokens))

    # Mixers, selector, the student's own model, and evaluation tasks
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
    """Raises UserError for settings that a recipe on images cannot have."""
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
    for key, is_set in (
        ("tied_embeddings is", recipe.tied_embeddings != "keep"),
        ("evaluate.tasks are", bool(recipe.evaluate.tasks)),
    ):
        if is_set:
            raise UserError(f"{key} of language models: leave it out")
    if recipe.data.max_tokens is not None:
        raise UserError("data.max_tokens counts text: give data.max_images")
    for stage in recipe.stages:
        if stage.teacher_cache is not None:
            raise UserError(f"stage '{stage.name}' has a teacher_cache, which holds answers to text: leave it out")


@dataclass
class Conversion:
    """Recipe with everything it needs: the run folder, the teacher, and its text or images.

    `base` is the model whose attention is replaced: the teacher's, or the student's own. The recipe's rows have at most
    the tokens that these models take, `longest` in all; for images, its stages have the number of tokens of an image as
    their sequence length.
    """

    recipe: Recipe
    run: Run
    teacher: Teacher
    base: PreTrainedModel
    data: Data
    longest: int = CALIBRATION_TOKENS  # tokens of a row

    @classmethod
    @contextmanager
    def open(
        cls, recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False, **load_options: Any
    ) -> Iterator["Conversion"]:
        """Starts or resumes a run in `out`, loads the teacher and reads the data; closes the run at the end.

        `load_options`: arguments of `load_pretrained`. Raises UserError for an unsuitable folder, teacher or data.
        """
        run = start_run(recipe, out, resume=resume, overwrite=overwrite)
        with run.timed("load"):
            teacher = open_teacher(recipe, str(run.accelerator.device), **load_options)
            base = teacher.model if recipe.student is None else fresh_model(teacher, recipe.student, recipe.seed)
            recipe, longest = _checked_models(recipe, run, teacher, base)
        with run.timed("data"), run.accelerator.main_process_first():
            data = read_data(recipe, teacher)
        for remark in data.remarks:
            run.say(remark)
        if isinstance(data, ImageSet):  # the tokens of an image replace the stages' sequence length
            stages = [stage.model_copy(update={"sequence_length": data.tokens}) for stage in recipe.stages]
            recipe = recipe.model_copy(update={"stages": stages})
        yield cls(recipe, run, teacher, base, data, longest)
        run.end()

    @property
    def corpus(self) -> Corpus:
        """Data of a recipe for text."""
        assert isinstance(self.data, Corpus), "checked_recipe rejects settings that need text in a recipe for images"
        return self.data

    def new_student(self, plan: Plan, mixers_from: Iterable[BaseStudent] = ()) -> BaseStudent:
        """Student with this plan. It shares the mixers of the students in `mixers_from`; new mixers are calibrated."""
        torch.manual_seed(0)  # of the few new weights with random values: gates' inner projections
        student = self.teacher.kind.student.from_teacher(
            self.base, plan, mixers_from=mixers_from, join_start=self.recipe.mixer.join_start
        )
        if student.new_mixers:
            sample = self.data.sample(min(CALIBRATION_TOKENS, self.longest)).to(student.device)
            student.calibrate(inputs_of(sample), student.new_mixers)
        return student

    def all_linear_students(self, given_plan: Plan | None = None) -> dict[str, BaseStudent]:
        """Student without attention for each of the recipe's mixers, the recipe's main mixer first.

        The teacher's own sliding-window layers keep attention where the budget does not count them, unless a given plan
        replaces them.
        """
        shapes, settings = shapes_of(self.base), self.recipe.selector
        kept = kept_layers(settings, shapes, given_plan)
        if given_plan is None and (note := _about_windows(settings, shapes, kept)):
            self.run.say(note)
        with self.run.timed("calibrate"):
            return {
                name: self.new_student(Plan.by_layer(shapes, kept, name, options))
                for name, options in mixers_of(self.recipe).items()
            }

    def warn_of(self, plan: Plan) -> None:
        """Says at which contexts a plan saves no cache, or little. Image encoders have none."""
        warning = "" if self.teacher.kind.of_images else saving_warning(plan, self.recipe.dtype)
        if warning:
            self.run.say(warning)

    def untie(self, student: BaseStudent) -> None:
        """Gives the student an untied output head if the recipe trains one."""
        if self.recipe.tied_embeddings in ("untie", "retie"):
            assert isinstance(student, Student)  # checked_recipe rejects the key for images
            student.untie()

    def retie(self, student: BaseStudent) -> None:
        """Ties the student's head and embedding again if the teacher's are tied and the recipe asks for it."""
        if self.recipe.tied_embeddings == "retie" and tied(self.base):
            assert isinstance(student, Student)
            student.retie()


def open_teacher(recipe: Recipe, device: str, **load_options: Any) -> Teacher:
    """Teacher of the recipe, on this device. Raises UserError, naming it, if it cannot be converted."""
    teacher = load_pretrained(recipe.teacher, task=recipe.task, dtype=recipe.dtype, device=device, **load_options)
    find_attention(teacher.model)
    if not teacher.kind.of_images:
        check_causal(teacher.model)
        check_finite(teacher.model)
    check_head(teacher.model)
    if recipe.tied_embeddings == "refuse" and tied(teacher.model):
        raise UserError(
            f"the teacher '{teacher.name}' ties its output head to its input embedding, and the recipe refuses that "
            "(tied_embeddings): choose untie, retie or keep, or another teacher"
        )
    return teacher


def _about_windows(settings: SelectorConfig, shapes: Sequence[AttentionShape], kept: Sequence[int]) -> str:
    """Sentence on what the budget counts in a teacher with sliding windows; empty if there is nothing to say."""
    if kept:
        others = len(shapes) - len(kept)
        return (
            f"{len(kept)} of {len(shapes)} layers have the teacher's own sliding window, whose cache does not grow "
            f"with the context: they keep attention, and the budget {settings.budget} is of the other {others} "
            "(selector.window_layers=replace counts all)"
        )
    if all(shape.window is not None for shape in shapes) and Budget.parse(settings.budget).context is None:
        return f"every layer has the teacher's own sliding window, so the budget {settings.budget} is of all of them"
    return ""


def _checked_models(recipe: Recipe, run: Run, teacher: Teacher, base: PreTrainedModel) -> tuple[Recipe, int]:
    """Recipe fitted to the models, and its longest row; says what it cuts, and what the teacher itself lacks.

    Raises UserError for a model whose students could not generate.
    """
    if teacher.kind.of_images:
        return recipe, CALIBRATION_TOKENS
    shapes, make_student = shapes_of(base), teacher.kind.student.from_teacher
    all_attention = make_student(base, Plan.all_attention(shapes))
    check_same(base, all_attention)
    students = {
        name: make_student(base, Plan.by_layer(shapes, [], name, mixers_of(recipe)[name])) for name in mixers_of(recipe)
    }
    for note in check_students(base, {"attention": all_attention} | students):
        run.say(note)
    other_models = [] if base is teacher.model else [base]
    recipe, longest, sentence = fitted(recipe, teacher, other_models, {"calibration": CALIBRATION_TOKENS})
    if sentence:
        run.say(sentence)
    return recipe, longest


def read_data(recipe: Recipe, teacher: Teacher) -> Data:
    """Data for training and evaluation, as the teacher reads it. Raises UserError for unsuitable data."""
    return read_images(recipe, teacher) if teacher.kind.of_images else read_text(recipe, teacher)


def read_text(recipe: Recipe, teacher: Teacher) -> Corpus:
    """Text of the recipe in the teacher's tokens. Raises UserError as `load_corpus` does."""
    settings = recipe.data
    return load_corpus(
        settings.sources,
        teacher.tokenizer,
        max_tokens=settings.max_tokens,
        heldout_fraction=settings.heldout_fraction,
    )


def read_images(recipe: Recipe, teacher: Teacher) -> ImageSet:
    """Images of the recipe, as the teacher's processor reads them. Raises UserError for unsuitable images or labels."""
    settings = recipe.data
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
    label_stages = [stage.name for stage in recipe.stages if "labels" in stage.weights]
    if label_stages and not images.classes:
        raise UserError(f"stage '{label_stages[0]}' has the objective 'labels', and {source} has none: choose another")
    num_labels = teacher.model.config.num_labels or 0
    if recipe.task == "image-classification" and len(images.classes) > num_labels:
        raise UserError(
            f"{source} has {len(images.classes)} classes, and {teacher.name} has {num_labels}: give the images that it "
            "was trained on, or set the task to image-feature-extraction"
        )
    return images


def mixers_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Options of the recipe's mixer, and then of its alternatives, by name."""
    mixers: list[NamedMixer] = [recipe.mixer, *recipe.mixer.alternatives]
    return {mixer.name: mixer.options for mixer in mixers}
