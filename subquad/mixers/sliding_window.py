"""Sliding-window attention with sinks: exact attention to the last tokens and the first few.

Legend: B batch, H query heads, G key/value heads, T new tokens, D head width.
"""

from pydantic import Field
from torch import Tensor

from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, Options, State
from subquad.ops import WindowSum, window_sum


class WindowOptions(Options):
    window: int = Field(64, ge=1, description="tokens that a query sees, itself included")
    sinks: int = Field(4, ge=0, description="first tokens that stay visible")


def window_of(inputs: MixerInputs, state: State, options: WindowOptions) -> WindowSum:
    """Compute the windowed softmax sum of these inputs."""
    result = window_sum(
        inputs.q_BHTD,
        inputs.k_BGTD,
        inputs.v_BGTD,
        window=options.window,
        sinks=options.sinks,
        scale=inputs.scale,
        softcap=inputs.softcap,
        state=state or None,
        past=inputs.past,
        padding=inputs.padding,
        append=inputs.append,
    )
    return result.with_sink(inputs.sink_H)


def window_held(states: int, head_dim: int, options: WindowOptions) -> dict[str, Held]:
    """Describe the keys and values of the window and the sinks, which do not grow with the context."""
    window, sinks = Held((states, options.window - 1, head_dim)), Held((states, options.sinks, head_dim))
    return {"window_k": window, "window_v": window, "sink_k": sinks, "sink_v": sinks}


class SlidingWindow(Mixer):
    """Softmax attention over the last `window` keys and the first `sinks`. It needs no training, and is the baseline.

    Source: StreamingLLM (arXiv 2309.17453), with the teacher's positions kept.
    """

    options_class = WindowOptions
    options: WindowOptions

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        result = window_of(self.match_states(inputs, share=True), state, self.options)
        return result.normalised(), result.state

    @classmethod
    def held(cls, group: HeadGroup, options: WindowOptions, context: int) -> dict[str, Held]:
        return window_held(group.states(share=True), group.head_dim, options)
