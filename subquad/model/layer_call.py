"""Call of a student's attention module: its inputs, and the ways to compute its heads.

A hook opens a `LayerCall` when the module is called and closes it when the module returns; in between, `current_call`
returns it to the attention function. It is stored in a context variable, so calls in several threads are independent
and modules hold no state of a call.

`ForwardContext` holds the arguments of a whole forward pass besides its inputs. Its `around` computes the heads of
every layer in place of the plan's mixers. Calibration, stepwise replacement, gates and ablation are such functions,
each defined where it is used.

Legend: B batch, H query heads, G key/value heads, T new tokens, L past and new tokens, D head width, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from subquad.mixers import HeadGroup, MixerInputs
from subquad.mixers.base import picked
from subquad.model.cache import StudentCache, append
from subquad.model.join import Branch
from subquad.model.layer_mixer import LayerMixer, layer_mixer
from subquad.model.rollback import MixerPass
from subquad.model.rotary import Tables, rotation_of
from subquad.plan import ATTENTION

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, T, D), k and v (B, G, L, D) -> y (B, H, T, D)
Around = Callable[["LayerCall"], Tensor]  # a layer's call -> output of its heads, (B, H, T, D)


@dataclass
class ForwardContext:
    """Arguments of one forward pass of a student besides its inputs.

    `padding_BL` is True at real tokens, past and new; None means no padding. `around` computes the heads of a layer,
    (B, H, T, D), in place of `LayerCall.mixed`.
    """

    padding_BL: Tensor | None = None
    cache: StudentCache | None = None
    around: Around | None = None


class LayerCall:
    """One call of an attention module, from its inputs to the outputs of its heads.

    `mixed()` computes the heads by the plan, `attention()` computes them as the teacher does, and `inputs(name)` are
    the inputs of a mixer. The attention function `bind`s the queries, keys and values first.
    """

    def __init__(self, module: nn.Module, hidden_BTM: Tensor, context: ForwardContext, kwargs: dict[str, Any]) -> None:
        self.module, self.context, self.kwargs = module, context, kwargs
        self.layer_mixer: LayerMixer = layer_mixer(module)
        self.layer, self.mixers = self.layer_mixer.layer, self.layer_mixer.by_name
        self.hidden_BTM = hidden_BTM
        self.outer_call = _current.get()  # the call during which this one was opened
        self.tables: Tables | None = None  # rotary tables that are withheld from the module
        self.branch: Branch | None = None  # of the parallel join, for the hook after the module
        self.probe: list[tuple[Tensor, Tensor]] | None = None  # if set, only collects queries and keys

    def bind(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, softcap: float | None, attend: Attend
    ) -> None:
        """Stores the inputs of the attention function; prefix tokens move to the middle."""
        hidden_BTM = self.hidden_BTM
        if prefix_tokens := self.layer_mixer.prefix_tokens:
            q_BHTD, k_BGTD, v_BGTD = (to_middle(x, 2, prefix_tokens) for x in (q_BHTD, k_BGTD, v_BGTD))
            hidden_BTM = to_middle(hidden_BTM, 1, prefix_tokens)
        self.attend = attend
        self.all_inputs = MixerInputs(
            q_BHTD,
            k_BGTD,
            v_BGTD,
            hidden_BTM,
            scale=scale,
            softcap=softcap,
            padding_BL=self.context.padding_BL,
            attend=attend,
        )
        # The cache has counted the new tokens already: the module called `update`.
        cache = self.context.cache
        self.layer_cache = None if cache is None else cache.layers[self.layer]
        if self.layer_cache is not None:
            self.all_inputs = replace(self.all_inputs, past=self.layer_cache.tokens - q_BHTD.shape[2], append=append)

    def inputs(self, name: str) -> MixerInputs:
        """Inputs of one mixer: those of its heads, with rotary embedding if the mixer uses it."""
        mixer = self.mixers[name]
        inputs = _of_group(self.all_inputs, mixer.group)
        return self._rotated(inputs) if mixer.rotary else inputs

    def _rotated(self, inputs: MixerInputs) -> MixerInputs:
        if self.tables is None:
            return inputs
        return replace(inputs, q_BHTD=self._rotate(inputs.q_BHTD), k_BGTD=self._rotate(inputs.k_BGTD))

    @cached_property
    def _rotate(self) -> Callable[[Tensor], Tensor]:
        """Rotary embedding of the module; its convention is determined at the first use (rotary.py)."""
        assert self.tables is not None
        cos, sin = self.tables
        rotation = rotation_of(self.module, self.hidden_BTM, cos, self._trace)
        cos_BTR, sin_BTR = rotation.tables(cos, sin)
        return lambda x_BHTD: rotation.rotate(x_BHTD, cos_BTR, sin_BTR)

    def _trace(self, module: nn.Module, hidden_BTM: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Queries and keys that the module computes from these hidden states and tables."""
        probe_call = LayerCall(module, hidden_BTM, ForwardContext(), {})
        probe_call.probe = []
        probe_kwargs = {"hidden_states": hidden_BTM, "position_embeddings": tables, "attention_mask": None}
        kwargs = {name: None if isinstance(value, StudentCache) else value for name, value in self.kwargs.items()}
        token = _current.set(probe_call)
        try:
            module.forward(**kwargs | probe_kwargs)
        finally:
            _current.reset(token)
        return probe_call.probe[0]

    def attention(self) -> Tensor:
        """Output of the teacher's attention, (B, H, T, D)."""
        inputs = self._rotated(self.all_inputs)
        return self.attend(inputs.q_BHTD, inputs.k_BGTD, inputs.v_BGTD)

    def mixed(self) -> Tensor:
        """Output of the plan's mixers, (B, H, T, D); stores their new states in the cache.

        Under the parallel join, the output of the attention heads is stored in `branch`.
        """
        outputs = {}
        for name, mixer in self.mixers.items():
            state = None if self.layer_cache is None else self.layer_cache.states.get(name)
            inputs = self.inputs(name)
            outputs[name], new_state = mixer(inputs, state)
            if self.layer_cache is not None:
                self.layer_cache.store(name, new_state, MixerPass(mixer, inputs, state))
        if self.layer_mixer.adapter is not None:
            self.branch = Branch(self.mixers[ATTENTION].group, self.in_model_order(outputs.pop(ATTENTION)))
        if len(outputs) == 1:
            (y_BHTD,) = outputs.values()
            return y_BHTD
        return picked(torch.cat([*outputs.values()], 1), self.layer_mixer.head_indices)

    def in_model_order(self, y_BHTD: Tensor) -> Tensor:
        """Output of an attention function, (B, T, H, D), with the tokens in the model's order."""
        return to_front(y_BHTD.transpose(1, 2), 1, self.layer_mixer.prefix_tokens)


_current: ContextVar[LayerCall | None] = ContextVar("subquad_layer_call", default=None)


def current_call() -> LayerCall:
    """Open call of this thread."""
    call = _current.get()
    assert call is not None
    return call


def open_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before an attention module: opens its call.

    If one of its mixers does without rotary embedding, the module gets cosines of 1 and sines of 0, and the call keeps
    the tables.
    """
    kwargs = {**kwargs}
    context = kwargs.pop("forward_context", None) or ForwardContext()
    call = LayerCall(module, args[0] if args else kwargs["hidden_states"], context, kwargs)
    if not all(mixer.rotary for mixer in call.mixers.values()) and kwargs.get("position_embeddings") is not None:
        cos, sin = call.tables = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    _current.set(call)
    return args, kwargs


def close_call(module: nn.Module, args: Any, output: Any) -> None:
    """Hook after an attention module, also after one that failed: closes its call."""
    call = _current.get()
    if call is not None and call.module is module:  # not so if the module failed before its call was opened
        _current.set(call.outer_call)


def attending(layers: Collection[int]) -> ForwardContext:
    """Context of a pass in which these layers compute the teacher's attention instead of their mixers."""
    return ForwardContext(around=lambda call: call.attention() if call.layer in layers else call.mixed())


def to_middle(x: Tensor, time: int, count: int) -> Tensor:
    """Moves the first `count` tokens to the middle of the sequence; `time` is the dimension of tokens."""
    half = (x.shape[time] - count) // 2
    prefix, left, right = x.split([count, half, x.shape[time] - count - half], time)
    return torch.cat([left, prefix, right], time)


def to_front(x: Tensor, time: int, count: int) -> Tensor:
    """Undoes `to_middle`."""
    if count == 0:
        return x
    half = (x.shape[time] - count) // 2
    left, prefix, right = x.split([half, count, x.shape[time] - count - half], time)
    return torch.cat([prefix, left, right], time)


def _of_group(inputs: MixerInputs, group: HeadGroup) -> MixerInputs:
    """Inputs of one head group; those of a whole layer are returned as they are."""
    if len(group.heads) == inputs.q_BHTD.shape[1]:
        return inputs
    return replace(
        inputs,
        q_BHTD=picked(inputs.q_BHTD, group.heads),
        k_BGTD=picked(inputs.k_BGTD, group.kv_heads),
        v_BGTD=picked(inputs.v_BGTD, group.kv_heads),
    )
