"""Low-rank adapters for the length of a stage, by PEFT.

While a stage trains them, the linear maps of the student are wrapped; when it is done the adapters' product is added to
the weights (which get a copy of their own first: the teacher shares them), and the wrapping is taken off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from peft import LoraConfig, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.model.student import tied
from subquad.recipes.stage import Stage

ADAPTER = "default"


def lora_targets(student: BaseStudent, stage: Stage) -> list[str]:
    """Paths, in the student's backbone, of the linear maps that get adapters.

    Raises UserError for a glob that matches no linear map.
    """
    assert stage.lora is not None
    shared = student.get_output_embeddings() if tied(student) else None  # an adapter would change the embedding too
    linears = [
        path
        for path, module in student.backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".mixer." not in path and module is not shared
    ]
    if stage.lora.targets == "qkvo":
        inside = [student.config.attention_paths[layer] for layer in student.replaced_layers()]
        return [path for path in linears if path.startswith(tuple(f"{attention}." for attention in inside))]
    for glob in stage.lora.targets:
        if not any(fnmatchcase(path, glob) for path in linears):
            raise UserError(f"no linear map matches '{glob}' of stage '{stage.name}': names look like '{linears[0]}'")
    return [path for path in linears if any(fnmatchcase(path, glob) for glob in stage.lora.targets)]


@contextmanager
def adapters(student: BaseStudent, stage: Stage, seed: int) -> Iterator[None]:
    """Within, the student has the adapters that `stage` asks for (if any); afterwards they are merged."""
    if stage.lora is None:
        yield
        return
    targets = lora_targets(student, stage)
    student.unshare(
        name for path in targets for name, _ in student.named_parameters() if name.startswith(f"backbone.{path}.")
    )
    transposed = isinstance(student.backbone.get_submodule(targets[0]), Conv1D)
    # PEFT types alpha as an integer, and computes with any number.
    config = LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=transposed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = LoraModel(student.backbone, config, ADAPTER)
    try:
        yield
    finally:
        wrapped.merge_and_unload()
