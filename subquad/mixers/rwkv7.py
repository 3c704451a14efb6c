"""RWKV-7 as a student: its state update, without token shift, bonus and group norm.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, N key channels.
"""

import math

from pydantic import Field
from torch import Tensor

from subquad.mixers.base import HeadGroup, MixerInputs
from subquad.mixers.parts import LowRank, Output, masked, unit
from subquad.mixers.recurrent import Recurrent, RecurrentOptions
from subquad.ops import dplr_chunk, dplr_step
from subquad.ops.common import wide


class RWKV7Options(RecurrentOptions):
    gate_rank: int | None = Field(16, ge=1, description="rank of the projections of decay, rate and output gate")


class RWKV7(Recurrent):
    """S_t = (diag(w) - (a * u) u^T) S_{t-1} + (k (1 - w + a))^T v, y_t = gate * q_t S_t * scale, with u = k / |k|.

    The decay w = exp(-e^{-1/2} sigmoid(W_d x)) and the in-context learning rate a = sigmoid(W_a x) are per channel.
    Rotary embedding is kept. There is no token shift, bonus or group norm, and no value residual across layers, since a
    mixer sees its own layer only. Initialised with long memory (w = 0.9985), a = 1/2, an open gate and a fitted output
    scale.
    Source: RADLADS (arXiv 2505.03005, RAD-RWKV7), after RWKV-7 (arXiv 2503.14456, eqs. 15 to 17).
    """

    options_class = RWKV7Options
    options: RWKV7Options
    forms = dplr_chunk, dplr_step

    def __init__(self, group: HeadGroup, options: RWKV7Options) -> None:
        super().__init__(group, options)
        channels = self.states * self.state_dim
        self.decay = LowRank(group.hidden_size, channels, options.gate_rank, bias=-6.0)
        self.rate = LowRank(group.hidden_size, channels, options.gate_rank, bias=0.0)
        self.output = Output(len(group.heads), group.head_dim, group.hidden_size, rank=options.gate_rank, norm=None)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        decay_BGTN, rate_BGTN = (
            wide(gate(inputs.hidden_BTM)).sigmoid().unflatten(-1, (self.states, -1)).transpose(1, 2)
            for gate in (self.decay, self.rate)
        )
        real_BT = inputs.real_BT
        log_w_BGTN = -math.exp(-0.5) * decay_BGTN
        k_BGTN = wide(inputs.k_BGTD)
        unit_BGTN = unit(k_BGTN)
        written_BGTN = k_BGTN * (rate_BGTN - log_w_BGTN.expm1())
        return (
            inputs.q_BHTD * inputs.scale,
            masked(written_BGTN, real_BT),
            inputs.v_BGTD,
            masked(log_w_BGTN, real_BT),
            unit_BGTN,
            masked(rate_BGTN * unit_BGTN, real_BT),
        )
