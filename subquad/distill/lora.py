"""Low-rank adapters, by PEFT, that exist while a stage trains them.

During the stage, linear maps of the student are wrapped. At its end, the adapters' product is added to the weights,
and the wrappers are removed. These weights are copied first, because the teacher shares them.
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
    tied_head = student.get_output_embeddings() if tied(student) else None  # shares its weight with the embedding
    linears = [
        path
        for path, module in student.backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".mixer." not in path and module is not tied_head
    ]
    if stage.lora.targets == "qkvo":
        replaced_paths = [student.config.attention_paths[layer] for layer in student.replaced_layers()]
        return [path for path in linears if path.startswith(tuple(f"{attention}." for attention in replaced_paths))]
    for glob in stage.lora.targets:
        if not any(fnmatchcase(path, glob) for path in linears):
            raise UserError(f"no linear map matches '{glob}' of stage '{stage.name}': names look like '{linears[0]}'")
    return [path for path in linears if any(fnmatchcase(path, glob) for glob in stage.lora.targets)]


@contextmanager
def adapters(student: BaseStudent, stage: Stage, seed: int) -> Iterator[None]:
    """Within, the student has the adapters of `stage`, if any; they are merged afterwards."""
    if stage.lora is None:
        yield
        return
    targets = lora_targets(student, stage)
    student.unshare(
        name for path in targets for name, _ in student.named_parameters() if name.startswith(f"backbone.{path}.")
    )
    transposed = isinstance(student.backbone.get_submodule(targets[0]), Conv1D)
    # PEFT annotates alpha as an integer, but computes with any number.
    config = LoraConfig(
        r=stage.lora.rank,
        lora_alpha=stage.lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        fan_in_fan_out=transposed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora_model = LoraModel(student.backbone, config, ADAPTER)
    try:
        yield
    finally:
        lora_model.merge_and_unload()
