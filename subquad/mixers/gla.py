"""Gated linear attention (GLA): one input-dependent decay per key channel.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, N key channels.
"""

from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs
from subquad.mixers.parts import LowRank, Output, masked
from subquad.mixers.recurrent import Recurrent, RecurrentOptions
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class GLAOptions(RecurrentOptions):
    gate_rank: int | None = Field(16, ge=1, description="rank of the decay's and the output gate's projection")
    normalizer: float = Field(16.0, gt=0, description="log decays are divided by it: larger means longer memory")


class GLA(Recurrent):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = gate * norm(q_t S_t), a_t = sigmoid(W x_t)^(1 / normalizer).

    Initialised with long memory (decay bias 6: half-life of about 4,500 tokens), open gate and fitted output scale.
    Source: GLA (arXiv 2312.06635, section 4.4).
    """

    options_class = GLAOptions
    options: GLAOptions
    forms = decay_chunk, decay_step

    def __init__(self, group: HeadGroup, options: GLAOptions) -> None:
        super().__init__(group, options)
        self.decay = LowRank(group.hidden_size, self.states * self.state_dim, options.gate_rank, bias=6.0)
        self.output = Output(len(group.heads), group.head_dim, group.hidden_size, rank=options.gate_rank)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        logits_BTGN = self.decay(inputs.hidden_BTM).unflatten(-1, (self.states, -1))
        log_a_BGTN = nn.functional.logsigmoid(wide(logits_BTGN)).transpose(1, 2) / self.options.normalizer
        real_BT = inputs.real_BT
        return inputs.q_BHTD * inputs.scale, masked(inputs.k_BGTD, real_BT), inputs.v_BGTD, masked(log_a_BGTN, real_BT)
