"""What a stage will take, from a few of its steps on few tokens: seconds, and bytes by what holds them.

The steps are real ones, with the stage's own objective, what it trains and its optimiser; what they change is meant to
be thrown away. The first is slower than all others and is not timed; between it and the timed one, the tensors that a
pass makes are counted.
"""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subquad.distill.loop import StageInputs, micro_rows, prepared
from subquad.model.base import BaseStudent
from subquad.recipes.stage import Stage
from subquad.utils.timing import seconds_of

SHORTEST = 64  # tokens of a row: shorter ones tell little of longer ones


@dataclass(frozen=True)
class StageEstimate:
    """One process's part in a stage, as tried."""

    tokens: int  # of the micro-batch that was tried
    whole: int  # tokens of a micro-batch as the stage has it
    pass_seconds: float  # of that whole micro-batch, forward and backward
    update_seconds: float  # of the optimiser
    trained: int  # weights
    trained_bytes: int  # of them while they are trained; their gradients take as much, AdamW's moments twice that
    activation_bytes: int  # the most that a pass over a whole micro-batch makes at once beside gradients
    weights: dict[int, int]  # bytes of the student's weights by where they are, while it is trained

    def seconds(self, stage: Stage, steps: int) -> float:
        """Of so many optimiser steps of the stage."""
        return steps * (stage.accumulate * self.pass_seconds + self.update_seconds)


def estimate_stage(stage: Stage, inputs: StageInputs, *, student: BaseStudent, tokens: int) -> StageEstimate:
    """Tries a stage on micro-batches of about `tokens` tokens, shorter rows first; changes `student`.

    Seconds and activations are extrapolated in proportion to tokens. Raises UserError for what training would refuse.
    """
    processes, longest = inputs.accelerator.num_processes, stage.sequence_length
    rows = micro_rows(stage, processes)
    inputs.data.batch(0, batch=1, sequence_length=longest, seed=inputs.seed)  # there is a row that long
    length = longest if stage.teacher_cache else min(longest, max(tokens, SHORTEST))  # a cache knows whole rows only
    tried = max(1, min(rows, tokens // length))
    short = {"batch": tried * processes, "accumulate": 1, "sequence_length": length}
    with prepared(stage.model_copy(update=short), inputs, student) as run:
        run.step(inputs.data)
        input_ids_BT = run.my_slice(inputs.data)
        with TensorBytes() as made, run.autocast():
            run.training_pass(input_ids_BT, 1.0)
        step = seconds_of(partial(run.step, inputs.data), run.training_pass.device)
        update = seconds_of(run.optimizer.step, run.training_pass.device)
        more = rows * longest / (tried * length)
        return StageEstimate(
            tokens=tried * length,
            whole=rows * longest,
            pass_seconds=more * max(0.0, step - update),
            update_seconds=update,
            trained=sum(parameter.numel() for parameter in run.parameters.values()),
            trained_bytes=sum(parameter.nbytes for parameter in run.parameters.values()),
            activation_bytes=round(more * made.most),
            weights=weights_of(student),
        )


def weights_of(*models: nn.Module) -> dict[int, int]:
    """Bytes of the memory that holds the weights of these models, by address: what they share counts once."""
    storages = [parameter.untyped_storage() for model in models for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class TensorBytes(TorchDispatchMode):
    """Bytes of the tensors that are made within, `now` and at the `most` at once, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_held(tensor)}
        for tensor in tree_leaves(made):
            if _is_held(tensor) and (storage := tensor.untyped_storage())._cdata not in given:  # not a view
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def _is_held(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
