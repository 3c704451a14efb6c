"""Recurrent mixers with short convolutions on queries, keys and values.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, W convolution width.
"""

from dataclasses import replace

from pydantic import Field

from subquad.mixers.base import HeadGroup, Held, MixerInputs, State
from subquad.mixers.parts import ShortConv, masked
from subquad.mixers.recurrent import Recurrent, RecurrentOptions


class ConvOptions(RecurrentOptions):
    conv: int = Field(1, ge=1, description="width of the causal convolutions on q, k and v; 1: none")
    activation: bool = Field(False, description="silu after the convolutions")


class Convolved(Recurrent):
    """Base class of recurrent mixers with short convolutions, which start as the identity."""

    options_class = ConvOptions
    options: ConvOptions

    def __init__(self, group: HeadGroup, options: ConvOptions) -> None:
        super().__init__(group, options)
        if options.conv > 1:
            self.conv_q, self.conv_k, self.conv_v = (
                ShortConv(heads, options.conv, group.head_dim, activation=options.activation)
                for heads in (len(group.heads), self.states, self.states)
            )

    def convolve(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        if self.options.conv == 1:
            return inputs, {}
        real_BT = inputs.real_BT
        q_BHTD, q_state = self.conv_q(masked(inputs.q_BHTD, real_BT), state.get("conv_q"), inputs.padding)
        k_BGTD, k_state = self.conv_k(masked(inputs.k_BGTD, real_BT), state.get("conv_k"), inputs.padding)
        v_BGTD, v_state = self.conv_v(masked(inputs.v_BGTD, real_BT), state.get("conv_v"), inputs.padding)
        conv_state = {"conv_q": q_state, "conv_k": k_state, "conv_v": v_state}
        return replace(
            inputs, q_BHTD=q_BHTD, k_BGTD=k_BGTD, v_BGTD=v_BGTD
        ), {} if self.options.bidirectional else conv_state

    @classmethod
    def held(cls, group: HeadGroup, options: RecurrentOptions, context: int) -> dict[str, Held]:
        assert isinstance(options, ConvOptions)
        tensors = super().held(group, options, context)
        if options.conv > 1 and not options.bidirectional:
            states = group.states(options.share_state)
            for name, heads in (("conv_q", len(group.heads)), ("conv_k", states), ("conv_v", states)):
                tensors[name] = Held((heads, options.conv - 1, group.head_dim))
        return tensors
