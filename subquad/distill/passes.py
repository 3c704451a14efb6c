"""The two training passes over a micro-batch, and the teacher's bare forward pass that they are measured by.

`TeacherForced` aligns the mixers: the teacher runs once, without gradients and without its output head, and every layer
of the student answers the *teacher's* input of that layer, all in this one pass. Each layer's loss goes backward at
once, so only one layer's graph is ever in memory, and the teacher stops after the attention of the last aligned layer.
`FreeRunning` trains the student as it will be used, from its own hidden states, on the KL to the teacher and on
cross-entropy.

Both are called with a micro-batch of token ids (B, T) and the share of the whole batch that it is; they leave gradients
in the student's parameters and return the parts of the loss, and `weights` says how these make up the loss.
Legend: B sequences, T tokens, N = B x T, C tokens of a chunk, M model width.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.attention import find_attention
from subquad.distill.objectives import Head, chunked_loss, final_hidden, mixer_output, next_token_labels
from subquad.recipe import Stage
from subquad.student import Student


class TrainingPass(Protocol):
    """A way to get gradients from a micro-batch."""

    weights: dict[str, float]  # of the parts in the loss
    reachable: set[str]  # names of the student's parameters that may get a gradient
    device: torch.device  # where token ids go

    def __call__(self, input_ids_BT: Tensor, share: float) -> dict[str, Tensor]: ...


class _Done(Exception):
    """The teacher has passed the last layer that is needed."""


class TeacherForced:
    """Distance of every converted layer's attention output from the teacher's; the loss is the mean over layers."""

    def __init__(self, student: Student, teacher: PreTrainedModel, kind: Literal["norm", "squared"]) -> None:
        self.layers = student.replaced_layers()
        self.weights = {f"layer {layer}": 1 / len(self.layers) for layer in self.layers}
        self.student, self.teacher, self.kind = student, teacher, kind
        self.device = _token_device(teacher)
        self.attention = [teacher.get_submodule(site.path) for site in find_attention(teacher)]
        aligned = [module for layer, module in enumerate(student.attention_modules()) if layer in self.layers]
        inside = {parameter for module in aligned for parameter in module.parameters()}
        self.reachable = {name for name, parameter in student.named_parameters() if parameter in inside}

    def __call__(self, input_ids_BT: Tensor, share: float) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}

        def align(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            teacher_BTM = output[0] if isinstance(output, tuple) else output
            name = f"layer {layer}"
            with torch.enable_grad():
                loss = mixer_output(self.student.teacher_forced_attention(layer, args, kwargs), teacher_BTM, self.kind)
                if loss.requires_grad:  # a mixer may have no weights
                    (loss * (share * self.weights[name])).backward()
            losses[name] = loss.detach()
            if layer == self.layers[-1]:
                raise _Done

        with ExitStack() as hooks, torch.no_grad():
            for layer in self.layers:
                handle = self.attention[layer].register_forward_hook(partial(align, layer), with_kwargs=True)
                hooks.callback(handle.remove)
            try:
                self.teacher.base_model(input_ids=input_ids_BT, use_cache=False)
            except _Done:
                pass
        return losses


class FreeRunning:
    """`weights["logits"]` x KL to the teacher + `weights["labels"]` x cross-entropy of the next token."""

    def __init__(
        self, student: Student, teacher: PreTrainedModel, weights: Mapping[str, float], temperature: float
    ) -> None:
        self.weights = dict(weights)
        self.reachable = {name for name, _ in student.named_parameters()}
        self.device = _token_device(student.backbone)
        self.student, self.teacher, self.temperature = student, teacher, temperature

    def __call__(self, input_ids_BT: Tensor, share: float) -> dict[str, Tensor]:
        teacher_BTM = None
        if "logits" in self.weights:
            with torch.no_grad():
                teacher_BTM = final_hidden(self.teacher, input_ids_BT)
        loss = chunked_loss(
            final_hidden(self.student, input_ids_BT),
            Head.of(self.student),
            weights=self.weights,
            teacher_BTM=teacher_BTM,
            teacher_head=Head.of(self.teacher),
            labels_BT=next_token_labels(input_ids_BT),
            temperature=self.temperature,
        )
        (loss.total * share).backward()
        return loss.parts()


def _token_device(model: PreTrainedModel) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device


def make_pass(stage: Stage, student: Student, teacher: PreTrainedModel) -> TrainingPass:
    """The pass of a stage's objective."""
    if stage.objective == "mixer_output":
        return TeacherForced(student, teacher, stage.loss)
    weights = stage.objective if isinstance(stage.objective, dict) else {str(stage.objective): 1.0}
    return FreeRunning(student, teacher, weights, stage.temperature)


@torch.no_grad()
def bare_forward_speed(teacher: PreTrainedModel, input_ids_BT: Tensor, *, seconds: float = 0.2) -> float:
    """Tokens per second of the teacher's forward pass from token ids to all logits, on this process's device.

    Passes over `input_ids_BT` are repeated until `seconds` are over; the logits are made, and dropped, in chunks.
    """
    head = Head.of(teacher)
    tokens, start = 0, time.perf_counter()
    while True:
        hidden_NM = final_hidden(teacher, input_ids_BT).flatten(0, 1)
        largest = torch.stack([head(hidden_CM).max() for hidden_CM in hidden_NM.split(512)])
        largest.max().item()  # waits for the device
        tokens += input_ids_BT.numel()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return tokens / elapsed
