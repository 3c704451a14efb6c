"""Retention: one fixed decay per head, as in RetNet.

Legend: B batch, H query heads, G state heads, T new tokens, D head width.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from subquad.mixers.base import HeadGroup, MixerInputs
from subquad.mixers.parts import Output, masked
from subquad.mixers.recurrent import Recurrent, RecurrentOptions
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class RetentionOptions(RecurrentOptions):
    gate_rank: int | None = Field(16, ge=1, description="rank of the output gate's projection; null: full")
    shortest: float = Field(32.0, gt=1, description="memory of the first head, in tokens")
    longest: float = Field(4096.0, gt=1, description="memory of the last head, in tokens")


class Retention(Recurrent):
    """S_t = a S_{t-1} + k_t v_t^T, y_t = gate * norm(q_t S_t), with a = 1 - 1 / memory constant per head.

    The memories are log-spaced over all heads of the layer, including heads with another mixer. RetNet uses 32 to 512
    tokens; the default is longer, because the teacher's attention reaches further. Initialised with open gate and
    fitted output scale.
    Source: RetNet (arXiv 2307.08621, eqs. 6 and 8); as a student, SUPRA (arXiv 2405.06640).
    """

    options_class = RetentionOptions
    options: RetentionOptions
    forms = decay_chunk, decay_step

    def __init__(self, group: HeadGroup, options: RetentionOptions) -> None:
        super().__init__(group, options)
        self.output = Output(len(group.heads), group.head_dim, group.hidden_size, rank=options.gate_rank)

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        B, _, T, _ = inputs.q_BHTD.shape
        log_a_G = torch.log1p(-1 / self.memories()).to(inputs.q_BHTD.device, wide(inputs.v_BGTD).dtype)
        log_a_BGT = log_a_G[None, :, None].expand(B, -1, T)
        real_BT = inputs.real_BT
        k_BGTD = masked(inputs.k_BGTD, real_BT)
        return inputs.q_BHTD * inputs.scale, k_BGTD, inputs.v_BGTD, masked(log_a_BGT, real_BT)

    def memories(self) -> Tensor:
        """Memory of each state in tokens, float64."""
        group = self.group
        positions, count = [*group.heads], group.layer_heads or group.heads[-1] + 1
        if self.options.share_state:  # neighbouring heads share the memory of their key/value head
            count = math.ceil(count / group.queries_per_kv)
            positions = [*group.kv_heads] if group.even else [head // group.queries_per_kv for head in positions]
        log_shortest, log_longest = math.log(self.options.shortest), math.log(self.options.longest)
        return torch.linspace(log_shortest, log_longest, count, dtype=torch.float64).exp()[positions]
