"""What the processes of a run tell each other between steps."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is up in any process: all of them then do the same."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes: the only place where they exchange gradients."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
