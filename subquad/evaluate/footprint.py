"""Memory of caches: by the plan's arithmetic, and as a cache really allocates it."""

from collections.abc import Iterator, Sequence

import torch
from transformers import Cache

from subquad.plan import Plan


def cache_table(plan: Plan, contexts: Sequence[int], dtype: str = "float32") -> dict[int, int]:
    """Bytes of one sequence's cache under `plan` at each context length (tokens), keys and values in `dtype`."""
    return {context: plan.cache_bytes(context, dtype=dtype) for context in contexts}


def held_cache_bytes(cache: Cache) -> int:
    """Bytes that the tensors of a cache keep allocated, in all its layers, whatever the layers call them.

    Counts storages, each once: a short view of a long tensor keeps all of it alive, and is no saving.
    """
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
