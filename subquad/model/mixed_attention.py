"""Attention function of a student, in which its mixers replace attention.

The student's model calls this function instead of its own (interface.py); its code is unchanged:

- `attach` adds a `LayerMixer` to each attention module, and hooks that open and close a `LayerCall` around it. The call
  holds inputs that the attention function does not receive: the hidden states (for gates), and the rotary tables if a
  mixer does without rotary embedding.
- `mixed_attention` splits the heads by mixer and joins their outputs. Padding, documents and the cache come in one
  `ForwardContext`, a keyword argument of the model that is passed on to its attention modules. No module holds a mode.
- The prefix tokens of an image encoder (class, registers) are moved to the middle for the mixers, so that both scans
  reach them (Vision Mamba, arXiv 2401.09417).

The heads that keep attention use the model's previous implementation (sdpa, eager, ...), so that a student whose plan
is all attention computes exactly what its teacher computes.

Legend: B batch, H query heads, G key/value heads, T new tokens, L past and new tokens, D head width, M hidden width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from subquad.mixers import HeadGroup, mixer_options
from subquad.mixers.base import picked
from subquad.model.interface import attention_function, set_attention
from subquad.model.join import output_projection, project_branch
from subquad.model.layer_call import Attend, close_call, current_call, open_call
from subquad.model.layer_mixer import LayerMixer, keep_initialised, layer_mixer
from subquad.model.packing import Documents
from subquad.plan import ATTENTION, JoinStart, Plan

PREFIX = "subquad_"  # "subquad_sdpa": mixers, with sdpa for the heads that keep attention


def mixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base: str,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a student: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    `base` is the implementation of the heads that keep attention. Its weights are returned where all heads do.
    """
    call = current_call()
    if call.probe is not None:
        call.probe.append((query, key))
        return torch.zeros_like(query[..., : value.shape[-1]]).transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    documents = call.context.layout.documents
    weights: list[Tensor | None] = []

    def attend_of(group: HeadGroup) -> Attend:
        return _base_attention(module, base, attention_mask, scaling, kwargs, group, documents, weights)

    call.bind(query, key, value, scale, kwargs.get("softcap"), kwargs.get("s_aux"), attend_of)
    y_BHTD = call.mixed() if call.context.around is None else call.context.around(call)
    return call.in_model_order(y_BHTD), weights[-1] if weights and [*call.mixers] == [ATTENTION] else None


def _base_attention(
    module: nn.Module,
    base: str,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
    group: HeadGroup,
    documents: Documents | None,
    weights: list[Tensor | None],
) -> Attend:
    """Model's own attention function, bound to this call and these heads; appends its weights, if any, to `weights`."""
    function = attention_function(module, base)
    group_kwargs = {name: _of_heads(value, group) for name, value in kwargs.items()}

    def attend(q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor) -> Tensor:
        view = _ModuleView(module, group, q_BHTD.shape[1] // k_BGLD.shape[1])
        own_mask, own_kwargs = (mask, {}) if documents is None else documents.attention(base, mask, k_BGLD.shape[2])
        own_mask = _of_heads(own_mask, group)
        all_kwargs = {"scaling": scaling, **group_kwargs, **own_kwargs}
        y_BTHD, weights_BHTL = function(view, q_BHTD, k_BGLD, v_BGLD, own_mask, **all_kwargs)
        weights.append(weights_BHTL)
        return y_BTHD.transpose(1, 2)

    return attend


class _ModuleView:
    """Attention module as its attention function sees it, for a group of its heads.

    Attributes are the module's. Those with one entry per query head, such as learned sinks, are the group's.
    """

    def __init__(self, module: nn.Module, group: HeadGroup, queries_per_kv: int) -> None:
        self._module, self._group = module, group
        self.num_key_value_groups = queries_per_kv

    def __getattr__(self, name: str) -> Any:
        return _of_heads(getattr(self._module, name), self._group)


def _of_heads(value: Any, group: HeadGroup) -> Any:
    """Part of a tensor that belongs to a group of heads: of (H,), or of (B, H, T, L). Other values are unchanged."""
    heads = group.layer_heads
    if not isinstance(value, Tensor) or len(group.heads) == heads:
        return value
    if value.dim() == 1 and len(value) == heads:
        return picked(value[None], group.heads)[0]
    if value.dim() == 4 and value.shape[1] == heads:
        return picked(value, group.heads)
    return value


class Implementation(str):
    """Name of a student's attention function, which also equals that of its kept heads: models branch on the name."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or attention_base(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # that of the function to look up


def register(base: str) -> str:
    """Registers `mixed_attention` with `base` for the heads that keep attention; returns the implementation's name."""
    name = Implementation(PREFIX + base)

    def function(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return mixed_attention(*args, base=base, **kwargs)

    AttentionInterface.register(name, function)
    if base in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():  # a caller's own function may have no mask of its own
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def attention_base(name: str) -> str:
    """Implementation of the heads that keep attention, from the name of a student's or any other."""
    return str.removeprefix(name, PREFIX)


def _keep_mixers(module: nn.Module, args: Any) -> None:
    """Hook before an attention module: an implementation that was set since becomes that of the attention heads.

    Callers set it by `set_attn_implementation` or in the configuration, of the student or its parts. The mask has been
    made by then, with the mask function that both names share.
    """
    config: Any = module.config
    if not config._attn_implementation.startswith(PREFIX):
        config._attn_implementation_internal = register(config._attn_implementation)


def attach(
    model: PreTrainedModel, paths: Sequence[str], plan: Plan, join_start: JoinStart = "identity", prefix_tokens: int = 0
) -> None:
    """Adds mixers and hooks to each attention module, and sets the model's attention to `mixed_attention`."""
    for layer, path in enumerate(paths):
        module = model.get_submodule(path)
        module.mixer = keep_initialised(LayerMixer(plan, layer, join_start, prefix_tokens))
        module.register_forward_pre_hook(_keep_mixers)
        module.register_forward_pre_hook(open_call, with_kwargs=True)
        if plan.joined(layer):
            shape = plan.shapes[layer]
            width = shape.heads * (shape.value_dim or shape.head_dim)
            projection = output_projection(module, width, shape.hidden_size)
            module.register_forward_hook(partial(_join, projection))
        module.register_forward_hook(close_call, always_call=True)
    # Layers that share keys rotate them alike, also where blocks of several students are combined (a supernet)
    sources = [plan.kv_source(layer) for layer in range(plan.num_layers)]
    all_rotate = all(getattr(mixer_options(name, options), "rotary", True) for name, options in plan.mixers.items())
    for layer, path in enumerate(paths):
        mixer = layer_mixer(model.get_submodule(path))
        is_alone = sources.count(sources[layer]) == 1
        mixer.withholds_rotary = not (all(part.rotary for part in mixer.by_name.values()) if is_alone else all_rotate)
    set_attention(model, register(model.config._attn_implementation))


def _join(projection: str, module: nn.Module, args: Any, output: tuple[Any, ...]) -> Any:
    """Hook after an attention module: joins the branch of the retained heads to its output, if the call has one.

    `projection`: name of the output projection, which may have been wrapped since.
    """
    call = current_call()
    if call.branch is None:
        return output
    u_BTM, *other_outputs = output
    assert call.layer_mixer.adapter is not None
    v_BTM = project_branch(module.get_submodule(projection), call.branch, call.all_inputs.q_BHTD.shape[1])
    return call.layer_mixer.adapter(u_BTM, v_BTM), *other_outputs
