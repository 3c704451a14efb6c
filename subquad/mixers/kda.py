"""Kimi Delta Attention (KDA): gated DeltaNet with one decay per key channel.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, N key channels.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs
from subquad.mixers.conv import Convolved, ConvOptions
from subquad.mixers.parts import LowRank, Output, masked, small_linear, unit
from subquad.ops import delta_chunk, delta_step
from subquad.ops.common import wide


class KDAOptions(ConvOptions):
    gate_rank: int | None = Field(16, ge=1, description="rank of the decay's and the output gate's projection")


class KDA(Convolved):
    """S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T, y_t = gate * norm(q_t S_t), q and k of unit length.

    b = sigmoid(W_b x), a = exp(-exp(A_log) softplus(W_a x + bias)) per channel. Initialised with b = 1/2, long memory
    (a = 0.999), open gate and fitted output scale. The authors' gate is a sigmoid, which cannot start open; here it is
    silu, as in the other mixers. `conv` 4 and `activation` add the authors' short convolutions.
    Source: Kimi Linear (arXiv 2510.26692, eq. 1).
    """

    options_class = KDAOptions
    options: KDAOptions
    forms = delta_chunk, delta_step

    def __init__(self, group: HeadGroup, options: KDAOptions) -> None:
        super().__init__(group, options)
        self.write = small_linear(group.hidden_size, self.states, bias=0.0)
        self.decay = LowRank(group.hidden_size, self.states * self.state_dim, options.gate_rank, bias=0.0)
        self.A_log_G = nn.Parameter(torch.full((self.states,), math.log(1e-3 / math.log(2))))  # softplus(0) = log 2
        self.output = Output(len(group.heads), group.head_dim, group.hidden_size, rank=options.gate_rank)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        b_BGT = wide(self.write(inputs.hidden_BTM)).sigmoid().transpose(1, 2)
        rate_BTGN = nn.functional.softplus(wide(self.decay(inputs.hidden_BTM))).unflatten(-1, (self.states, -1))
        return (
            unit(inputs.q_BHTD),
            unit(inputs.k_BGTD),
            inputs.v_BGTD,
            masked(-wide(self.A_log_G).exp()[:, None, None] * rate_BTGN.transpose(1, 2), inputs.real_BT),
            masked(b_BGT, inputs.real_BT),
        )
