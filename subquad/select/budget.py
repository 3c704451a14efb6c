"""Budgets: how much of a plan may stay attention.

Three ways to say it: a number of units (`15`), a share of them (`50%` or `0.5`), or the bytes that one sequence's cache
may take at a context length (`64MiB@32k`). The units are the selector's: layers or heads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from subquad.errors import UserError
from subquad.plan import Plan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXAMPLES = "a budget looks like 15 (layers or heads), 50% (of them) or 64MiB@32k (cache bytes at a context)"


@dataclass(frozen=True)
class Budget:
    """Exactly one of: a `count` of units, a `share` of them, or cache `size` in bytes at `context` tokens."""

    text: str
    count: int | None = None
    share: float | None = None
    size: float | None = None
    context: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget. Raises UserError for what is not one."""
        plain = text.strip().replace(" ", "")
        if re.fullmatch(r"\d+", plain):
            return cls(plain, count=int(plain))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", plain):
            return cls._of_share(plain, float(match[1]) / 100)
        if re.fullmatch(r"\d*\.\d+", plain):
            return cls._of_share(plain, float(plain))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?I?B?)@(\d+(?:\.\d+)?)([kK]?)", plain, re.IGNORECASE):
            number, unit, context, thousands = match.groups()
            if unit.upper() in _UNITS:
                tokens = round(float(context) * (1024 if thousands else 1))  # as in "32k context": 32,768 tokens
                return cls(plain, size=float(number) * _UNITS[unit.upper()], context=tokens)
        raise UserError(f"'{text}' is not a budget: {_EXAMPLES}")

    @classmethod
    def _of_share(cls, text: str, share: float) -> "Budget":
        if not 0 <= share <= 1:
            raise UserError(f"the budget '{text}' is not between nothing and everything: {_EXAMPLES}")
        return cls(text, share=share)

    def of(self, units: int, unit: str = "layer") -> int:
        """How many of `units` units a budget that is a count or a share of them keeps; UserError for too many."""
        if self.share is not None:
            return round(self.share * units)
        assert self.count is not None
        if self.count > units:
            raise UserError(f"the budget of {self.count} attention {unit}s is more than the teacher's {units}")
        return self.count

    def largest(self, units: int, plan_of: Callable[[int], Plan], dtype: str, unit: str = "layer") -> int:
        """How many of `units` units may keep attention, `plan_of(k)` being the plan that keeps k.

        Raises UserError where even a plan without attention is over the budget, or it asks for more than there are.
        """
        if self.size is None:
            return self.of(units, unit)
        assert self.context is not None
        fitting = [k for k in range(units + 1) if plan_of(k).cache_bytes(self.context, dtype=dtype) <= self.size]
        if not fitting:
            least = plan_of(0).cache_bytes(self.context, dtype=dtype)
            raise UserError(
                f"the budget {self.text} is impossible: without any attention {unit} the cache takes "
                f"{least / 2**20:.1f} MiB at {self.context} tokens; give more, or a mixer with a smaller state"
            )
        return max(fitting)
