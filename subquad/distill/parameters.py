"""What a stage trains: which parameters, at which learning rate, and in what precision.

Notable:
- Everything else is frozen, so autograd does no work for it, and it goes on sharing its memory with the teacher. A
  shared parameter that is to be trained gets a copy of its own first (`BaseStudent.unshare`).
- Parameters of half precision are trained as float32 and rounded when the stage ends: AdamW's small steps would be lost
  in bfloat16. The forward pass then runs under autocast.
- Weight decay is for matrices; norms, biases and gates of one dimension are left alone.
- Tied embeddings are one parameter, under the name of the input embedding: whoever trains it trains the output head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.recipes.stage import Stage

Parameters = dict[str, nn.Parameter]


def choose_parameters(student: BaseStudent, stage: Stage, reachable: set[str]) -> Parameters:
    """The parameters that `stage` trains, by name, each with memory of its own; requires_grad is set for these alone.

    `reachable` are the names that get a gradient from the stage's pass: others are left out.
    Raises UserError if a glob of `trainable` or `lr_groups` matches nothing, or nothing is left to train.
    """
    chosen = {name for wish in stage.trained for name in parameter_names(student, wish, stage)}
    for wish in stage.lr_groups:
        parameter_names(student, wish, stage)
    chosen &= reachable
    if not chosen:
        raise UserError(f"stage '{stage.name}' has nothing to train: none of 'trainable' gets a gradient from it.")
    student.unshare(sorted(chosen))
    student.requires_grad_(False)
    parameters = {name: parameter for name, parameter in student.named_parameters() if name in chosen}
    for parameter in parameters.values():
        parameter.requires_grad_()
    return parameters


def parameter_names(student: BaseStudent, wish: str, stage: Stage) -> set[str]:
    """The names of the parameters in a set of `stage.SETS`, or of those that match a glob.

    Raises UserError for a glob that matches none.
    """
    names = [name for name, _ in student.named_parameters()]
    if wish == "all":
        return {*names}
    if wish == "mixers":
        return {name for name in names if ".mixer." in name}
    if wish == "lora":
        return {name for name in names if ".lora_" in name}
    if wish == "qkvo":
        modules = student.attention_modules()
        inside = {parameter for layer in student.replaced_layers() for parameter in modules[layer].parameters()}
        found = {name for name, parameter in student.named_parameters() if parameter in inside}
        return {name for name in found if ".mixer." not in name and ".lora_" not in name}
    if wish == "all but mlp":
        return {*names} - _mlp_names(student)
    matched = {name for name in names if fnmatchcase(name, wish)}
    if not matched:
        raise UserError(f"no parameter matches '{wish}' of stage '{stage.name}'{_hint(student, wish, names)}")
    return matched


def _mlp_names(student: BaseStudent) -> set[str]:
    """Parameters of what stands in a block beside its attention module and has a matrix: norms have none."""
    beside: set[nn.Parameter] = set()
    for block, attention in zip(student.blocks(), student.attention_modules(), strict=True):
        for child in block.children():
            parameters = [*child.parameters()]
            if attention not in child.modules() and any(parameter.dim() > 1 for parameter in parameters):
                beside |= {*parameters}
    return {name for name, parameter in student.named_parameters() if parameter in beside}


def _hint(student: BaseStudent, glob: str, names: list[str]) -> str:
    example = next((name for name in names if ".mixer." in name), names[0])
    head = student.get_output_embeddings()
    heads = [name for name, module in student.named_modules() if module is head]
    if student.config.tie_word_embeddings and any(fnmatchcase(f"{name}.weight", glob) for name in heads):
        return ": the output head is tied to the input embedding; train that, or set tied_embeddings to untie or retie"
    return f": names look like '{example}'."


def make_optimizer(parameters: Parameters, stage: Stage, student: BaseStudent) -> torch.optim.AdamW:
    """AdamW with one group for each learning rate and kind of weight decay; a group keeps its own rate as `base_lr`."""
    rates = [(parameter_names(student, wish, stage), lr) for wish, lr in stage.lr_groups.items()]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = next((lr for names, lr in rates if name in names), stage.lr)
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


@contextmanager
def checkpointed_blocks(student: BaseStudent, wanted: bool) -> Iterator[None]:
    """Within, if `wanted`, every block computes its inside again in the backward pass instead of keeping it.

    Raises UserError for a model whose blocks cannot. They do it in training mode only, so they alone are put into it;
    what is within them stays in evaluation mode.
    """
    if not wanted:
        yield
        return
    blocks = [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"{type(student.backbone).__name__} has no gradient checkpointing: leave it out")
    for block in blocks:
        block.gradient_checkpointing = block.training = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = block.training = False
