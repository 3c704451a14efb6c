"""The cache of a student: one state a mixer and layer, whatever it is (keys and values, windows, recurrent states).

transformers' models hand new keys and values to `update` and then call the attention function. Here `update` only
counts the tokens (a layer without attention has no keys to count by) and passes them on; the attention function reads
and writes `states`. All states have the batch as their first dimension, so beam search reorders any of them the same
way.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from subquad.mixers import State
from subquad.plan import Plan


class StudentCacheLayer(CacheLayerMixin):
    """The states of one layer by mixer, and the number of tokens seen.

    Masks are sized as for attention with the layer's own window, whether or not a head still attends.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.tokens = 0
        self.states: dict[str, State] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.tokens += key_states.shape[-2]
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that an attending head sees."""
        past = self.tokens if self.window is None else min(self.tokens, self.window - 1)
        return past + query_length, self.tokens - past

    def store(self, mixer: str, state: State) -> None:
        """Keeps a mixer's new state. A short view of a long tensor is copied, or it would keep all of it in memory."""
        self.states[mixer] = {
            key: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for key, tensor in state.items()
        }

    def nbytes(self) -> int:
        """Bytes of memory behind all tensors held."""
        return sum(tensor.untyped_storage().nbytes() for state in self.states.values() for tensor in state.values())

    def reset(self) -> None:
        self.tokens, self.states, self.is_initialized = 0, {}, False

    def _apply(self, function: Any) -> None:
        self.states = {
            name: {key: function(tensor) for key, tensor in state.items()} for name, state in self.states.items()
        }

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices])


class StudentCache(Cache):
    """A cache for a plan; `nbytes()` equals `plan.cache_bytes` at the same context, batch and dtype."""

    layers: list[StudentCacheLayer]  # type: ignore[assignment]

    def __init__(self, plan: Plan) -> None:
        super().__init__(layers=[StudentCacheLayer(shape.window) for shape in plan.shapes])

    def nbytes(self) -> int:
        """Bytes of memory behind all tensors held."""
        return sum(layer.nbytes() for layer in self.layers)
