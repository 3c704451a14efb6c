"""Gated DeltaNet: a state that forgets as a whole and overwrites what a key holds.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, M hidden width.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, Mixer, MixerInputs, Options, ScaledNormGate, State, masked
from subquad.ops import delta_chunk, delta_step
from subquad.ops.common import wide


class GatedDeltaNetOptions(Options):
    gate_rank: int = Field(16, ge=1, description="rank of the output gate's projection")
    share_state: bool = Field(False, description="one state a key/value head (smaller) instead of one a query head")


class GatedDeltaNet(Mixer):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, y_t = gate * norm(q_t S_t), q and k of unit length.

    b = sigmoid(W_b x), a = exp(-exp(A_log) softplus(W_a x + bias)); starts with b = 1/2, long memory (a = 0.999), the
    gate open and the output scale fitted. Source: Gated DeltaNet (arXiv 2412.06464, eq. 10), without short convolution
    as in KL-guided layer selection's student (arXiv 2512.20569).
    """

    options_class = GatedDeltaNetOptions
    options: GatedDeltaNetOptions

    def __init__(self, group: HeadGroup, options: GatedDeltaNetOptions) -> None:
        super().__init__(group, options)
        self.states = group.states(options.share_state)
        self.write = nn.Linear(group.hidden_size, self.states)
        self.decay = nn.Linear(group.hidden_size, self.states)
        for projection in (self.write, self.decay):
            nn.init.normal_(projection.weight, std=0.02 / math.sqrt(group.hidden_size))
            nn.init.zeros_(projection.bias)
        self.A_log_G = nn.Parameter(torch.full((self.states,), math.log(1e-3 / math.log(2))))  # softplus(0) = log 2
        self.output = ScaledNormGate(len(group.heads), group.head_dim, group.hidden_size, options.gate_rank)

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        inputs = self.shared(inputs, self.options.share_state)
        b_BGT = wide(self.write(inputs.hidden_BTM)).sigmoid().transpose(1, 2)
        rate_BGT = nn.functional.softplus(wide(self.decay(inputs.hidden_BTM))).transpose(1, 2)
        form = delta_step if inputs.q_BHTD.shape[2] == 1 else delta_chunk
        y_BHTD, new = form(
            nn.functional.normalize(inputs.q_BHTD, dim=-1),
            nn.functional.normalize(inputs.k_BGTD, dim=-1),
            inputs.v_BGTD,
            masked(-wide(self.A_log_G).exp()[:, None] * rate_BGT, inputs.real_BT),
            masked(b_BGT, inputs.real_BT),
            state.get("recurrent"),
        )
        return y_BHTD, {"recurrent": new}

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        return self.output(y_BHTD, inputs.hidden_BTM)

    @classmethod
    def state_bytes(cls, group: HeadGroup, options: GatedDeltaNetOptions, context: int, itemsize: int) -> int:
        return group.states(options.share_state) * group.head_dim**2 * 4

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        self.output.calibrate(self.mix(inputs, {})[0], target_BHTD)
