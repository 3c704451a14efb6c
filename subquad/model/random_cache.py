"""Cache of a given context, filled with random numbers, to measure decoding without a prefill."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from subquad.model.student import Student
from subquad.plan import ATTENTION, Plan


def random_cache(model: PreTrainedModel, plan: Plan, context: int, batch: int = 1) -> Cache:
    """Cache of `batch` sequences of `context` tokens, all with the same values; `plan`: that of the model."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Student):
        cache = _student_cache(model, context, generator)
    else:
        cache = _attention_cache(model, plan, context, generator)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


def _student_cache(student: Student, context: int, generator: torch.Generator) -> Cache:
    cache = student.new_cache()
    for index, (layer, module) in enumerate(zip(cache.layers, student.attention_modules(), strict=True)):
        device = next(module.parameters()).device
        layer.tokens, layer.is_initialized = context, True
        for name, mixer in student.mixers(index).items():
            entries = mixer.held(mixer.group, mixer.options, context)
            layer.states[name] = {
                key: torch.rand(1, *entry.shape, generator=generator).to(
                    device, torch.promote_types(student.dtype, torch.float32) if entry.wide else student.dtype
                )
                for key, entry in entries.items()
            }
    return cache


def _attention_cache(model: PreTrainedModel, plan: Plan, context: int, generator: torch.Generator) -> Cache:
    def random_BGTD(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(model.device, model.dtype)

    cache = DynamicCache(config=model.config)
    layer: Any
    for index, layer in enumerate(cache.layers):
        group = plan.groups(index)[ATTENTION]
        tokens = context if group.window is None else min(context, group.window - 1)
        shape = (1, len(group.kv_heads), tokens, group.head_dim)
        layer.update(random_BGTD(*shape), random_BGTD(*shape))
        if group.window is not None:
            layer.cumulative_length = context
    return cache
