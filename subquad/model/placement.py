"""Devices and dtypes of a teacher's computation, which its weights may not show, and its copy over the same storage.

Notable:
- The weights of a quantised teacher are integers or packed; those of an offloaded one are on the meta device until
  accelerate's hooks load them. In both cases a pass over two tokens tells where and in which dtype attention computes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from subquad.model.interface import least_inputs, watched_attention
from subquad.model.layer_mixer import keep_initialised

Placement = tuple[torch.device, torch.dtype]


@torch.no_grad()
def attention_placements(model: PreTrainedModel, paths: Sequence[str]) -> list[Placement]:
    """Device and dtype of the queries in these attention modules; no pass is run where the weights show them."""
    modules = [model.get_submodule(path) for path in paths]
    weights = [list(module.parameters()) for module in modules]
    if all(weight.dtype == model.dtype and not weight.is_meta for part in weights for weight in part):
        return [(part[0].device, part[0].dtype) for part in weights]
    with watched_attention(model) as calls:
        model(**least_inputs(model))
    return [(calls[module].q_BHTD.device, calls[module].q_BHTD.dtype) for module in modules]


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate loads weights of a model only while it computes with them."""
    return any(weight.is_meta for weight in model.parameters())


def is_quantised(model: nn.Module) -> bool:
    """Whether weights of a model are codes, by what transformers marks, by their dtype or by their class (torchao)."""
    return bool(getattr(model, "is_quantized", False)) or any(map(_is_code, model.parameters()))


def _is_code(weight: nn.Parameter) -> bool:
    is_plain = type(weight.data) is Tensor or isinstance(weight.data, DTensor)
    return not is_plain or not weight.is_floating_point() or weight.element_size() < 2


def alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters of the same names, shapes and dtypes, loaded or not."""
    forms = (
        [(name, weight.shape, weight.dtype, weight.is_meta) for name, weight in part.named_parameters()]
        for part in (module, other)
    )
    return next(forms) == next(forms)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Second module tree over the same storage, with new parameter objects that have their own requires_grad.

    Parameters of a class of their own (quantised ones) hold more than a tensor, so they are shared as they are.
    """
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) if type(weight) is nn.Parameter else weight
        for weight in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    memo |= {id(loaded): loaded for hook in hooks if (loaded := getattr(hook, "weights_map", None)) is not None}
    return keep_initialised(copy.deepcopy(model, memo))
