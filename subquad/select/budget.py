"""Budgets: how much attention a plan may keep.

A budget is a number of units (`15`), a share of them (`50%` or `0.5`), the bytes of one sequence's cache at a context
length (`64MiB@32k`), or the decoding speed there relative to the teacher (`1.5x@32k`). The units are the selector's:
layers, heads or groups of layers. With a word (`opt`, `best`) the selector determines how many to keep.

Units count what attends to everything. The teacher's own sliding-window layers keep attention beside them
(`kept_layers`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from subquad.errors import UserError
from subquad.plan import AttentionShape, Plan
from subquad.recipes.schema import SelectorConfig

Cost: TypeAlias = Callable[[Plan], float]  # bytes of a cache, or seconds of a decoding step

WORDS = ("opt", "best")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXAMPLES = (
    "a budget looks like 15 (layers or heads), 50% (of them), 64MiB@32k (cache bytes at a context), 1.5x@32k (decoding "
    "so much faster than the teacher at a context), or opt or best (the greedy selector finds out how much to keep)"
)


@dataclass(frozen=True)
class Budget:
    """Exactly one kind of budget.

    `count`: units. `share`: share of the units. `size`: cache bytes at `context` tokens. `speedup`: decoding speed of
    one sequence after `context` tokens, relative to the teacher's. `word`: `opt` or `best`.
    """

    text: str
    count: int | None = None
    share: float | None = None
    size: float | None = None
    context: int | None = None
    speedup: float | None = None
    word: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget. Raises UserError if `text` is not one."""
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

    def count_of(self, units: int, unit: str = "layer") -> int:
        """The number of `units` units that a budget in units keeps, given as a count or a share.

        Raises UserError for more units than there are, and for a word.
        """
        if self.word is not None:
            raise UserError(f"the budget '{self.word}' is for the greedy selector only: {_EXAMPLES}")
        if self.share is not None:
            return round(self.share * units)
        assert self.count is not None
        if self.count > units:
            raise UserError(f"the budget of {self.count} attention {unit}s is more than the teacher's {units}")
        return self.count

    def cost_and_limit(
        self, shapes: Sequence[AttentionShape], dtype: str, seconds: Cost | None = None
    ) -> tuple[Cost, float]:
        """The cost of a plan under a budget in bytes or speed, and its limit.

        Costs are bytes of one sequence's cache in `dtype`, or `seconds` of a decoding step (select/speed.py), at the
        budget's context length.
        """
        if self.size is not None:
            context = self.context
            assert context is not None
            return lambda plan: plan.cache_bytes(context, dtype=dtype), self.size
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
        """The greatest number of `units` units that may keep attention; `plan_of(k)` is the plan that keeps k.

        `seconds`: duration of a plan's decoding step, for a budget of speed. Raises UserError if even a plan without
        attention exceeds the budget, or if the budget is more units than there are.
        """
        if self.context is None:
            return self.count_of(units, unit)
        linear = plan_of(0)
        cost, limit = self.cost_and_limit(linear.shapes, dtype, seconds)
        count = largest_within(units, plan_of, cost, limit)
        if count is None:
            raise self.impossible(cost(linear), limit, unit)
        return count

    def impossible(self, min_cost: float, limit: float, unit: str = "layer") -> UserError:
        """The error for a budget that no plan meets; `min_cost`: cost of the plan without attention."""
        if self.speedup is None:
            has, advice = f"the cache takes {min_cost / 2**20:.1f} MiB", "give more, or a mixer with a smaller state"
        else:
            speedup = self.speedup * limit / min_cost
            has, advice = f"decoding is {speedup:.2f} times as fast as the teacher's", "ask for less, or a faster mixer"
        return UserError(
            f"the budget {self.text} is impossible: without any attention {unit} {has} at {self.context} tokens; "
            f"{advice}"
        )


def largest_within(count: int, plan_of: Callable[[int], Plan], cost: Cost, limit: float) -> int | None:
    """The largest k of 0 to `count` for which `plan_of(k)` costs no more than `limit`; None if there is none."""
    return next((k for k in range(count, -1, -1) if cost(plan_of(k)) <= limit), None)


def kept_layers(
    settings: SelectorConfig, shapes: Sequence[AttentionShape], given_plan: Plan | None = None
) -> list[int]:
    """Layers that keep attention without being counted: those with the teacher's own sliding window.

    Their cache does not grow with the context, so no units are spent on them. Empty for a budget in bytes or speed,
    which weighs real costs, unless `window_layers` is `keep`; for `replace`; and where every layer has a window, so
    that there is nothing else to convert. Of a given plan, only layers that it leaves alone.
    """
    windows = [layer for layer, shape in enumerate(shapes) if shape.window is not None]
    counts_units = Budget.parse(settings.budget).context is None
    keeps = counts_units if settings.window_layers is None else settings.window_layers == "keep"
    if not keeps or len(windows) == len(shapes):
        return []
    return [layer for layer in windows if given_plan is None or layer in given_plan.attention_layers]
