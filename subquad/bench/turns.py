"""Kinds of work that are timed: decoding, prefill and `generate`."""

import statistics
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Cache

from subquad.bench.models import BenchModel
from subquad.model.cache import CACHE
from subquad.model.random_cache import random_cache
from subquad.utils.timing import clock

STEPS = 4  # decoding steps of one turn
NEW_TOKENS = 8  # that `generate` writes after the first

# One turn of a model gives the seconds of one or two measures, and the cache that it filled where it read all tokens.
Turn: TypeAlias = Callable[[], tuple[dict[str, float], Cache | None]]


def decode(subject: BenchModel, tokens_BT: Tensor) -> Turn:
    """A few steps, one token for each sequence. The cache is that many tokens longer after each turn."""
    batch, context = tokens_BT.shape
    cache, last_B1 = random_cache(subject.model, context, batch), tokens_BT[:, -1:]

    def turn() -> tuple[dict[str, float], None]:
        start = clock(tokens_BT.device)
        for _ in range(STEPS):
            subject.model(last_B1, use_cache=True, **{CACHE: cache})
        return {"decode": (clock(tokens_BT.device) - start) / STEPS}, None

    return turn


def prefill(subject: BenchModel, tokens_BT: Tensor) -> Turn:
    """One pass over the prompt that fills a cache and gives the last token's logits."""

    def turn() -> tuple[dict[str, float], Cache]:
        start = clock(tokens_BT.device)
        cache = subject.model(tokens_BT, use_cache=True, logits_to_keep=1)[CACHE]
        return {"prefill": clock(tokens_BT.device) - start}, cache

    return turn


def generate(subject: BenchModel, tokens_BT: Tensor) -> Turn:
    """`generate` of transformers: the time to the first token, and the median time between two later tokens."""
    length = 1 + NEW_TOKENS

    def turn() -> tuple[dict[str, float], None]:
        times = _Times(tokens_BT.device)
        start = clock(tokens_BT.device)
        model: Any = subject.model  # transformers types `generate` for its own classes
        model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            streamer=times,
        )
        _, first, *later = times.seen  # the prompt is handed on, too
        gaps = [after - before for before, after in zip([first, *later], later, strict=False)]
        return {"first_token": first - start, "generate": statistics.median(gaps)}, None

    return turn


class _Times:
    """A streamer of `generate` that notes when it is given something."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Notes the time; `generate` calls it with the prompt, then with each new token."""
        self.seen.append(clock(self.device))

    def end(self) -> None:
        pass


KINDS: dict[str, Callable[[BenchModel, Tensor], Turn]] = {"decode": decode, "prefill": prefill, "generate": generate}
