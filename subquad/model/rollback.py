"""Rollback of a student's cache: the last tokens are removed again, as assisted decoding does with rejected ones.

Keys and values could be cut, but a recurrent state cannot be run backwards. So while a cache records, it keeps for each
pass the states before it and the inputs of its mixers. Removing the last tokens of a pass goes back to these states and
runs the mixers over the tokens that stay; whole passes are dropped. `crop` ends what can be removed, so little is kept.

Legend: B batch, H query heads, G key/value heads, T new tokens, D head width, M hidden width.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from subquad.errors import UserError
from subquad.mixers import Mixer, MixerInputs, State
from subquad.ops.padding import Padding


@dataclass
class MixerPass:
    """Mixer's inputs in one pass, and its state before it (None at the start of a sequence).

    `documents`: whether the tokens were gathered by document (packing.py), so that a part of the pass is none.
    """

    mixer: Mixer
    inputs: MixerInputs
    state: State | None
    documents: bool = False

    def state_after(self, tokens: int) -> State:
        """State after the first `tokens` tokens of the pass. Raises UserError for a part of a pass over documents."""
        if tokens == 0:
            return self.state or {}
        if self.documents:
            raise UserError("crop: tokens of packed documents, or of rows with pads between tokens, cannot be removed")
        inputs, padding = self.inputs, self.inputs.padding
        real_BT = None if padding is None or padding.real_BT is None else padding.real_BT[:, :tokens]
        kept = replace(
            inputs,
            q_BHTD=inputs.q_BHTD[:, :, :tokens],
            k_BGTD=inputs.k_BGTD[:, :, :tokens],
            v_BGTD=inputs.v_BGTD[:, :, :tokens],
            hidden_BTM=inputs.hidden_BTM[:, :tokens],
            padding=None if padding is None else Padding(padding.past_B, real_BT),
            attend=lambda q_BHTD, k_BGLD, v_BGLD: torch.zeros_like(q_BHTD),  # only the state is wanted
        )
        return self.mixer(kept, self.state)[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixerPass":
        """Copy that shares the mixer."""
        return MixerPass(self.mixer, deepcopy(self.inputs, memo), deepcopy(self.state, memo), self.documents)


@dataclass
class Pass:
    """One recorded pass of a layer: its number of tokens, and its mixers' inputs and states by name."""

    tokens: int
    mixers: dict[str, MixerPass] = field(default_factory=dict)

    def states_after(self, tokens: int) -> dict[str, State]:
        """States after the first `tokens` tokens of the pass; a mixer without a state is left out."""
        states = {name: mixer_pass.state_after(tokens) for name, mixer_pass in self.mixers.items()}
        return {name: state for name, state in states.items() if state}


def rolled_back(passes: list[Pass], remove: int) -> dict[str, State] | None:
    """States before the last `remove` tokens of these passes; None if they hold fewer tokens."""
    for recorded in reversed(passes):
        if recorded.tokens >= remove:
            return recorded.states_after(recorded.tokens - remove)
        remove -= recorded.tokens
    return None
