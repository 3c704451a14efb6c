"""What the two training passes share: their protocol, and the layers that a stage replaces.

A pass is called with a micro-batch (token ids (B, T), or images) and the share of the whole batch that it is; it leaves
gradients in the student's parameters and returns the parts of the loss; `weights` says how these make up the loss.
Legend: B sequences, T tokens, M model width.
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
    """The teacher's logits, written down earlier."""

    def lookup(self, input_ids_BT: Tensor) -> TeacherLogits: ...


class TrainingPass(Protocol):
    """A way to get gradients from a micro-batch."""

    weights: dict[str, float]  # of the parts in the loss
    bridge: Bridge | None  # what it trains beside the student, and drops
    reachable: set[str]  # names of the student's parameters that may get a gradient
    device: torch.device  # where token ids go

    def __call__(self, batch: Batch, share: float) -> dict[str, Tensor]: ...


def layers_in_order(student: BaseStudent, share: float) -> tuple[list[int], frozenset[int]]:
    """This share of the layers with mixers, evenly spread, and those that wait and attend meanwhile.

    A larger share contains a smaller one: layers join in the order of their bit-reversed index, so that halves are
    every second layer.
    """
    layers = student.replaced_layers()
    bits = max(1, (len(layers) - 1).bit_length())
    order = sorted(range(len(layers)), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))
    active = sorted(layers[index] for index in order[: max(1, round(share * len(layers)))])
    return active, frozenset(layers) - frozenset(active)


def _first(output: Any) -> Tensor:
    """The hidden states of what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def in_mixer_order(call: AttentionCall, student: BaseStudent) -> AttentionCall:
    """The teacher's call with its tokens in the order in which the student's mixers see them."""
    count = getattr(student.config, "prefix_tokens", 0)
    if count == 0:
        return call
    return replace(call, q_BHTD=to_middle(call.q_BHTD, 2, count), k_BGTD=to_middle(call.k_BGTD, 2, count))
