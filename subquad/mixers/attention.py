"""Softmax attention of the teacher, for the heads that a plan does not replace.

Legend: B batch, H query heads, G key/value heads, T new tokens, L cached and new tokens, D head width.
"""

from torch import Tensor

from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, Options, State
from subquad.ops.common import widened


class Attention(Mixer):
    """The teacher's own attention function on these heads: y = softmax(q k^T scale) v.

    The state is the KV cache of the key/value heads in use, stored once per key/value head. If the teacher uses a
    sliding window, the cache holds the last window - 1 tokens. Values are stored without the zeros at their end.
    """

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        assert inputs.attend is not None
        k_BGLD, v_BGLD = inputs.k_BGTD, inputs.v_BGTD[..., : self.group.value_dim]
        if state:
            k_BGLD, v_BGLD = inputs.append(state["k"], k_BGLD), inputs.append(state["v"], v_BGLD)
        cache_window = slice(None) if self.group.window is None else slice(-self.group.window + 1, None)
        y_BHTD = inputs.attend(inputs.q_BHTD, self.expand(k_BGLD), self.expand(v_BGLD))
        y_BHTD = widened(y_BHTD, self.group.head_dim)
        return y_BHTD, {"k": k_BGLD[:, :, cache_window], "v": v_BGLD[:, :, cache_window]}

    def expand(self, x_BGLD: Tensor) -> Tensor:
        """Repeat key/value heads for uneven groups, since attention functions accept even groups only."""
        return x_BGLD if self.group.even else self.spread(x_BGLD)

    @classmethod
    def held(cls, group: HeadGroup, options: Options, context: int) -> dict[str, Held]:
        tokens = context if group.window is None else min(context, group.window - 1)
        shape = (len(group.kv_heads), tokens)
        return {"k": Held((*shape, group.head_dim)), "v": Held((*shape, group.value_dim or group.head_dim))}
