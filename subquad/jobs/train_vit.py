"""A small vision transformer for experiments, trained from scratch on a set of labelled images.

As with the small teacher of text (train_teacher.py), a run is a stage of the one training loop: an all-attention
student that learns from labels. What comes out is a plain `ViTForImageClassification`, with its accuracy on test images
in metrics.json and README.md.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from subquad.data.images import ImageSet, load_images
from subquad.distill.state import StageResult
from subquad.errors import UserError
from subquad.evaluate import image_fidelity
from subquad.jobs.run import start_run
from subquad.jobs.small_teacher import SmallTeacher, card_header, how_it_was_made, labels_stage, small_recipe
from subquad.model.base import BaseStudent
from subquad.recipes.schema import DataConfig, Recipe

TASK = "image-classification"
WIDTH, HEADS, LAYERS = 96, 3, 4
BATCH = 64
RATE = 2e-3
HELDOUT = 0.02
PLAIN = (0.5, 0.5, 0.5)


def train_vit(
    data: str,
    out: str | Path,
    *,
    epochs: float = 5.0,
    size: int = 28,
    patch: int = 4,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a vision transformer of 4 layers on the images `data` into the folder `out`; returns its metrics.

    `epochs`: times that every image is read. `size`, `patch`: pixels of an image's and of a patch's sides. `resume`:
    continue an interrupted run in `out`; `overwrite`: delete an earlier run there first. Leaves the model, its image
    processor, README.md, metrics.json, log.jsonl and checkpoints. Raises UserError for anything wrong with what was
    given.
    """
    started = time.perf_counter()
    if size % patch:
        raise UserError(
            f"images of {size} pixels are not cut into patches of {patch}: make --size a multiple of --patch"
        )
    if not epochs > 0:
        raise UserError(f"--epochs is {epochs:g}: give a number above 0")
    tokens = 1 + (size // patch) ** 2
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=PLAIN, image_std=PLAIN)
    images = load_images(data, processor, tokens=tokens, heldout_fraction=HELDOUT)
    if not images.classes:
        raise UserError(f"{data} has no labels to learn from: give images with classes")
    recipe = _recipe(Path(out), data, images, epochs, seed)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    return SmallVit(run, processor, images, patch, epochs).train(images.amount, started, command)


def _recipe(out: Path, data: str, images: ImageSet, epochs: float, seed: int) -> Recipe:
    stage = labels_stage(
        name="labels",
        tokens=max(1, round(epochs * len(images.parts["train"]) * images.tokens)),
        sequence_length=images.tokens,
        batch=BATCH,
        lr=RATE,
        betas=(0.9, 0.99),
        min_lr_ratio=0.0,
        weight_decay=0.05,
    )
    source = DataConfig(sources=[data], heldout_fraction=HELDOUT)
    description = "a small vision transformer, trained from nothing"
    return small_recipe("small-vit", out, seed, source, [stage], description=description, task=TASK)


@dataclass
class SmallVit(SmallTeacher):
    """A vision transformer that learns the classes of images."""

    images: ImageSet
    patch: int  # pixels of a side
    epochs: float

    def new_model(self) -> ViTForImageClassification:
        """Random vision transformer; see `new_vit`."""
        return new_vit(self.images, self.patch)

    def learn(self, student: BaseStudent, model: PreTrainedModel) -> list[StageResult]:
        """The only stage."""
        return [self.run_stage(self.run.recipe.stages[0], 0, student, model, self.images)]

    def measure(self, model: ViTForImageClassification, results: list[StageResult]) -> dict[str, Any]:
        """Accuracy on all test images, and how many images it took."""
        test = self.images.heldout_batches(len(self.images.parts["test"]), batch=256)
        fidelity = image_fidelity({}, model.eval(), test)["teacher"]
        return {
            "accuracy": fidelity["accuracy"],
            "accuracy_stderr": fidelity["accuracy_stderr"],
            "test_images": fidelity["count"],
            "train_images": len(self.images.parts["train"]),
            "data": self.images.sources,
            "stages": [result.as_dict() for result in results],
            "epochs": self.epochs,
        }

    def summary(self, metrics: dict[str, Any]) -> str:
        """Accuracy and time in a line."""
        accuracy, error = (f"{100 * metrics[key]:.1f}" for key in ("accuracy", "accuracy_stderr"))
        return f"accuracy {accuracy} ± {error}% on {metrics['test_images']:,} test images, {metrics['seconds']:,.0f} s"

    def model_card(self, metrics: dict[str, Any]) -> str:
        """README.md: the purpose of the model, its accuracy, and how it was made."""
        return f"""{card_header(TASK)}

# A small vision transformer

{LAYERS} layers of {HEADS} heads, {metrics["parameters"]:,} weights, trained from scratch by Subquad on
{metrics["train_images"]:,} images of `{metrics["data"][0]["name"]}`, {metrics["epochs"]:g} epochs, for experiments.

{self.summary(metrics)} of training

{how_it_was_made(metrics)}
"""


def new_vit(images: ImageSet, patch: int) -> ViTForImageClassification:
    """A random vision transformer for these images and their classes."""
    names = dict(enumerate(images.classes))
    return ViTForImageClassification(
        ViTConfig(
            image_size=images.size[0],
            patch_size=patch,
            num_channels=images.channels,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=names,
            label2id={name: label for label, name in names.items()},
        )
    )
