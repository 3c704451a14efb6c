"""Budgets: how much of a plan may stay attention.

A number of units (`15`), a share of them (`50%` or `0.5`), the bytes that one sequence's cache may take at a context
length (`64MiB@32k`), or how much faster than the teacher it must decode there (`1.5x@32k`). The units are the
selector's: layers, heads or groups of layers. With a word (`opt`, `best`) the selector finds out how many to keep.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TypeAlias

from subquad.errors import UserError
from subquad.plan import AttentionShape, Plan

Cost: TypeAlias = Callable[[Plan], float]  # bytes of a cache, or seconds of a decoding step

WORDS = ("opt", "best")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXAMPLES = (
    "a budget looks like 15 (layers or heads), 50% (of them), 64MiB@32k (cache bytes at a context), 1.5x@32k (decoding "
    "so much faster than the teacher at a context), or opt or best (the greedy selector finds out how much to keep)"
)


@dataclass(frozen=True)
class Budget:
    """Exactly one of: a `count` of units, a `share` of them, cache `size` in bytes at `context` tokens, a `speedup` of
    decoding one sequence after `context` tokens (in the teacher's tokens per second), or a `word`."""

    text: str
    count: int | None = None
    share: float | None = None
    size: float | None = None
    context: int | None = None
    speedup: float | None = None
    word: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget. Raises UserError for what is not one."""
        plain = text.strip().replace(" ", "")
        if plain.lower() in WORDS:
            return cls(plain, word=plain.lower())
        if re.fullmatch(r"\d+", plain):
            return cls(plain, count=int(plain))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", plain):
            return cls._of_share(plain, float(match[1]) / 100)
        if re.fullmatch(r"\d*\.\d+", plain):
            return cls._of_share(plain, float(plain))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)(X|[KMG]?I?B?)@(\d+(?:\.\d+)?)(K?)", plain, re.IGNORECASE):
            number, unit, context, thousands = match.groups()
            tokens = round(float(context) * (1024 if thousands else 1))  # as in "32k context": 32,768 tokens
            if unit.upper() == "X":
                return cls._of_speedup(plain, float(number), tokens)
            if unit.upper() in _UNITS:
                return cls(plain, size=float(number) * _UNITS[unit.upper()], context=tokens)
        raise UserError(f"'{text}' is not a budget: {_EXAMPLES}")

    @classmethod
    def _of_share(cls, text: str, share: float) -> "Budget":
        if not 0 <= share <= 1:
            raise UserError(f"the budget '{text}' is not between nothing and everything: {_EXAMPLES}")
        return cls(text, share=share)

    @classmethod
    def _of_speedup(cls, text: str, speedup: float, context: int) -> "Budget":
        if speedup < 1:
            raise UserError(f"the budget '{text}' asks for less speed than the teacher has: {_EXAMPLES}")
        return cls(text, speedup=speedup, context=context)

    def of(self, units: int, unit: str = "layer") -> int:
        """How many of `units` units a budget that is a count or a share of them keeps.

        Raises UserError for more than there are, and for a word.
        """
        if self.word is not None:
            raise UserError(f"the budget '{self.word}' is for the greedy selector only: {_EXAMPLES}")
        if self.share is not None:
            return round(self.share * units)
        assert self.count is not None
        if self.count > units:
            raise UserError(f"the budget of {self.count} attention {unit}s is more than the teacher's {units}")
        return self.count

    def priced(self, shapes: Sequence[AttentionShape], dtype: str, seconds: Cost | None = None) -> tuple[Cost, float]:
        """What a plan costs by a budget of bytes or of speed, and the most that it may cost.

        Bytes of one sequence's cache in `dtype`, or `seconds` of a decoding step (select/speed.py), at its context.
        """
        if self.size is not None:
            return methodcaller("cache_bytes", self.context, dtype=dtype), self.size
        assert self.speedup is not None and seconds is not None
        return seconds, seconds(Plan.all_attention([*shapes])) / self.speedup

    def largest(
        self,
        units: int,
        plan_of: Callable[[int], Plan],
        dtype: str,
        unit: str = "layer",
        seconds: Cost | None = None,
    ) -> int:
        """How many of `units` units may keep attention, `plan_of(k)` being the plan that keeps k.

        `seconds`: what a decoding step takes, for a budget of speed.
        Raises UserError where even a plan without attention is over the budget, or it asks for more than there are.
        """
        if self.context is None:
            return self.of(units, unit)
        nothing = plan_of(0)
        cost, limit = self.priced(nothing.shapes, dtype, seconds)
        count = largest_within(units, plan_of, cost, limit)
        if count is None:
            raise self.impossible(cost(nothing), limit, unit)
        return count

    def impossible(self, least: float, limit: float, unit: str = "layer") -> UserError:
        """The error for a budget within which no plan is; `least`: what the plan without attention costs."""
        if self.speedup is None:
            has, advice = f"the cache takes {least / 2**20:.1f} MiB", "give more, or a mixer with a smaller state"
        else:
            reached = self.speedup * limit / least
            has, advice = f"decoding is {reached:.2f} times as fast as the teacher's", "ask for less, or a faster mixer"
        return UserError(
            f"the budget {self.text} is impossible: without any attention {unit} {has} at {self.context} tokens; "
            f"{advice}"
        )


def largest_within(count: int, plan_of: Callable[[int], Plan], cost: Cost, limit: float) -> int | None:
    """The largest k of 0 to `count` for which `plan_of(k)` costs no more than `limit`; None where there is none."""
    return next((k for k in range(count, -1, -1) if cost(plan_of(k)) <= limit), None)
