"""What a stage trains: which parameters, at which learning rate, and in what precision.

Notable:
- Everything else is frozen, so autograd does no work for it, and it goes on sharing its memory with the teacher. A
  shared parameter that is to be trained gets a copy of its own first (`Student.unshare`).
- Parameters of half precision are trained as float32 and rounded when the stage ends: AdamW's small steps would be lost
  in bfloat16. The forward pass then runs under autocast.
- Weight decay is for matrices; norms, biases and gates of one dimension are left alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from subquad.errors import UserError
from subquad.recipe import Stage
from subquad.student import Student

Parameters = dict[str, nn.Parameter]


def choose_parameters(student: Student, stage: Stage, reachable: set[str]) -> Parameters:
    """The parameters that `stage` trains, by name, each with memory of its own; requires_grad is set for these alone.

    `reachable` are the names that get a gradient from the stage's pass: others are left out.
    Raises UserError if a glob of `trainable` or `lr_groups` matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in student.named_parameters()]
    if stage.trainable == "mixers":
        chosen = {name for name, _ in student.mixer_parameters()}
    elif stage.trainable == "all":
        chosen = set(names)
    else:
        chosen = {name for glob in stage.trainable for name in _match(glob, names, stage)}
    for glob in stage.lr_groups:
        _match(glob, names, stage)
    chosen &= reachable
    if not chosen:
        raise UserError(f"stage '{stage.name}' has nothing to train: none of 'trainable' gets a gradient from it.")
    student.unshare(sorted(chosen))
    student.requires_grad_(False)
    parameters = {name: parameter for name, parameter in student.named_parameters() if name in chosen}
    for parameter in parameters.values():
        parameter.requires_grad_()
    return parameters


def _match(glob: str, names: list[str], stage: Stage) -> list[str]:
    matched = [name for name in names if fnmatchcase(name, glob)]
    if not matched:
        example = next((name for name in names if ".mixer." in name), names[0])
        raise UserError(f"no parameter matches '{glob}' of stage '{stage.name}': names look like '{example}'.")
    return matched


def make_optimizer(parameters: Parameters, stage: Stage) -> torch.optim.AdamW:
    """AdamW with one group for each learning rate and kind of weight decay; a group keeps its own rate as `base_lr`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = next((lr for glob, lr in stage.lr_groups.items() if fnmatchcase(name, glob)), stage.lr)
        groups.setdefault((lr, stage.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    grouped: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()
    ]
    return torch.optim.AdamW(grouped, betas=stage.betas, eps=stage.eps, fused=True)


@contextmanager
def trained_in_float32(parameters: Parameters) -> Iterator[torch.dtype | None]:
    """Hold half-precision parameters in float32 within, and freeze all when done.

    Yields the dtype that the half-precision ones had, or None if there were none.
    """
    before = {name: p.dtype for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}
    for name in before:
        parameters[name].data = parameters[name].data.float()
    try:
        yield next(iter(before.values()), None)
    finally:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        for name, dtype in before.items():
            parameters[name].data = parameters[name].data.to(dtype)
