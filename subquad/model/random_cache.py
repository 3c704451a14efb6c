"""Cache of a given context, filled with random numbers, to measure decoding without a prefill."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from subquad.model.cache import CACHE, StudentCacheLayer
from subquad.model.interface import least_inputs
from subquad.model.student import Student


@torch.no_grad()
def random_cache(model: PreTrainedModel, context: int, batch: int = 1) -> Cache:
    """Cache of `batch` sequences of `context` tokens, all with the same values.

    A pass over two tokens makes its layers and states. Those of a hybrid teacher's own layers stay as they are, for
    their values do not matter and their size is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    cache: Any = model.new_cache() if isinstance(model, Student) else DynamicCache(config=model.config)
    model(**least_inputs(model) | {CACHE: cache, "use_cache": True})
    for layer in cache.layers:
        if isinstance(layer, StudentCacheLayer):
            assert isinstance(model, Student)
            _fill_student_layer(layer, model, context, generator)
        elif isinstance(layer, DynamicLayer):
            _fill_attention_layer(layer, context, generator)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


def _fill_student_layer(layer: StudentCacheLayer, student: Student, context: int, generator: torch.Generator) -> None:
    """Gives the states of a student's cache layer the shapes that they have after `context` tokens."""
    layer.tokens = context
    mixers = student.mixers(layer.plan_layer)
    for name, state in layer.states.items():
        entries = mixers[name].held(mixers[name].group, mixers[name].options, context)
        layer.states[name] = {key: _random(entry.shape, state[key], generator) for key, entry in entries.items()}


def _fill_attention_layer(layer: Any, context: int, generator: torch.Generator) -> None:
    """Gives a teacher's cache layer keys and values of `context` tokens, or of its window."""
    window = getattr(layer, "sliding_window", None)
    tokens = context if window is None else min(context, window - 1)
    shape = (layer.keys.shape[1], tokens, layer.keys.shape[3])
    layer.keys, layer.values = (_random(shape, x, generator) for x in (layer.keys, layer.values))
    if window is not None:
        layer.cumulative_length = context


def _random(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random tensor (1, *shape) with the dtype and device of another."""
    return torch.rand(1, *shape, generator=generator).to(like)
