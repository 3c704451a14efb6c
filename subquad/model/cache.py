"""The cache of a student: one state a mixer and layer, whatever it is (keys and values, windows, recurrent states).

transformers' models hand new keys and values to `update` and then call the attention function. Here `update` only
counts the tokens (a layer without attention has no keys to count by) and passes them on; the attention function reads
and writes `states`. All states have the batch as their first dimension, so beam search reorders any of them the same
way.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.mixers import State
from subquad.ops.common import joined
from subquad.plan import Plan

# What transformers' models call the cache that they take and return, since 5.24 and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROOM = 16  # behind keys and values is room for this fraction of them
SPARE = 8  # and at most this fraction of a state stays in memory besides: room, and what has left a window


def append(old_BGLD: Tensor, new_BGTD: Tensor) -> Tensor:
    """Both along time: the new written into the room behind the old, or both into a tensor that has room behind.

    Only for a state that nothing else goes on from: what another call wrote behind it is written over. Where gradients
    are wanted, or in another inference mode than before, both are copied.
    """
    B, G, L, D = old_BGLD.shape
    after = L + new_BGTD.shape[2]
    if torch.is_grad_enabled() and (old_BGLD.requires_grad or new_BGTD.requires_grad):
        return joined(old_BGLD, new_BGTD)
    rows = old_BGLD.stride(1) // D  # of each head, where it lies in a tensor with room
    strided = old_BGLD.stride() == (G * rows * D, rows * D, D, 1)
    whole = _memory(old_BGLD) == B * G * rows * D * old_BGLD.itemsize
    writable = old_BGLD.is_inference() == torch.is_inference_mode_enabled()
    if strided and whole and writable and old_BGLD.storage_offset() // D + after <= rows:
        both_BGLD = old_BGLD.as_strided((B, G, after, D), old_BGLD.stride())
    else:
        both_BGLD = old_BGLD.new_empty(B, G, after + after // ROOM, D)[:, :, :after]
        both_BGLD[:, :, :L] = old_BGLD
    both_BGLD[:, :, L:] = new_BGTD
    return both_BGLD


def _memory(tensor: Tensor) -> int:
    """Bytes that stay in memory with it."""
    return tensor.untyped_storage().nbytes()


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
        """Keeps a mixer's new state. A view is copied where it would keep much more in memory than itself."""
        self.states[mixer] = {
            key: tensor.clone() if SPARE * (_memory(tensor) - tensor.nbytes) > tensor.nbytes else tensor
            for key, tensor in state.items()
        }

    def nbytes(self) -> int:
        """Bytes of all tensors held; the room behind them is not counted."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

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
    """A cache for a plan; `nbytes()` equals `plan.cache_bytes` at the same context, batch and dtype.

    In memory it may be a sixteenth more, in short windows an eighth: room behind keys and values, so that not every
    token copies all before it.
    """

    layers: list[StudentCacheLayer]  # type: ignore[assignment]

    def __init__(self, plan: Plan) -> None:
        super().__init__(layers=[StudentCacheLayer(shape.window) for shape in plan.shapes])

    def nbytes(self) -> int:
        """Bytes of all tensors held; the room behind them is not counted."""
        return sum(layer.nbytes() for layer in self.layers)
