"""Cache of a student: one state per mixer and layer (keys and values, windows, or recurrent states).

transformers' models pass new keys and values to `update` and then call the attention function. Here `update` only
counts the tokens, because a layer without attention has no keys to count. The attention function reads and writes
`states`. All states have the batch as their first dimension, so beam search reorders any of them the same way.

Legend: B batch, G key/value heads, L cached tokens, T new tokens, A all tokens, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.errors import UserError
from subquad.mixers import State
from subquad.model.rollback import MixerPass, Pass, rolled_back
from subquad.ops.common import joined
from subquad.plan import ATTENTION, Plan

# Name of the cache in the arguments and outputs of transformers' models: since 5.24, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROOM = 16  # room is reserved behind keys and values for 1/ROOM of their length
SPARE = 8  # at most 1/SPARE of a state's bytes may be unused memory: room, and tokens that have left a window


def append(old_BGLD: Tensor, new_BGTD: Tensor) -> Tensor:
    """Concatenation along time, (B, G, A, D), with A = L + T, without copying the old tokens where possible.

    The new tokens are written into the room behind the old ones, or both into a tensor with new room behind them. The
    old tensor must have no second continuation: tokens that another call wrote behind it are overwritten. With
    gradients, or in another inference mode than before, both are copied.
    """
    B, G, L, D = old_BGLD.shape
    A = L + new_BGTD.shape[2]
    if torch.is_grad_enabled() and (old_BGLD.requires_grad or new_BGTD.requires_grad):
        return joined(old_BGLD, new_BGTD)
    rows = old_BGLD.stride(1) // D  # of each head, where it lies in a tensor with room
    strided = old_BGLD.stride() == (G * rows * D, rows * D, D, 1)
    owns_storage = _storage_bytes(old_BGLD) == B * G * rows * D * old_BGLD.itemsize
    writable = old_BGLD.is_inference() == torch.is_inference_mode_enabled()
    if strided and owns_storage and writable and old_BGLD.storage_offset() // D + A <= rows:
        all_BGAD = old_BGLD.as_strided((B, G, A, D), old_BGLD.stride())
    else:
        all_BGAD = old_BGLD.new_empty(B, G, A + A // ROOM, D)[:, :, :A]
        all_BGAD[:, :, :L] = old_BGLD
    all_BGAD[:, :, L:] = new_BGTD
    return all_BGAD


def _storage_bytes(tensor: Tensor) -> int:
    """Bytes of the storage that the tensor keeps in memory."""
    return tensor.untyped_storage().nbytes()


class StudentCacheLayer(CacheLayerMixin):
    """States of one layer by mixer, and the number of tokens read so far.

    Masks have the size that attention with the layer's own window needs, whether or not a head still attends.
    """

    is_croppable = True

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.tokens = 0
        self.states: dict[str, State] = {}
        self.record_past = False
        self.passes: list[Pass] = []  # since the last `crop`, if recorded

    def activate_past_recording(self) -> None:
        """Records each pass from now on, so that `crop` can remove its last tokens (rollback.py)."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.tokens += key_states.shape[-2]
        self.is_initialized = True
        if self.record_past:
            self.passes.append(Pass(key_states.shape[-2]))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that are visible to an attending head."""
        past = self.tokens if self.window is None else min(self.tokens, self.window - 1)
        return past + query_length, self.tokens - past

    def store(self, mixer: str, state: State, mixer_pass: MixerPass) -> None:
        """Stores a mixer's new state. A view is copied where it would keep much unused memory alive (`SPARE`).

        `mixer_pass` is how the state came about, which is recorded if asked for.
        """
        if self.record_past:
            self.passes[-1].mixers[mixer] = mixer_pass
        self.states[mixer] = {
            key: tensor.clone() if SPARE * (_storage_bytes(tensor) - tensor.nbytes) > tensor.nbytes else tensor
            for key, tensor in state.items()
        }

    def states_before(self, remove: int) -> dict[str, State]:
        """States before the last `remove` tokens. Raises UserError if so many cannot be removed."""
        if remove == 0:
            return self.states
        if remove >= self.tokens:
            return {}
        states = rolled_back(self.passes, remove)
        if states is None and self.window is None and [*self.states] == [ATTENTION]:
            return {ATTENTION: {key: x_BGLD[:, :, :-remove] for key, x_BGLD in self.states[ATTENTION].items()}}
        if states is None:
            raise UserError(
                f"crop: the last {remove} tokens cannot be removed from a student's cache that did not record them: "
                "call cache.activate_past_recording() before the passes that read them"
            )
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens: -n removes n of them, and n > 0 keeps n, as in transformers before 5.24.

        The tokens before them can no longer be removed. Raises UserError for tokens that were not recorded.
        """
        remove = self.removed(tokens_to_remove)
        self.shorten(remove, self.states_before(remove))

    def shorten(self, remove: int, states: dict[str, State]) -> None:
        """Goes back to these states, before the last `remove` tokens."""
        self.states, self.tokens, self.passes = states, self.tokens - remove, []

    def removed(self, tokens_to_remove: int) -> int:
        """Number of tokens that `crop` removes."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.tokens - tokens_to_remove
        return min(max(remove, 0), self.tokens)

    def nbytes(self) -> int:
        """Bytes of all cached tensors, without the room behind them."""
        return sum(tensor.nbytes for state in self.states.values() for tensor in state.values())

    def reset(self) -> None:
        self.tokens, self.states, self.passes, self.is_initialized = 0, {}, [], False

    def _apply(self, function: Any) -> None:
        self.passes = []  # of rows that are no longer there
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
    """Cache for a plan; `nbytes()` equals `plan.cache_bytes` at the same context, batch and dtype.

    It may occupy a sixteenth more memory, in short windows an eighth: the room behind keys and values, which saves
    copying all cached tokens at every step.
    """

    layers: list[StudentCacheLayer]  # type: ignore[assignment]

    def __init__(self, plan: Plan) -> None:
        super().__init__(layers=[StudentCacheLayer(shape.window) for shape in plan.shapes])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens from every layer, or from none: see `StudentCacheLayer.crop`."""
        removed = [layer.removed(tokens_to_remove) for layer in self.layers]
        states = [layer.states_before(remove) for layer, remove in zip(self.layers, removed, strict=True)]
        for layer, remove, before in zip(self.layers, removed, states, strict=True):
            layer.shorten(remove, before)

    def nbytes(self) -> int:
        """Bytes of all cached tensors, without the room behind them."""
        return sum(layer.nbytes() for layer in self.layers)
