"""Estimate of a stage's time and memory from a few of its steps on few tokens.

The steps are real ones, with the stage's objective, trained parameters and optimiser, so they change the student, which
should then be discarded. The first step is slower than all others and is not timed. Before the timed steps, the tensors
of one pass are counted.
"""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad.distill.loop import StageInputs, micro_rows, prepared_run
from subquad.model.base import BaseStudent
from subquad.recipes.stage import Stage
from subquad.utils.timing import seconds_of

SHORTEST = 64  # tokens of a row: shorter rows do not predict longer ones


@dataclass(frozen=True)
class StageEstimate:
    """Time and memory of one process in a stage, as measured on a trial micro-batch."""

    tokens: int  # of the trial micro-batch
    whole: int  # tokens of a full micro-batch of the stage
    pass_seconds: float  # of a full micro-batch, forward and backward
    update_seconds: float  # of the optimiser
    trained: int  # number of weights
    trained_bytes: int  # of these weights during training; gradients take as much again, AdamW's moments twice that
    activation_bytes: int  # peak memory of a pass over a full micro-batch, without gradients
    weights: dict[int, int]  # bytes of the student's weights by address, during training

    def seconds(self, stage: Stage, steps: int) -> float:
        """Seconds of `steps` optimiser steps of the stage."""
        return steps * (stage.accumulate * self.pass_seconds + self.update_seconds)


def estimate_stage(stage: Stage, inputs: StageInputs, *, student: BaseStudent, tokens: int) -> StageEstimate:
    """Runs a few steps of a stage on micro-batches of about `tokens` tokens; changes `student`.

    To save tokens, rows are shortened before they are left out. Seconds and activations are extrapolated in proportion
    to tokens. Raises UserError for settings that training would reject.
    """
    # Choose the shape of the trial micro-batch
    processes, sequence_length = inputs.accelerator.num_processes, stage.sequence_length
    rows = micro_rows(stage, processes)
    inputs.data.batch(0, batch=1, sequence_length=sequence_length, seed=inputs.seed)  # raises if the text is too short
    # A cache holds whole rows only
    trial_length = sequence_length if stage.teacher_cache else min(sequence_length, max(tokens, SHORTEST))
    trial_rows = max(1, min(rows, tokens // trial_length))
    trial_settings = {"batch": trial_rows * processes, "accumulate": 1, "sequence_length": trial_length}

    with prepared_run(stage.model_copy(update=trial_settings), inputs, student) as run:
        # Warm up, then measure
        run.step(inputs.data)
        input_ids_BT = run.process_batch(inputs.data)
        with TensorBytes() as tensor_bytes, run.autocast():
            run.training_pass(input_ids_BT, 1.0)
        step_seconds = seconds_of(partial(run.step, inputs.data), run.training_pass.device)
        update_seconds = seconds_of(run.optimizer.step, run.training_pass.device)

        # Extrapolate to a full micro-batch
        ratio = rows * sequence_length / (trial_rows * trial_length)
        return StageEstimate(
            tokens=trial_rows * trial_length,
            whole=rows * sequence_length,
            pass_seconds=ratio * max(0.0, step_seconds - update_seconds),
            update_seconds=update_seconds,
            trained=sum(parameter.numel() for parameter in run.parameters.values()),
            trained_bytes=sum(parameter.nbytes for parameter in run.parameters.values()),
            activation_bytes=round(ratio * tensor_bytes.most),
            weights=weights_of(student),
        )


def weights_of(*models: nn.Module) -> dict[int, int]:
    """Bytes of the weights of these models, by memory address: shared memory counts once."""
    storages = [parameter.untyped_storage() for model in models for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors created within, on any device: `now`, those alive, and `most`, their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        input_storages = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_held(tensor)}
        for tensor in tree_leaves(outputs):
            if _is_held(tensor) and (storage := tensor.untyped_storage())._cdata not in input_storages:  # not a view
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        return outputs

    def _freed(self, size: int) -> None:
        self.now -= size


def _is_held(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
