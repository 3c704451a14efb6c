"""Mamba-2: one input-dependent decay per head, a discretised write, a short convolution and a gated norm.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, M hidden width, W convolution width.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs, State
from subquad.mixers.conv import Convolved, ConvOptions
from subquad.mixers.parts import Output, masked, small_linear, spread_decays
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class Mamba2Options(ConvOptions):
    conv: int = Field(4, ge=1, description="width of the causal convolutions on q, k and v; 1: none")
    gate_rank: int | None = Field(
        16, ge=1, description="rank of the output gate's projection; null: full, as in Mamba-2"
    )
    memory: Literal["long", "spread"] = Field("long", description="decays start near 1, or spread as in Mamba-2")


class Mamba2(Convolved):
    """S_t = e^{-A dt_t} S_{t-1} + dt_t k_t v_t^T, y_t = norm((q_t S_t + D v_t) * gate), dt = softplus(W x + bias).

    In the paper's notation C = q, B = k and x = v. With `activation`, `gate_rank` null, `rotary` false and one state
    per query head it equals transformers' Bamba mixer with as many groups as heads. By default there is no activation,
    to start closer to attention. Initialised with identity convolutions, D = 0, long memory (A dt = 0.001), open gate
    and fitted output scale.
    Source: Mamba-2 (arXiv 2405.21060, eq. 16 and section 7).
    """

    options_class = Mamba2Options
    options: Mamba2Options
    forms = decay_chunk, decay_step

    def __init__(self, group: HeadGroup, options: Mamba2Options) -> None:
        super().__init__(group, options)
        heads = len(group.heads)
        self.dt = small_linear(group.hidden_size, self.states, bias=math.log(math.expm1(1.0)))  # dt = 1
        self.A_log_G = nn.Parameter(torch.full((self.states,), math.log(1e-3)))
        if options.memory == "spread":
            A_G, dt_G = spread_decays(self.states)
            self.A_log_G.data.copy_(A_G.log())
            self.dt.bias.data.copy_(dt_G.expm1().log())  # the inverse of softplus
        self.D_H = nn.Parameter(torch.zeros(heads))
        self.output = Output(heads, group.head_dim, group.hidden_size, rank=options.gate_rank, norm="last")

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        dt_BGT = nn.functional.softplus(wide(self.dt(inputs.hidden_BTM))).transpose(1, 2)
        k_BGTD = masked(wide(inputs.k_BGTD) * dt_BGT.unsqueeze(-1), inputs.real_BT)
        log_a_BGT = masked(-wide(self.A_log_G).exp()[:, None] * dt_BGT, inputs.real_BT)
        return inputs.q_BHTD * inputs.scale, k_BGTD, inputs.v_BGTD, log_a_BGT

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        y_BHTD, new_state = super().mix(inputs, state)
        return y_BHTD + self.D_H[:, None, None] * self.spread(inputs.v_BGTD), new_state
