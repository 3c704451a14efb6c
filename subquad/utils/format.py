"""Numbers as people read them; shared by the page, the model card, the pictures and the terminal table.

Every function takes a plain number (NaN where a file had none) and returns text. A no-break space joins a
number to its unit, but for the percent sign, which follows at once. NaN is a dash, so that no table breaks or lies.
"""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator

DASH = "–"
NBSP = "\N{NO-BREAK SPACE}"
NAN = math.nan

Number = Annotated[float, BeforeValidator(lambda value: NAN if value is None else value)]
"""A number in a run's files: absent and null are NaN."""


def plain(text: str) -> str:
    """`text`, as these functions return it, in ASCII."""
    return text.translate({ord(DASH): "-", ord(NBSP): " "})


def nats(value: float) -> str:
    """A divergence or a loss in nats, with three decimals or one significant figure."""
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1g}"


def logprob(value: float) -> str:
    """A log-probability in nats, with a true minus sign."""
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else DASH


def perplexity(value: float) -> str:
    """A perplexity, with the decimals its size deserves."""
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else DASH


def of_image(measure: str, value: float) -> str:
    """A measure of images: shares in percent, divergences and distances as they are."""
    return nats(value) if measure in ("kl", "distance", "saliency") else percent(value)


def measure(value: float, stderr: float) -> str:
    """A metric of a task with its standard error, where it has one."""
    if not math.isfinite(value):
        return DASH
    error = f"{NBSP}±{NBSP}{stderr:.3f}" if math.isfinite(stderr) else ""
    return f"{value:.3f}".replace("-", "−") + error


def integer(value: float) -> str:
    """A count with thousands separated, or a dash."""
    return f"{value:,.0f}" if math.isfinite(value) else DASH


def count(number: int, noun: str) -> str:
    """`1 layer`, `15 layers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers, neighbours as a range: `0-2, 5`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def size(value: float) -> str:
    """Bytes in binary units, three significant figures."""
    if not math.isfinite(value):
        return DASH
    value, unit = _binary(value)
    return f"{value:,.0f}{NBSP}{unit}" if value >= 100 or value == int(value) else f"{value:.3g}{NBSP}{unit}"


def budget(value: float, tokens: int) -> str:
    """Budget for a cache of `value` bytes at a context of `tokens`, rounded up: `12.35MiB@32k`."""
    value, unit = _binary(value)
    return f"{math.ceil(100 * value) / 100:g}{unit}@{context(tokens)}"


def _binary(value: float) -> tuple[float, str]:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return value, units[0]


def context(tokens: int) -> str:
    """A context length: 256, 1024, then 2k, 32k, 128k where it is a whole number of 1024s."""
    return f"{tokens // 1024}k" if tokens >= 2048 and tokens % 1024 == 0 else str(tokens)


def band(index: int, bands: int) -> str:
    """One of equal parts of a whole: `20–40%`."""
    return f"{100 * index / bands:.0f}–{100 * (index + 1) / bands:.0f}%"


def duration(seconds: float) -> str:
    """Seconds as `3.2 s`, `4 min 05 s` or `2 h 10 min`."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{NBSP}s"
    minutes, seconds_rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min{NBSP}{seconds_rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h{NBSP}{minutes % 60:02d}{NBSP}min"


def objective(value: str | dict[str, float]) -> str:
    """A stage's objective: its name, or the weighted sum `logits + 0.1 labels`."""
    if isinstance(value, str):
        return value.replace("_", " ")
    terms = (name if weight == 1 else f"{weight:g} {name}" for name, weight in value.items())
    return " + ".join(terms).replace("_", " ")
