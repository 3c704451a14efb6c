"""Budgets: how much of a plan may stay attention.

Three ways to say it: a number of layers (`15`), a share of the layers (`50%` or `0.5`), or the bytes that one
sequence's cache may take at a context length (`64MiB@32k`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from subquad.errors import UserError
from subquad.plan import Plan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXAMPLES = "a budget looks like 15 (layers), 50% (of the layers) or 64MiB@32k (cache bytes at a context)"


@dataclass(frozen=True)
class Budget:
    """Exactly one of: `layers`, a `share` of them, or cache `size` in bytes at `context` tokens."""

    text: str
    layers: int | None = None
    share: float | None = None
    size: float | None = None
    context: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget. Raises UserError for what is not one."""
        plain = text.strip().replace(" ", "")
        if re.fullmatch(r"\d+", plain):
            return cls(plain, layers=int(plain))
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
            raise UserError(f"the budget '{text}' is not between nothing and all of the layers: {_EXAMPLES}")
        return cls(text, share=share)

    def largest(self, layers: int, plan_of: Callable[[int], Plan], dtype: str) -> int:
        """How many of `layers` layers may keep attention, `plan_of(k)` being the plan that keeps k.

        Raises UserError where even a plan without attention is over the budget, or it asks for more layers than there
        are.
        """
        if self.layers is not None:
            if self.layers > layers:
                raise UserError(f"the budget of {self.layers} attention layers is more than the teacher's {layers}")
            return self.layers
        if self.share is not None:
            return round(self.share * layers)
        assert self.size is not None and self.context is not None
        fitting = [k for k in range(layers + 1) if plan_of(k).cache_bytes(self.context, dtype=dtype) <= self.size]
        if not fitting:
            least = plan_of(0).cache_bytes(self.context, dtype=dtype)
            raise UserError(
                f"the budget {self.text} is impossible: without any attention layer the cache takes "
                f"{least / 2**20:.1f} MiB at {self.context} tokens; give more, or a mixer with a smaller state"
            )
        return max(fitting)
