"""bench.json: what `subquad bench` measured."""

from typing import Any, Literal

from subquad.results.record import Record
from subquad.utils.format import NAN, Number


class Roofline(Record):
    """Least work of a cell, the seconds it takes at the machine's best, and their share of the measured time."""

    bytes: Number = NAN
    flops: Number = NAN
    seconds: Number = NAN
    share: Number = NAN


class BenchCell(Record):
    """One measure of one model at one context and batch; None where it could be neither measured nor expected."""

    measure: str
    model: str
    context: int
    batch: int
    measured: bool
    samples: int = 0  # rounds
    order: list[list[str]] = []  # of the models, round by round
    too_little: str = ""  # time or memory, where it was not measured
    fitted_to: list[int] = []  # contexts that it was extrapolated from
    formula: str | None = None
    low: float | None = None  # seconds: quartiles and median
    seconds: float | None = None
    high: float | None = None
    roofline: Roofline = Roofline()
    tokens_per_second: float | None = None
    peak_bytes: float | None = None
    cache_bytes: float | None = None
    held_bytes: float | None = None


class BenchSettings(Record):
    """Arguments of `subquad bench`."""

    contexts: list[int] = []
    batches: list[int]
    seconds: float | None = None
    dtype: str


class BenchedModel(Record):
    """A model that was measured."""

    title: str = ""
    weight_bytes: Number = NAN
    plan_pattern: str | None = None
    max_positions: int | None = None


class Crossing(Record):
    """Context at which the first model becomes faster than the second."""

    measure: str
    batch: int
    where: Literal["always", "never", "from"]
    context: float | None = None
    extrapolated: bool = False


class RoofSpeeds(Record):
    """Peak rates of the machine."""

    bytes_per_second: Number = NAN
    flops_per_second: Number = NAN


class Bench(Record):
    """bench.json."""

    date: str = ""
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    command: str | None = None
    commit: str | None = None
    seed: int | None = None
    settings: BenchSettings
    seconds: Number = NAN
    roof: RoofSpeeds = RoofSpeeds()
    models: dict[str, BenchedModel]
    notes: list[str] = []
    cells: list[BenchCell]
    overtakes: list[Crossing] = []
