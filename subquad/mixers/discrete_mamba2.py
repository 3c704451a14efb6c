"""Discrete Mamba-2: Mamba-2 without discretisation, activation and norm.

Legend: B batch, H query heads, G state heads, T new tokens, D head width.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs, State
from subquad.mixers.conv import Convolved, ConvOptions
from subquad.mixers.parts import Output, masked, small_linear, spread_decays
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class DiscreteMamba2Options(ConvOptions):
    conv: int = Field(4, ge=1, description="width of the causal convolutions on q, k and v; 1: none")
    gate_rank: int | None = Field(None, ge=1, description="rank of the output gate's projection; null: full")
    memory: Literal["long", "spread"] = Field("long", description="decays start near 1, or spread as in Mamba-2")
    rotary: bool = Field(False, description="queries and keys with the teacher's rotary embedding")


class DiscreteMamba2(Convolved):
    """S_t = a_t S_{t-1} + k_t v_t^T, y_t = gate * (q_t S_t + D v_t) * scale, a_t = sigmoid(W x_t).

    No discretisation, no activation after the convolutions and no norm. No rotary embedding by default, as in the
    paper. Initialised with long memory (a = 0.9975), identity convolutions, open gate and fitted output scale. D starts
    at zero, closer to attention (the authors start at 1).
    Source: MOHAWK (arXiv 2408.10189, section 4.1) and its code.
    """

    options_class = DiscreteMamba2Options
    options: DiscreteMamba2Options
    forms = decay_chunk, decay_step

    def __init__(self, group: HeadGroup, options: DiscreteMamba2Options) -> None:
        super().__init__(group, options)
        heads = len(group.heads)
        self.decay = small_linear(group.hidden_size, self.states, bias=6.0)
        if options.memory == "spread":
            A_G, dt_G = spread_decays(self.states)
            self.decay.bias.data.copy_((-A_G * dt_G).exp().logit())
        self.D_H = nn.Parameter(torch.zeros(heads))
        self.output = Output(heads, group.head_dim, group.hidden_size, rank=options.gate_rank, norm=None)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        log_a_BGT = nn.functional.logsigmoid(wide(self.decay(inputs.hidden_BTM))).transpose(1, 2)
        real_BT = inputs.real_BT
        return inputs.q_BHTD * inputs.scale, masked(inputs.k_BGTD, real_BT), inputs.v_BGTD, masked(log_a_BGT, real_BT)

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        y_BHTD, new_state = super().mix(inputs, state)
        return y_BHTD + self.D_H[:, None, None] * self.spread(inputs.v_BGTD), new_state
