"""Softmax attention of the teacher, for the heads that a plan does not replace.

Legend: B batch, H query heads, G key/value heads, T new tokens, L cached and new tokens, D head width.
"""

from torch import Tensor

from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, Options, State


class Attention(Mixer):
    """The teacher's own attention function on these heads: y = softmax(q k^T scale) v.

    The state is the KV cache of the key/value heads in use, stored once per key/value head. If the teacher uses a
    sliding window, the cache holds the last window - 1 tokens.
    """

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        assert inputs.attend is not None
        k_BGLD, v_BGLD = inputs.k_BGTD, inputs.v_BGTD
        if state:
            k_BGLD, v_BGLD = inputs.append(state["k"], k_BGLD), inputs.append(state["v"], v_BGLD)
        cache_window = slice(None) if self.group.window is None else slice(-self.group.window + 1, None)
        y_BHTD = inputs.attend(inputs.q_BHTD, self.expand(k_BGLD), self.expand(v_BGLD))
        return y_BHTD, {"k": k_BGLD[:, :, cache_window], "v": v_BGLD[:, :, cache_window]}

    def expand(self, x_BGLD: Tensor) -> Tensor:
        """Repeat key/value heads for uneven groups, since attention functions accept even groups only."""
        return x_BGLD if self.group.even else self.spread(x_BGLD)

    @classmethod
    def held(cls, group: HeadGroup, options: Options, context: int) -> dict[str, Held]:
        tokens = context if group.window is None else min(context, group.window - 1)
        return dict.fromkeys(("k", "v"), Held((len(group.kv_heads), tokens, group.head_dim)))
