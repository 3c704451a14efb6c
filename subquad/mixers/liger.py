"""Liger: the mean of a sliding window and of gated linear attention whose gate is the key; no new weights.

Legend: B batch, H query heads, G state heads, T new tokens, D head width.
"""

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, State
from subquad.mixers.parts import masked
from subquad.mixers.sliding_window import WindowOptions, window_held, window_of
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class LigerOptions(WindowOptions):
    normalizer: float = Field(16.0, gt=0, description="log decays are divided by it: larger means longer memory")


class Liger(Mixer):
    """y = (window(q, k, v) + q' S) / 2, S_t = diag(a_t) S_{t-1} + k'_t v_t^T, a_t = sigmoid(k_t)^(1 / normalizer).

    q' and k' are the softmax of q and k over their channels. There are no new weights to fit: Liger trains the
    teacher's projections with LoRA.
    Source: Liger (arXiv 2503.01496, eqs. 6 to 9). Sinks are an addition; `sinks: 0` is the paper's form.
    """

    options_class = LigerOptions
    options: LigerOptions

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        inputs = self.match_states(inputs, share=True)
        near_sum = window_of(inputs, {name: x for name, x in state.items() if name != "far"}, self.options)
        real_BT, k_BGTD = inputs.real_BT, wide(inputs.k_BGTD)
        form = decay_step if inputs.q_BHTD.shape[2] == 1 else decay_chunk
        far_BHTD, far_state = form(
            wide(inputs.q_BHTD).softmax(-1),
            masked(k_BGTD.softmax(-1), real_BT),
            inputs.v_BGTD,
            masked(nn.functional.logsigmoid(k_BGTD) / self.options.normalizer, real_BT),
            state.get("far"),
        )
        return (near_sum.normalised() + far_BHTD) / 2, near_sum.state | {"far": far_state}

    @classmethod
    def held(cls, group: HeadGroup, options: Any, context: int) -> dict[str, Held]:
        states, width = group.states(share=True), group.head_dim
        return window_held(states, width, options) | {"far": Held((states, width, width), wide=True)}
