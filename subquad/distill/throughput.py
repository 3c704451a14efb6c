"""Speed of the teacher's bare forward pass, the reference for the speed of training."""

import time

import torch
from transformers import PreTrainedModel

from subquad.data.batch import Batch, inputs_of
from subquad.model.output_head import OutputHead, final_hidden, has_head


@torch.no_grad()
def bare_forward_speed(
    teacher: PreTrainedModel, batch: Batch, *, seconds: float = 0.2, sequence_length: int | None = None
) -> float:
    """Tokens per second of the teacher's forward pass from its inputs to all logits, on this process's device.

    Passes over the batch are repeated until `seconds` have passed. Logits are computed in chunks and dropped.
    `sequence_length`: tokens of an image.
    """
    inputs = inputs_of(batch)
    head = OutputHead.of(teacher) if has_head(teacher) else (lambda hidden: hidden)
    tokens, start = 0, time.perf_counter()
    while True:
        hidden_NM = final_hidden(teacher, inputs).flatten(0, 1)
        largest = torch.stack([head(hidden_CM).max() for hidden_CM in hidden_NM.split(512)])
        largest.max().item()  # waits for the device
        tokens += len(inputs) * (sequence_length or inputs.shape[1])
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return tokens / elapsed
