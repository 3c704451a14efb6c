"""scores.json: scores of a selector, and its choice. Every part but the selector's name may be missing."""

import math
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from pydantic import AliasChoices, Field

from subquad.results.record import Record
from subquad.utils import format as fmt
from subquad.utils.format import NAN, Number

Table: TypeAlias = list[Number] | list[list[Number]]


class ReplacementStep(Record):
    """One unit replaced by its mixer, and the score on the task's validation documents since then."""

    unit: int
    score: Number = NAN


class Picked(NamedTuple):
    """A plan on the path: its name, how many units are replaced in it, and its scores."""

    name: str
    steps: int
    validation: float
    test: float


class ReplacementPath(Record):
    """The greedy selector's path from the teacher. `best`, `opt`: numbers of steps. `test`: on other documents."""

    task: str
    floor: Number = NAN
    base: Number = NAN  # the teacher's score
    steps: list[ReplacementStep] = []
    best: int
    opt: int
    test: dict[str, Number] = {}

    @property
    def scores(self) -> list[float]:
        """On the validation documents, by number of units replaced."""
        return [self.base, *(step.score for step in self.steps)]

    def remaining(self, units: int, steps: int) -> list[int]:
        """The units that still attend after this many steps, of `units` in all."""
        replaced = {step.unit for step in self.steps[:steps]}
        return [unit for unit in range(units) if unit not in replaced]

    @property
    def picked(self) -> list[Picked]:
        """The teacher, and the two plans that were picked."""
        plans = (("teacher", 0, "base"), ("M_best", self.best, "best"), ("M_opt", self.opt, "opt"))
        return [Picked(name, steps, self.scores[steps], self.test.get(key, NAN)) for name, steps, key in plans]


class FrontPoint(Record):
    """The most of the measured worth (a share of it) that a cache of `cost` bytes can keep."""

    cost: float
    value: float


class Scores(Record):
    """scores.json: one score a unit, higher for one that should rather keep its attention.

    Of layers, or groups of them, one list; of heads, a list for each layer. `low` and `high`, the bounds of the scores,
    are like them. `chosen`: indices of units, counted through all layers that have units.
    """

    by: str
    unit: Literal["layer", "head", "group"] = "layer"
    units: list[list[int]] | None = None  # the layers of each group, or of each layer that is no `kept_layers`
    kept_layers: list[int] = []  # layers that keep attention and are no units
    mixer: str = ""
    scores: Table = []  # none of a selector that measures nothing
    low: Table = []
    high: Table = []
    roles: list[list[str]] = []  # of heads: aggregate, gather or neither
    measure: str = ""
    chosen: list[int] = []
    budget: str | int | float | None = None
    tokens: Number = NAN  # of the text that was measured on, in files that know nothing of `spent`
    spent: dict[str, Number] = {}
    seconds: Number = NAN
    kl_base: Number = Field(NAN, validation_alias=AliasChoices("kl_base", "kl_all_linear"))
    path: ReplacementPath | None = None
    front: list[FrontPoint] = []
    front_context: int = 0
    front_dtype: str = "float32"

    @property
    def rows(self) -> list[list[float]]:
        """The scores with a row for each layer: of its heads, or of the layer (or group) alone."""
        return _rows(self.scores)

    @property
    def bounds(self) -> dict[int, tuple[float, float]]:
        """The lower and upper bound of units' scores, where they are known."""
        pairs = zip(chain(*_rows(self.low)), chain(*_rows(self.high)), strict=False)
        return {unit: pair for unit, pair in enumerate(pairs) if all(map(math.isfinite, pair))}

    @property
    def labels(self) -> list[str]:
        """The number of every layer, or of the layers in every group."""
        return [fmt.ranges(layers) for layers in self.units or [[layer] for layer in range(len(self.rows))]]

    @property
    def kept_share(self) -> float:
        """The share of all worth (scores above zero) that the chosen units keep."""
        worth = [max(score, 0.0) for score in chain(*self.rows)]
        return sum(worth[unit] for unit in self.chosen) / (sum(worth) or NAN)

    @property
    def effort(self) -> str:
        """Work of the selection: `4,096 tokens forward and 512 tokens of training, in 50 s`."""
        forward, training = (self.spent.get(f"{what}_tokens", NAN) for what in ("forward", "training"))
        counts = {"tokens of text": self.tokens, "tokens forward": forward, "tokens of training": training}
        tokens = " and ".join(f"{fmt.integer(count)} {what}" for what, count in counts.items() if count > 0)
        seconds = fmt.duration(self.seconds) if math.isfinite(self.seconds) else ""
        return ", in ".join(filter(None, (tokens, seconds)))


def _rows(table: Table) -> list[list[float]]:
    return [row if isinstance(row, list) else [row] for row in table]
