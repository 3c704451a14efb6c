"""Gated DeltaNet: the delta rule, which overwrites the value stored under a key, with one decay per head.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, M hidden width.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs
from subquad.mixers.conv import Convolved, ConvOptions
from subquad.mixers.parts import Output, masked, small_linear, unit
from subquad.ops import delta_chunk, delta_step
from subquad.ops.common import wide


class GatedDeltaNetOptions(ConvOptions):
    gate_rank: int | None = Field(16, ge=1, description="rank of the output gate's projection; null: full")


class GatedDeltaNet(Convolved):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, y_t = gate * norm(q_t S_t), q and k of unit length.

    b = sigmoid(W_b x), a = exp(-exp(A_log) softplus(W_a x + bias)). Initialised with b = 1/2, long memory (a = 0.999),
    open gate and fitted output scale. With `conv` 4, `activation` and `gate_rank` null it equals Qwen3-Next's layer in
    transformers. By default it has no convolution, as the student of KL-guided layer selection (arXiv 2512.20569).
    Source: Gated DeltaNet (arXiv 2412.06464, eq. 10).
    """

    options_class = GatedDeltaNetOptions
    options: GatedDeltaNetOptions
    forms = delta_chunk, delta_step

    def __init__(self, group: HeadGroup, options: GatedDeltaNetOptions) -> None:
        super().__init__(group, options)
        self.write = small_linear(group.hidden_size, self.states, bias=0.0)
        self.decay = small_linear(group.hidden_size, self.states, bias=0.0)
        self.A_log_G = nn.Parameter(torch.full((self.states,), math.log(1e-3 / math.log(2))))  # softplus(0) = log 2
        self.output = Output(len(group.heads), group.head_dim, group.hidden_size, rank=options.gate_rank)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        b_BGT = wide(self.write(inputs.hidden_BTM)).sigmoid().transpose(1, 2)
        rate_BGT = nn.functional.softplus(wide(self.decay(inputs.hidden_BTM))).transpose(1, 2)
        return (
            unit(inputs.q_BHTD),
            unit(inputs.k_BGTD),
            inputs.v_BGTD,
            masked(-wide(self.A_log_G).exp()[:, None] * rate_BGT, inputs.real_BT),
            masked(b_BGT, inputs.real_BT),
        )
