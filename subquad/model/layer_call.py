"""Call of a student's attention module: its inputs, and the ways to compute its heads.

A hook opens a `LayerCall` when the module is called and closes it when the module returns; in between, `current_call`
returns it to the attention function. It is stored in a context variable, so calls in several threads are independent
and modules hold no state of a call.

`ForwardContext` holds the arguments of a whole forward pass besides its inputs. Its `around` computes the heads of
every layer in place of the plan's mixers. Calibration, stepwise replacement, gates and ablation are such functions,
each defined where it is used.

Legend: B batch, H query heads, G key/value heads, T new tokens, L past and new tokens, D head width, V width of the
model's values, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.mixers import HeadGroup, MixerInputs
from subquad.mixers.base import picked
from subquad.model.cache import StudentCache, append
from subquad.model.join import Branch
from subquad.model.layer_mixer import LayerMixer, layer_mixer
from subquad.model.packing import Layout
from subquad.model.rollback import MixerPass
from subquad.model.rotary import AnyTables, identity_of, rotation_of
from subquad.ops.common import widened
from subquad.plan import ATTENTION

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, T, D), k and v (B, G, L, D) -> y (B, H, T, D)
AttendOf = Callable[[HeadGroup], Attend]  # the teacher's attention function for a group of a layer's heads
Around = Callable[["LayerCall"], Tensor]  # a layer's call -> output of its heads, (B, H, T, D)


@dataclass
class ForwardContext:
    """Arguments of one forward pass of a student besides its inputs.

    `layout` has the padding and the documents of the tokens. `around` computes the heads of a layer, (B, H, T, D), in
    place of `LayerCall.mixed`.
    """

    layout: Layout = Layout()
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
        if context.cache is not None:
            context.cache.open()
        self.hidden_BTM = hidden_BTM
        self.outer_call = _current.get()  # the call during which this one was opened
        self.tables: AnyTables | None = None  # rotary tables that are withheld from the module
        self.branch: Branch | None = None  # of the parallel join, for the hook after the module
        self.probe: list[tuple[Tensor, Tensor]] | None = None  # if set, only collects queries and keys

    def bind(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        scale: float,
        softcap: float | None,
        sink_H: Tensor | None,
        attend_of: AttendOf,
    ) -> None:
        """Stores the inputs of the attention function; prefix tokens move to the middle.

        Values that are narrower than keys get zeros at their end, which every mixer leaves in the end of its output.
        """
        v_BGTD = widened(v_BGTD, k_BGTD.shape[-1])
        hidden_BTM = self.hidden_BTM
        if prefix_tokens := self.layer_mixer.prefix_tokens:
            q_BHTD, k_BGTD, v_BGTD = (to_middle(x, 2, prefix_tokens) for x in (q_BHTD, k_BGTD, v_BGTD))
            hidden_BTM = to_middle(hidden_BTM, 1, prefix_tokens)
        self.attend_of = attend_of
        self.all_inputs = MixerInputs(
            q_BHTD,
            k_BGTD,
            v_BGTD,
            hidden_BTM,
            scale=scale,
            softcap=softcap,
            sink_H=sink_H,
            padding=self.context.layout.padding,
            attend=attend_of(self.layer_mixer.all_heads),
        )
        # The cache has counted the new tokens already: the module called `update`.
        cache, shape = self.context.cache, self.layer_mixer.shape
        self.layer_cache = (
            None if cache is None else cache.layer_of(self.module, self.layer, shape.window, shape.kv_from)
        )
        if self.layer_cache is not None:
            self.layer_cache.open_pass(q_BHTD.shape[2])
            self.all_inputs = replace(self.all_inputs, past=self.layer_cache.tokens - q_BHTD.shape[2], append=append)

    def inputs(self, name: str) -> MixerInputs:
        """Inputs of one mixer: those of its heads, with rotary embedding if the mixer uses it."""
        mixer = self.mixers[name]
        return self._of_group(mixer.group, rotary=mixer.rotary)

    def _of_group(self, group: HeadGroup, rotary: bool) -> MixerInputs:
        """Inputs of one head group, with or without rotary embedding; those of a whole layer are not copied."""
        inputs = self._rotated_inputs if rotary else self.all_inputs
        if len(group.heads) == inputs.q_BHTD.shape[1]:
            return inputs
        return replace(
            inputs,
            q_BHTD=picked(inputs.q_BHTD, group.heads),
            k_BGTD=picked(inputs.k_BGTD, group.kv_heads),
            v_BGTD=picked(inputs.v_BGTD, group.kv_heads),
            sink_H=None if inputs.sink_H is None else picked(inputs.sink_H[None], group.heads)[0],
            attend=self.attend_of(group),
        )

    @cached_property
    def _rotated_inputs(self) -> MixerInputs:
        """Inputs of all heads with rotary embedding, if it was withheld from the module."""
        tables, kv_from = self.tables, self.layer_mixer.shape.kv_from
        if tables is None:
            return self.all_inputs
        q_BHTD, k_BGTD = self.all_inputs.q_BHTD, self.all_inputs.k_BGTD
        if isinstance(tables, tuple):
            count = 2 if kv_from is None else 1  # the keys of another layer tell nothing
            rotation = rotation_of(self.module, tables, lambda tables: self._trace(tables)[:count])
            if rotation is not None:
                if prefix_tokens := self.layer_mixer.prefix_tokens:
                    cos, sin = (to_middle(table, 1, prefix_tokens) for table in tables)
                    tables = cos, sin
                cos_sin = rotation.tables(*tables)
                q_BHTD, k_BGTD = (rotation.rotate(x, *cos_sin) for x in (q_BHTD, k_BGTD))
                return replace(self.all_inputs, q_BHTD=q_BHTD, k_BGTD=k_BGTD)
        if kv_from is not None:
            raise UserError(
                f"{type(self.module).__name__} shares keys that it rotates in a way that Subquad does not know: set "
                "rotary: true among the mixer's options"
            )
        q_BHTD, k_BGTD = self._trace(tables)
        if prefix_tokens := self.layer_mixer.prefix_tokens:
            q_BHTD, k_BGTD = (to_middle(x, 2, prefix_tokens) for x in (q_BHTD, k_BGTD))
        return replace(self.all_inputs, q_BHTD=q_BHTD, k_BGTD=k_BGTD)

    def _trace(self, tables: AnyTables) -> tuple[Tensor, Tensor]:
        """Queries and keys that the module computes with these tables."""
        probe_call = LayerCall(self.module, self.hidden_BTM, ForwardContext(), {})
        probe_call.probe = []
        probe_kwargs = {"hidden_states": self.hidden_BTM, "position_embeddings": tables, "attention_mask": None}
        kwargs = {name: _without_effect(value) for name, value in self.kwargs.items()}
        token = _current.set(probe_call)
        try:
            self.module.forward(**kwargs | probe_kwargs)
        finally:
            _current.reset(token)
        return probe_call.probe[0]

    def attention(self) -> Tensor:
        """Output of the teacher's attention, (B, H, T, D)."""
        inputs = self._rotated_inputs
        assert inputs.attend is not None
        shape = self.layer_mixer.shape
        y_BHTV = inputs.attend(inputs.q_BHTD, inputs.k_BGTD, inputs.v_BGTD[..., : shape.value_dim])
        return widened(y_BHTV, shape.head_dim)

    def mixed(self) -> Tensor:
        """Output of the plan's mixers, (B, H, T, D); stores their new states in the cache.

        Under the parallel join, the output of the attention heads is stored in `branch`.
        """
        outputs, documents = {}, self.context.layout.documents
        for name, mixer in self.mixers.items():
            inputs, state = self.inputs(name), None if self.layer_cache is None else self.layer_cache.states.get(name)
            kv_home = self.layer_mixer.kv_home if name == ATTENTION else self.layer
            if self.layer_cache is not None and kv_home != self.layer:
                # An earlier layer has stored the same keys and values, the new ones included.
                assert self.context.cache is not None
                state = self.context.cache.of_module[kv_home].states[ATTENTION]
                inputs = replace(inputs, past=self.layer_cache.tokens, append=lambda stored, new: stored)
                outputs[name], _ = mixer(inputs, state)
                continue
            if documents is None or name == ATTENTION:  # whose mask keeps documents apart
                outputs[name], new_state = mixer(inputs, state)
            else:
                outputs[name], new_state = documents.mix(mixer, inputs, state)
            if self.layer_cache is not None:
                mixer_pass = MixerPass(mixer, inputs, state, documents is not None)
                self.layer_cache.store(name, new_state, mixer_pass)
        if self.layer_mixer.adapter is not None:
            self.branch = Branch(self.mixers[ATTENTION].group, self.in_model_order(outputs.pop(ATTENTION)))
        if len(outputs) == 1:
            (y_BHTD,) = outputs.values()
            return y_BHTD
        return picked(torch.cat([*outputs.values()], 1), self.layer_mixer.head_indices)

    def in_model_order(self, y_BHTD: Tensor) -> Tensor:
        """Output of an attention function, (B, T, H, V), with the tokens in the model's order; contiguous in memory."""
        y_BTHV = y_BHTD.transpose(1, 2)[..., : self.layer_mixer.shape.value_dim]
        return to_front(y_BTHV, 1, self.layer_mixer.prefix_tokens).contiguous()


_current: ContextVar[LayerCall | None] = ContextVar("subquad_layer_call", default=None)
_forward: ContextVar[ForwardContext | None] = ContextVar("subquad_forward", default=None)


@contextmanager
def forward_arguments(model: nn.Module, context: ForwardContext) -> Iterator[dict[str, ForwardContext]]:
    """Within, forward passes of `model` have this context; yields the keyword arguments that carry it.

    Most models pass their keyword arguments on to the attention modules, also when gradient checkpointing computes a
    block again. For those that do not, the context is in a context variable.
    """
    token = _forward.set(context)
    model_class: Any = type(model)
    try:
        yield {"forward_context": context} if _takes_keywords(model_class) else {}
    finally:
        _forward.reset(token)


@cache
def _takes_keywords(model_class: Any) -> bool:
    """Whether the forward pass of a class takes any keyword argument; asked once, not at every step of decoding."""
    return any(p.kind is p.VAR_KEYWORD for p in signature(model_class.forward).parameters.values())


def _context_of(module: nn.Module, kwargs: dict[str, Any]) -> ForwardContext:
    """Context of a module's call: its keyword argument, else that of the forward pass.

    Raises UserError where gradient checkpointing calls a module again that was given its context by the variable.
    """
    context, mixer = kwargs.pop("forward_context", None), layer_mixer(module)
    if context is None:
        context = _forward.get()
        mixer.reads_variable |= context is not None
    if context is None and mixer.reads_variable and torch._C._current_graph_task_id() != -1:
        raise UserError(
            f"{type(module).__name__} receives no keyword arguments, so its student trains without gradient "
            "checkpointing only: switch it off"
        )
    return context or ForwardContext()


def current_call() -> LayerCall:
    """Open call of this thread."""
    call = _current.get()
    assert call is not None
    return call


def open_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before an attention module: opens its call.

    If one of its mixers does without rotary embedding, or one of a layer that shares its keys, the module gets cosines
    of 1 and sines of 0, and the call keeps the tables.
    """
    kwargs = {**kwargs}
    context = _context_of(module, kwargs)
    call = LayerCall(module, args[0] if args else kwargs["hidden_states"], context, kwargs)
    if call.layer_mixer.withholds_rotary and kwargs.get("position_embeddings") is not None:
        call.tables = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = identity_of(kwargs["position_embeddings"])
    _current.set(call)
    return args, kwargs


def close_call(module: nn.Module, args: Any, output: Any) -> None:
    """Hook after an attention module, also after one that failed: closes its call."""
    call = _current.get()
    if call is not None and call.module is module:  # not so if the module failed before its call was opened
        _current.set(call.outer_call)


def _without_effect(value: Any) -> Any:
    """Argument of a module for a trial call: no cache, and a copy of what it may write into."""
    return None if isinstance(value, StudentCache) else copy(value) if isinstance(value, MutableMapping) else value


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
