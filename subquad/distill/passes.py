"""Code shared by the two training passes: their protocol, and the layers that a stage replaces.

A pass takes a micro-batch (token ids (B, T), or images) and its share of the whole batch. It adds gradients to the
student's parameters and returns the parts of the loss, without their weights.
Legend: B sequences, T tokens, H query heads, G key/value heads, D head width.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from subquad.data.batch import Batch
from subquad.distill.bridge import Bridge
from subquad.distill.logit_losses import TeacherLogits
from subquad.model.base import BaseStudent
from subquad.model.interface import AttentionCall
from subquad.model.layer_call import to_middle


class LogitsStore(Protocol):
    """Stored logits of a teacher."""

    def lookup(self, input_ids_BT: Tensor) -> TeacherLogits: ...


class TrainingPass(Protocol):
    """Computes the losses of a micro-batch and their gradients."""

    weights: dict[str, float]  # of the loss's parts
    bridge: Bridge | None  # trained with the student and then dropped
    reachable: set[str]  # names of the student's parameters that can get a gradient
    device: torch.device  # of the inputs

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]: ...


def layers_in_order(student: BaseStudent, share: float) -> tuple[list[int], frozenset[int]]:
    """Returns `share` of the layers with mixers, evenly spread, and the other ones, which still use attention.

    Layers join in the order of their bit-reversed index. So a larger share contains every smaller one, and a half is
    every second layer.
    """
    layers = student.replaced_layers()
    bits = max(1, (len(layers) - 1).bit_length())
    order = sorted(range(len(layers)), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))
    active = sorted(layers[index] for index in order[: max(1, round(share * len(layers)))])
    return active, frozenset(layers) - frozenset(active)


def hidden_states(output: Any) -> Tensor:
    """Hidden states in the output of an attention module or a block, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def in_mixer_order(call: AttentionCall, student: BaseStudent) -> AttentionCall:
    """Puts the tokens of a teacher's call in the order of the student's mixers."""
    prefix_tokens = getattr(student.config, "prefix_tokens", 0)
    if prefix_tokens == 0:
        return call
    return replace(
        call, q_BHTD=to_middle(call.q_BHTD, 2, prefix_tokens), k_BGTD=to_middle(call.k_BGTD, 2, prefix_tokens)
    )
