"""Cache of a student: one state per mixer and layer (keys and values, windows, or recurrent states).

transformers' models pass new keys and values to `update` and then call the attention function. Here `update` only
counts the tokens, because a layer without attention has no keys to count. The attention function reads and writes
`states`. All states have the batch as their first dimension, so beam search reorders any of them the same way.

A hybrid teacher's own recurrent and convolution layers keep the cache layers that transformers gives them.

Legend: B batch, G key/value heads, L cached tokens, T new tokens, A all tokens, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.errors import UserError
from subquad.mixers import State
from subquad.model.rollback import MixerPass, Pass, rolled_back
from subquad.ops.common import joined
from subquad.plan import ATTENTION

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

    def __init__(self) -> None:
        super().__init__()
        self.plan_layer = 0
        self.window: int | None = None
        self.tokens = 0
        self.states: dict[str, State] = {}
        self.record_past = False
        self.passes: list[Pass] = []  # since the last `crop`, if recorded

    def activate_past_recording(self) -> None:
        """Records each pass from now on, so that `crop` can remove its last tokens (rollback.py)."""
        self.record_past = True

    def open_pass(self, tokens: int) -> None:
        """Begins to record a pass of so many new tokens, if asked to."""
        if self.record_past:
            self.passes.append(Pass(tokens))

    @property
    def is_sliding(self) -> bool:
        """Whether attention in this layer has a window of its own."""
        return self.window is not None

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
        if states is None and self.window is None and {*self.states} <= {ATTENTION}:
            return {
                name: {key: x_BGLD[:, :, :-remove] for key, x_BGLD in state.items()}
                for name, state in self.states.items()
            }
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

    def removed(self, tokens_to_remove: int) -> int:
        """Number of tokens that `crop` removes."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.tokens - tokens_to_remove
        return min(max(remove, 0), self.tokens)

    def shorten(self, remove: int, states: dict[str, State]) -> None:
        """Goes back to these states, before the last `remove` tokens."""
        self.states, self.tokens, self.passes = states, self.tokens - remove, []

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


class HybridCacheLayer(LinearAttentionLayer, StudentCacheLayer):  # type: ignore[override]
    """States of a layer that has attention beside a recurrence of the teacher's own (Falcon-H1, Zamba2).

    `own`: the teacher's cache layer, whose recurrent and convolution states are kept.
    """

    is_compileable = False  # the number of tokens is no tensor

    def __init__(self, own: LinearAttentionCacheLayerMixin) -> None:
        StudentCacheLayer.__init__(self)
        LinearAttentionLayer.__init__(self, own.number_of_states)
        self.__dict__.update({name: value for name, value in vars(own).items() if name in vars(self)})

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)  # keys and values need none

    def shorten(self, remove: int, states: dict[str, State]) -> None:
        LinearAttentionLayer.crop(self, -remove)
        StudentCacheLayer.shorten(self, remove, states)

    def nbytes(self) -> int:
        return StudentCacheLayer.nbytes(self) + own_bytes(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        StudentCacheLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]  # asks for a LongTensor
        StudentCacheLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        change_own(self, lambda x: x.repeat_interleave(repeats, dim=0))
        StudentCacheLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        change_own(self, lambda x: x[indices])
        StudentCacheLayer.batch_select_indices(self, indices)


def own_states(layer: Any) -> list[tuple[dict[int, Any], bool]]:
    """Convolution and recurrent states of a teacher's own cache layer; True for the recurrent ones."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [(layer.conv_states, False), (layer.recurrent_states, True)]


def own_bytes(layer: Any) -> int:
    """Bytes of the convolution and recurrent states of a teacher's own cache layer."""
    return sum(x.nbytes for states, _ in own_states(layer) for x in states.values() if x is not None)


def own_elements(cache: DynamicCache | None) -> tuple[int, int]:
    """Elements of the teacher's own states for one sequence: in the model's dtype, and in float32."""
    counts = [0, 0]
    for layer in [] if cache is None else cache.layers:
        for states, is_recurrent in own_states(layer):
            counts[is_recurrent] += sum(x[0].numel() for x in states.values() if x is not None)
    return counts[0], counts[1]


def change_own(layer: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces the convolution and recurrent states of a teacher's own cache layer."""
    for states, _ in own_states(layer):
        states.update({index: function(x) for index, x in states.items() if x is not None})


class StudentCache(DynamicCache):
    """Cache for a plan; `nbytes()` equals `plan.cache_bytes` at the same context, batch and dtype.

    It may occupy a sixteenth more memory, in short windows an eighth: the room behind keys and values, which saves
    copying all cached tokens at every step. It begins with the cache layers that transformers makes for `config`, the
    configuration of the student's backbone. Where an attention module updates it, a `StudentCacheLayer` takes over.

    `start_B` is the column of each row's document, if older documents are in front of it in the row: pads from then on.
    """

    layers: list[Any]  # of the student's, and of the teacher's own

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.of_module: dict[int, StudentCacheLayer] = {}  # by the plan's layer: the one that was used last
        self.start_B: Tensor | None = None
        self._updated: int | None = None
        self._records = False

    def activate_past_recording(self) -> None:
        """Records each pass from now on, so that `crop` can remove its last tokens."""
        self._records = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens from every layer, or from none: see `StudentCacheLayer.crop`.

        Raises UserError if the teacher has recurrent layers of its own, whose states transformers cannot take back.
        """
        students = [layer for layer in self.layers if isinstance(layer, StudentCacheLayer)]
        if not students:
            return
        if not self.is_croppable:
            raise UserError("crop: a student cannot take back the states of its teacher's own recurrent layers")
        removed = [layer.removed(tokens_to_remove) for layer in students]
        kept = students[0].tokens - removed[0]
        if self.start_B is not None and bool((self.start_B > kept).any()):
            raise UserError(f"crop: the first {kept} tokens end before a row's last document, whose states are kept")
        states = [layer.states_before(remove) for layer, remove in zip(students, removed, strict=True)]
        for layer, remove, before in zip(students, removed, states, strict=True):
            layer.shorten(remove, before)
        for layer in self.layers:
            if not isinstance(layer, StudentCacheLayer):
                layer.crop(-removed[0])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Counts the new tokens of a layer, and returns its new keys and values."""
        self._updated = layer_idx
        return self._student_layer(layer_idx).update(key_states, value_states)

    def _student_layer(self, index: int) -> StudentCacheLayer:
        """Layer of this index, which takes the place of the teacher's own at its first use."""
        self.layers += [DynamicLayer() for _ in range(index + 1 - len(self.layers))]
        own = self.layers[index]
        if not isinstance(own, StudentCacheLayer):
            is_hybrid = isinstance(own, LinearAttentionCacheLayerMixin)
            self.layers[index] = HybridCacheLayer(own) if is_hybrid else StudentCacheLayer()
            self.layers[index].record_past = self._records
        return self.layers[index]

    def open(self) -> None:
        """Prepares for the call of an attention module, before it updates the cache."""
        self._updated = None

    def layer_of(self, module: nn.Module, layer: int, window: int | None, kv_from: int | None) -> StudentCacheLayer:
        """Cache layer of an attention module that has updated the cache since `open`.

        `layer`: index in the plan. A module that reads the keys and values of the plan's layer `kv_from` updates
        nothing, so its layer takes the number of tokens from that layer.
        """
        index = self._updated
        if index is None:
            own_index = getattr(module, "layer_idx", None)
            index = layer if own_index is None else own_index
        student_layer = self._student_layer(index)
        student_layer.plan_layer, student_layer.window = layer, window
        if self._updated is None and kv_from is not None:
            student_layer.tokens, student_layer.is_initialized = self.of_module[kv_from].tokens, True
        self.of_module[layer] = student_layer
        return student_layer

    def nbytes(self) -> int:
        """Bytes of all cached tensors, without the room behind them."""
        return sum(
            layer.nbytes() if isinstance(layer, StudentCacheLayer) else own_bytes(layer) for layer in self.layers
        )

    def reset(self) -> None:
        super().reset()
        self.start_B = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # asks for a LongTensor
        self._change_start(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda x: x.repeat_interleave(repeats, dim=0), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda x: x[indices], "batch_select_indices", indices)

    def _change_batch(self, change_state: Callable[[Tensor], Tensor], method: str, argument: Any) -> None:
        """Calls a method of all layers; transformers' recurrent layers lack it, so their states are changed here."""
        for layer in self.layers:
            if hasattr(layer, method):
                getattr(layer, method)(argument)
            else:
                change_own(layer, change_state)
        self._change_start(change_state)

    def _change_start(self, change: Callable[[Tensor], Tensor]) -> None:
        self.start_B = None if self.start_B is None else change(self.start_B)
