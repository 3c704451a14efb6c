"""Gated linear attention: a decay for every key channel, computed from the input.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, M hidden width.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, Mixer, MixerInputs, Options, ScaledNormGate, State, masked
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class GLAOptions(Options):
    gate_rank: int = Field(16, ge=1, description="rank of the decay's projection, and of the output gate's")
    normalizer: float = Field(16.0, gt=0, description="log decays are divided by it: larger means longer memory")
    share_state: bool = Field(False, description="one state a key/value head (smaller) instead of one a query head")


class GLA(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = gate * norm(q_t S_t), a_t = sigmoid(W x_t)^(1 / normalizer).

    Starts with long memory (decay bias 6: half of a state is left after some 4,500 tokens), gate open, and output scale
    fitted.
    Source: GLA (arXiv 2312.06635, section 4.4).
    """

    options_class = GLAOptions
    options: GLAOptions

    def __init__(self, group: HeadGroup, options: GLAOptions) -> None:
        super().__init__(group, options)
        self.states = group.states(options.share_state)
        self.decay_down = nn.Linear(group.hidden_size, options.gate_rank, bias=False)
        self.decay_up = nn.Linear(options.gate_rank, self.states * group.head_dim)
        nn.init.zeros_(self.decay_up.weight)
        nn.init.constant_(self.decay_up.bias, 6.0)
        self.output = ScaledNormGate(len(group.heads), group.head_dim, group.hidden_size, options.gate_rank)

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        inputs = self.shared(inputs, self.options.share_state)
        logits_BTGD = self.decay_up(self.decay_down(inputs.hidden_BTM)).unflatten(-1, (self.states, -1))
        log_a_BGTD = nn.functional.logsigmoid(wide(logits_BTGD)).transpose(1, 2) / self.options.normalizer
        form = decay_step if inputs.q_BHTD.shape[2] == 1 else decay_chunk
        y_BHTD, new = form(
            inputs.q_BHTD * inputs.scale,
            masked(inputs.k_BGTD, inputs.real_BT),
            inputs.v_BGTD,
            masked(log_a_BGTD, inputs.real_BT),
            state.get("recurrent"),
        )
        return y_BHTD, {"recurrent": new}

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        return self.output(y_BHTD, inputs.hidden_BTM)

    @classmethod
    def state_bytes(cls, group: HeadGroup, options: GLAOptions, context: int, itemsize: int) -> int:
        return group.states(options.share_state) * group.head_dim**2 * 4

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        self.output.calibrate(self.mix(inputs, {})[0], target_BHTD)
