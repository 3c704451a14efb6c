"""A small teacher for experiments, trained from scratch: what train_teacher and train_vit share.

A run is made of stages of the one training loop (distill/loop.py), in which an all-attention student of a random model
learns from labels. Its weights then go into a plain model of transformers, with its metrics and model card.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from subquad.data.batch import TokenSource
from subquad.distill.loop import StageInputs, run_stage
from subquad.distill.state import StageResult
from subquad.jobs.run import Run, provenance
from subquad.model.base import BaseStudent, plan_of
from subquad.model.tasks import TASKS
from subquad.recipes.schema import DataConfig, Recipe
from subquad.recipes.stage import Stage
from subquad.utils.files import json_text


@dataclass
class SmallTeacher(ABC):
    """A model to train from scratch, and how; `train` does everything in order."""

    run: Run
    reader: Any  # tokenizer or image processor, saved beside the model

    @abstractmethod
    def new_model(self) -> Any:
        """Model with random weights."""

    @abstractmethod
    def learn(self, student: BaseStudent, model: PreTrainedModel) -> list[StageResult]:
        """Trains `student`, a student of `model` in which every head attends."""

    @abstractmethod
    def measure(self, model: Any, results: list[StageResult]) -> dict[str, Any]:
        """Entries of metrics.json about the trained model."""

    @abstractmethod
    def summary(self, metrics: dict[str, Any]) -> str:
        """The run in a few lines."""

    @abstractmethod
    def model_card(self, metrics: dict[str, Any]) -> str:
        """README.md."""

    def train(self, amount: str, started: float, command: str | None) -> dict[str, Any]:
        """Builds, trains, saves and measures the model; returns its metrics, empty in all but the main process.

        `amount`: of data, for the user. `started`: time when the command began, by `time.perf_counter`.
        """
        run = self.run
        # Build a random model, and wrap it as a student that is all attention
        torch.manual_seed(run.recipe.seed)
        model = self.new_model().to(run.accelerator.device)
        student = TASKS[run.recipe.task].student.from_teacher(model, plan_of(model))
        run.say(f"{model.num_parameters():,} weights, {amount}")

        # Train it
        results = self.learn(student, model)

        # Move its weights into a plain model; save and measure that
        metrics: dict[str, Any] = {}
        if run.main:
            trained = self.new_model()
            trained.load_state_dict(student.backbone.state_dict())
            with run.writing() as folder:
                trained.save_pretrained(folder)
                self.reader.save_pretrained(folder)
            metrics = self.measure(trained, results) | {
                "parameters": trained.num_parameters(),
                "seconds": sum(result.seconds for result in results),
                "total_seconds": time.perf_counter() - started,
                **provenance(run, command),
            }
            run.write("metrics.json", json_text(metrics))
            run.write("README.md", self.model_card(metrics))
            run.say(self.summary(metrics))
        run.end()
        return metrics

    def run_stage(
        self, stage: Stage, index: int, student: BaseStudent, model: PreTrainedModel, data: TokenSource
    ) -> StageResult:
        """One stage of the training loop on `data`."""
        run = self.run
        inputs = StageInputs(model, data, run.accelerator, index, run.recipe.seed)
        progress = run.console if run.main else None
        return run_stage(stage, inputs, student=student, out=run.out, progress=progress, resume=run.resume)


def small_recipe(name: str, out: Path, seed: int, data: DataConfig, stages: list[Stage], **settings: Any) -> Recipe:
    """Settings of a run, by which `start_run` recognises it when it is resumed; its teacher is what it will make."""
    return Recipe(name=name, teacher=str(out), seed=seed, data=data, stages=stages, **settings)


def labels_stage(**settings: Any) -> Stage:
    """Stage in which all weights learn from labels, under a cosine schedule."""
    shared = {"objective": "labels", "trainable": "all", "schedule": "cosine", "log_every": 20}
    return Stage(**shared, checkpoint_every=500, **settings)


def card_header(task: str) -> str:
    """Metadata of the Hub at the top of a model card."""
    header = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["subquad"]).to_yaml()
    return f"---\n{header}\n---"


def how_it_was_made(metrics: dict[str, Any]) -> str:
    """Section of a model card: the command, the seed, the time and the machine."""
    machine = metrics["machine"]
    return f"""## How it was made

```
{metrics["command"]}
```

Seed {metrics["seed"]}, {metrics["seconds"]:,.0f} s of training on {machine["device"]} ({machine["processor"]},
{machine["cores"]} cores, {machine["threads"]} thread(s)), commit {metrics["commit"]}.
`metrics.json` has every number."""
