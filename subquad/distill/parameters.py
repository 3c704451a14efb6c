"""Parameters that a stage trains, their learning rates, and their precision.

Notable:
- All other parameters are frozen, so autograd skips them, and they keep sharing memory with the teacher. A shared
  parameter is copied before it is trained (`BaseStudent.unshare`).
- Half-precision parameters are trained as float32 and rounded at the end of the stage, because bfloat16 would lose
  AdamW's small steps. The forward pass then runs under autocast.
- Weight decay applies to matrices only, not to norms, biases and gates of one dimension.
- Tied embeddings are one parameter, named as the input embedding. Training it also trains the output head.
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
    """Returns the parameters that `stage` trains, by name.

    They no longer share memory with the teacher, and requires_grad is set for them alone. `reachable`: names of the
    parameters that can get a gradient from the stage's pass; all others are left out.
    Raises UserError if a glob of `trainable` or `lr_groups` matches no parameter, or if nothing is left to train.
    """
    trained_names = {name for pattern in stage.trained for name in parameter_names(student, pattern, stage)}
    for pattern in stage.lr_groups:
        parameter_names(student, pattern, stage)
    trained_names &= reachable
    if not trained_names:
        raise UserError(f"stage '{stage.name}' has nothing to train: none of 'trainable' gets a gradient from it.")
    student.unshare(sorted(trained_names))
    student.requires_grad_(False)
    parameters = {name: parameter for name, parameter in student.named_parameters() if name in trained_names}
    for parameter in parameters.values():
        parameter.requires_grad_()
    return parameters


def parameter_names(student: BaseStudent, pattern: str, stage: Stage) -> set[str]:
    """Returns the names of the parameters in a set of `stage.SETS`, or of those that match a glob.

    Raises UserError for a glob that matches no parameter.
    """
    names = [name for name, _ in student.named_parameters()]
    if pattern == "all":
        return {*names}
    if pattern == "mixers":
        return {name for name in names if ".mixer." in name}
    if pattern == "lora":
        return {name for name in names if ".lora_" in name}
    if pattern == "qkvo":
        modules = student.attention_modules()
        members = {parameter for layer in student.replaced_layers() for parameter in modules[layer].parameters()}
        member_names = {name for name, parameter in student.named_parameters() if parameter in members}
        return {name for name in member_names if ".mixer." not in name and ".lora_" not in name}
    if pattern == "all but mlp":
        return {*names} - _mlp_names(student)
    matching_names = {name for name in names if fnmatchcase(name, pattern)}
    if not matching_names:
        raise UserError(f"no parameter matches '{pattern}' of stage '{stage.name}'{_hint(student, pattern, names)}")
    return matching_names


def _mlp_names(student: BaseStudent) -> set[str]:
    """Names of the parameters of all modules with a matrix in a block, except its attention (norms have no matrix)."""
    mlp_parameters: set[nn.Parameter] = set()
    for block, attention in zip(student.blocks(), student.attention_modules(), strict=True):
        for child in block.children():
            parameters = [*child.parameters()]
            if attention not in child.modules() and any(parameter.dim() > 1 for parameter in parameters):
                mlp_parameters |= {*parameters}
    return {name for name, parameter in student.named_parameters() if parameter in mlp_parameters}


def _hint(student: BaseStudent, glob: str, names: list[str]) -> str:
    example = next((name for name in names if ".mixer." in name), names[0])
    head = student.get_output_embeddings()
    heads = [name for name, module in student.named_modules() if module is head]
    if student.config.tie_word_embeddings and any(fnmatchcase(f"{name}.weight", glob) for name in heads):
        return ": the output head is tied to the input embedding; train that, or set tied_embeddings to untie or retie"
    return f": names look like '{example}'."


def make_optimizer(parameters: Parameters, stage: Stage, student: BaseStudent) -> torch.optim.AdamW:
    """Makes AdamW, with a group for each learning rate and weight decay; `base_lr` is the rate before scheduling."""
    rates = [(parameter_names(student, pattern, stage), lr) for pattern, lr in stage.lr_groups.items()]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        lr = next((lr for names, lr in rates if name in names), stage.lr)
        groups.setdefault((lr, stage.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    param_groups: list[dict[str, Any]] = [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()
    ]
    return torch.optim.AdamW(param_groups, betas=stage.betas, eps=stage.eps, fused=True)


@contextmanager
def trained_in_float32(parameters: Parameters) -> Iterator[torch.dtype | None]:
    """Within, half-precision parameters are float32; afterwards, all parameters are frozen.

    Yields the dtype of the half-precision parameters, or None if there are none.
    """
    half_dtypes = {name: p.dtype for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}
    for name in half_dtypes:
        parameters[name].data = parameters[name].data.float()
    try:
        yield next(iter(half_dtypes.values()), None)
    finally:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        for name, dtype in half_dtypes.items():
            parameters[name].data = parameters[name].data.to(dtype)


@contextmanager
def checkpointed_blocks(student: BaseStudent, enabled: bool) -> Iterator[None]:
    """Within, if `enabled`, each block recomputes its activations in the backward pass instead of storing them.

    Blocks do so in training mode only. So they alone are set to training mode, and the modules inside them stay in
    evaluation mode. Raises UserError for a model without gradient checkpointing.
    """
    if not enabled:
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
