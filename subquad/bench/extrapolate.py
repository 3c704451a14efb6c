"""Extrapolation from measurements at a few contexts, and the context at which one model overtakes another."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np


class Point(NamedTuple):
    """Seconds at a context, measured there or extrapolated to it."""

    seconds: float
    measured: bool


Curve: TypeAlias = Mapping[int, Point]  # by context, in tokens


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile of samples."""

    low: float
    median: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles of at least two samples."""
    return Spread(*statistics.quantiles(samples, n=4, method="inclusive"))


Fit: TypeAlias = Callable[[int], float]  # from a context to seconds or bytes


def fit(
    measured: Mapping[int, float], powers: Sequence[int], base: Fit = lambda _: 0.0
) -> tuple[Fit, list[int]] | None:
    """Least-squares fit of `base` plus a sum of powers of the context, and the powers that it uses.

    Errors are relative, and no factor is negative: a power that would get one is left out, for no part of the work
    takes less than no time. None where there are fewer measurements than powers.
    """
    if len(measured) < len(powers):
        return None
    if not powers:
        return base, []
    longest = max(measured)  # contexts count in units of it, or their powers would be too far apart for exact sums
    rows = [[(context / longest) ** power / value for power in powers] for context, value in measured.items()]
    targets = [(value - base(context)) / value for context, value in measured.items()]
    factors = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0].tolist()
    if min(factors) < 0:
        worst = factors.index(min(factors))
        return fit(measured, [power for index, power in enumerate(powers) if index != worst], base)

    def at(context: int) -> float:
        parts = (factor * (context / longest) ** power for factor, power in zip(factors, powers, strict=True))
        return base(context) + sum(parts)

    return at, list(powers)


@dataclass(frozen=True)
class Forecast:
    """Forecast of quartiles `at` a context, and the `formula` that it follows."""

    at: Callable[[int], Spread]
    formula: str


def forecast(measured: Mapping[int, Spread], powers: Sequence[int]) -> Forecast | None:
    """Fit to the medians, bounded by the two fits of steepest and flattest growth within the quartiles.

    Those go through one quartile at the longest measured context and through the opposite one at all others. None where
    there are fewer measurements than powers.
    """
    fitted = fit({context: quartiles.median for context, quartiles in measured.items()}, powers)
    if fitted is None:
        return None
    longest = max(measured)
    up = {context: quartiles.high if context == longest else quartiles.low for context, quartiles in measured.items()}
    down = {context: quartiles.low if context == longest else quartiles.high for context, quartiles in measured.items()}
    fits = [fitted[0], *(tilted[0] for tilted in (fit(up, powers), fit(down, powers)) if tilted is not None)]

    def at(context: int) -> Spread:
        values = [fit_at(context) for fit_at in fits]
        return Spread(min(values), values[0], max(values))

    return Forecast(at, formula(fitted[1]))


def forecast_beside(measured: Mapping[int, Spread], base: Callable[[int], Spread], name: str) -> Forecast:
    """Forecast `base`, called `name`, plus a constant fitted to the medians."""
    medians = {context: quartiles.median for context, quartiles in measured.items()}
    fitted = fit(medians, [0] if medians else [], lambda context: base(context).median)
    assert fitted is not None  # there is no power without a measurement
    at_median, powers = fitted

    def at(context: int) -> Spread:
        extra = at_median(context) - base(context).median
        return Spread(*(value + extra for value in base(context)))

    return Forecast(at, " + ".join([name, *filter(None, [formula(powers)])]))


def formula(powers: Sequence[int]) -> str:
    """Formula of a sum of powers: `a + b N`."""
    names = {0: "", 1: " N", 2: " N²"}
    return " + ".join(f"{factor}{names[power]}" for factor, power in zip("abc", powers, strict=False))


def expected(known: Mapping[int, float], context: int) -> float:
    """Value at a longer context by the power law through the last two, at least linear."""
    *before, (last, value) = sorted(known.items())
    power = 1.0
    if before:
        shorter, less = before[-1]
        power = max(1.0, math.log(value / less) / math.log(last / shorter))
    return value * (context / last) ** power


@dataclass(frozen=True)
class Overtaking:
    """Contexts at which one model is faster: from `context` tokens on, always or never."""

    where: Literal["always", "never", "from"]
    context: float | None
    extrapolated: bool  # whether it rests on an extrapolated point


def overtaking(first: Curve, second: Curve) -> Overtaking | None:
    """Context from which `first` takes less time, up to the longest; interpolated linearly in log scales.

    None where they share no context.
    """
    contexts = sorted(first.keys() & second.keys())
    if not contexts:
        return None
    gains = [math.log(second[context].seconds / first[context].seconds) for context in contexts]

    def extrapolated(contexts_used: Sequence[int]) -> bool:
        return not all(model[context].measured for model in (first, second) for context in contexts_used)

    if gains[-1] <= 0:
        return Overtaking("never", None, extrapolated(contexts))
    behind = [index for index, gain in enumerate(gains) if gain <= 0]
    if not behind:
        return Overtaking("always", None, extrapolated(contexts))
    last = behind[-1]
    before, after = contexts[last], contexts[last + 1]
    share = -gains[last] / (gains[last + 1] - gains[last])
    return Overtaking("from", before * (after / before) ** share, extrapolated([before, after]))
