"""Where mixers meet a Hugging Face model: its attention function.

A student's model is told to call our function instead of its own (interface.py), and nothing of its code changes:

- `attach` gives each of those modules a `LayerMixer` and the hooks that open and close a `LayerCall` around it. The
  call has what the function is not given: the hidden states (for gates), and the rotary tables if a mixer wants none.
- `mixed_attention` splits the heads by mixer and joins their outputs. What a forward pass needs beyond its inputs (the
  2D padding mask, the cache) comes in one `ForwardContext`, as a keyword argument of the model, which the models pass
  on as far as their attention modules. No module holds a mode.
- The tokens at the front of an image encoder (class, registers) stand in the middle for the mixers, where two scans
  see them from both sides (Vision Mamba, arXiv 2401.09417).

The heads that keep attention go through the function that the model used before (sdpa, eager, ...), so that a student
whose plan is all attention computes exactly what its teacher does.

Legend: B batch, H query heads, G key/value heads, T new tokens, L past and new tokens, D head width, M hidden width.
"""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from subquad.model.interface import attention_function, set_attention
from subquad.model.join import output_projection, projected
from subquad.model.layer_call import Attend, close_call, current_call, open_call
from subquad.model.layer_mixer import LayerMixer, keep_initialised
from subquad.plan import JoinStart, Plan

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
) -> tuple[Tensor, None]:
    """The attention function of a student: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D).

    `base` is the implementation of the heads that keep attention. Attention weights are not returned.
    """
    call = current_call()
    if call.probe is not None:
        call.probe.append((query, key))
        return torch.zeros_like(query).transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _base_attention(module, base, attention_mask, scaling, kwargs)
    call.bind(query, key, value, scale, kwargs.get("softcap"), attend)
    y_BHTD = call.mixed() if call.context.around is None else call.context.around(call)
    return call.in_model_order(y_BHTD), None


def _base_attention(
    module: nn.Module, base: str, mask: Tensor | None, scaling: float | None, kwargs: dict[str, Any]
) -> Attend:
    """The model's own attention function, bound to this call."""
    function = attention_function(module, base)

    def attend(q_BHTD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor) -> Tensor:
        # Attention functions read these four of the module, and the group size must be that of the heads at hand.
        view = SimpleNamespace(
            num_key_value_groups=q_BHTD.shape[1] // k_BGLD.shape[1],
            is_causal=getattr(module, "is_causal", True),
            training=module.training,
            layer_idx=getattr(module, "layer_idx", None),
        )
        y_BTHD, _ = function(view, q_BHTD, k_BGLD, v_BGLD, mask, scaling=scaling, **kwargs)
        return y_BTHD.transpose(1, 2)

    return attend


def register(base: str) -> str:
    """Makes our function known for students whose kept heads use `base`; returns the implementation's name."""
    name = PREFIX + base

    def function(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return mixed_attention(*args, base=base, **kwargs)

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def attach(
    model: PreTrainedModel, paths: Sequence[str], plan: Plan, join_start: JoinStart = "identity", middle: int = 0
) -> None:
    """Gives each attention module its mixers and its hooks, and makes the model call our attention function."""
    for layer, path in enumerate(paths):
        module = model.get_submodule(path)
        module.mixer = keep_initialised(LayerMixer(plan, layer, join_start, middle))
        module.register_forward_pre_hook(open_call, with_kwargs=True)
        if plan.joined(layer):
            shape = plan.shapes[layer]
            projection = output_projection(module, shape.heads * shape.head_dim, shape.hidden_size)
            module.register_forward_hook(partial(_join, projection))
        module.register_forward_hook(close_call, always_call=True)
    set_attention(model, register(model.config._attn_implementation))


def _join(projection: nn.Module, module: nn.Module, args: Any, output: tuple[Any, ...]) -> Any:
    """The module's output with the branch of the retained heads, if this call left one."""
    call = current_call()
    if call.branch is None:
        return output
    u_BTM, *rest = output
    assert call.layer_mixer.adapter is not None
    return call.layer_mixer.adapter(u_BTM, projected(projection, call.branch)), *rest
