"""A small vision transformer for experiments, trained from nothing on a set of labelled images.

As with the small teacher of text (train_teacher.py), a run is a stage of the one training loop: an all-attention
student that learns from labels. What comes out is a plain `ViTForImageClassification`, with its accuracy on test images
in metrics.json and README.md.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from subquad.data.images import ImageSet, load_images
from subquad.distill.loop import run_stage
from subquad.distill.state import StageResult
from subquad.errors import UserError
from subquad.evaluate import image_fidelity
from subquad.jobs.run import Run, provenance, start_run
from subquad.model.base import plan_of
from subquad.model.image_student import ImageStudent
from subquad.recipes.schema import DataConfig, Recipe
from subquad.recipes.stage import Stage

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

    `epochs`: times that every image is read. `size`, `patch`: pixels of an image's and of a patch's sides. `resume`: go
    on with an interrupted run in `out`; `overwrite`: delete an earlier run there first. Leaves the model, its image
    processor, README.md, metrics.json, log.jsonl and checkpoints. Raises UserError for anything wrong with what was
    given.
    """
    started = time.perf_counter()
    if size % patch or not epochs > 0:
        raise UserError(
            f"images of {size} pixels are not cut into patches of {patch}, or {epochs:g} epochs are no time"
        )
    tokens = 1 + (size // patch) ** 2
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=PLAIN, image_std=PLAIN)
    images = load_images(data, processor, tokens=tokens, heldout_fraction=HELDOUT)
    if not images.classes:
        raise UserError(f"{data} has no labels to learn from: give images with classes")
    recipe = _recipe(Path(out), data, images, epochs, seed)
    run = start_run(recipe, Path(out), resume=resume, overwrite=overwrite)
    torch.manual_seed(seed)
    fresh = new_vit(images, patch).to(run.accelerator.device)
    student = ImageStudent.from_teacher(fresh, plan_of(fresh))
    run.say(f"{fresh.num_parameters():,} weights; {images.amount}")
    result = run_stage(
        recipe.stages[0],
        index=0,
        student=student,
        teacher_model=fresh,
        corpus=images,
        seed=seed,
        out=run.out,
        accelerator=run.accelerator,
        progress=run.console if run.main else None,
        resume=run.resume,
    )
    model = new_vit(images, patch)
    model.load_state_dict(student.backbone.state_dict())
    metrics: dict[str, Any] = {}
    if run.main:
        metrics = _measured(run, model, images, result)
        metrics |= {"epochs": epochs, "total_seconds": time.perf_counter() - started} | provenance(run, command)
        with run.writing() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        run.write("metrics.json", json.dumps(metrics, indent=1))
        run.write("README.md", model_card(metrics))
        run.say(summary(metrics))
    run.end()
    return metrics


def _recipe(out: Path, data: str, images: ImageSet, epochs: float, seed: int) -> Recipe:
    """The settings of the run, in the file by which `start_run` knows it again; its teacher is what it will make."""
    stage = Stage(
        name="labels",
        objective="labels",
        trainable="all",
        tokens=max(1, round(epochs * len(images.parts["train"]) * images.tokens)),
        sequence_length=images.tokens,
        batch=BATCH,
        lr=RATE,
        betas=(0.9, 0.99),
        schedule="cosine",
        min_lr_ratio=0.0,
        weight_decay=0.05,
        log_every=20,
        checkpoint_every=500,
    )
    return Recipe(
        name="small-vit",
        description="a small vision transformer, trained from nothing",
        task="image-classification",
        teacher=str(out),
        seed=seed,
        data=DataConfig(sources=[data], heldout_fraction=HELDOUT),
        stages=[stage],
    )


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


def _measured(run: Run, model: ViTForImageClassification, images: ImageSet, result: StageResult) -> dict[str, Any]:
    """metrics.json: the accuracy on all test images, and what it took."""
    test = images.heldout_batches(len(images.parts["test"]), batch=256)
    measured = image_fidelity({}, model.eval(), test)["teacher"]
    return {
        "accuracy": measured["accuracy"],
        "accuracy_stderr": measured["accuracy_stderr"],
        "test_images": measured["count"],
        "train_images": len(images.parts["train"]),
        "parameters": model.num_parameters(),
        "data": images.sources,
        "stages": [result.as_dict()],
        "seconds": result.seconds,
    }


def summary(metrics: dict[str, Any]) -> str:
    """The run in a line, for people."""
    accuracy, error = (f"{100 * metrics[key]:.1f}" for key in ("accuracy", "accuracy_stderr"))
    return f"accuracy {accuracy} ± {error} % on {metrics['test_images']:,} test images, {metrics['seconds']:,.0f} s"


def model_card(metrics: dict[str, Any]) -> str:
    """README.md: what the model is for, how it was made, and its accuracy."""
    header = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=["subquad"]).to_yaml()
    machine = metrics["machine"]
    return f"""---
{header}
---

# A small vision transformer

{LAYERS} layers of {HEADS} heads, {metrics["parameters"]:,} weights, trained from nothing by Subquad on
{metrics["train_images"]:,} images of `{metrics["data"][0]["name"]}`, {metrics["epochs"]:g} epochs, for experiments.

{summary(metrics)} of training, seed {metrics["seed"]}, on {machine["device"]} ({machine["processor"]},
{machine["threads"]} thread(s)), commit {metrics["commit"]}. `metrics.json` has every number.

```
{metrics["command"]}
```
"""
