"""The registry of selectors, and the checks of a recipe's choice among them.

A selector is a class whose fields are its options. `@selector(name)` registers it where it is written: importing
`subquad.select` imports every file of this folder, so a new file needs no entry elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from subquad.errors import UserError, nearest
from subquad.recipes.schema import Recipe, SelectorConfig
from subquad.recipes.stage import Section
from subquad.select.budget import Budget
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.units import UnitSpec
from subquad.select.work import SelectionCost


class Selector(Section, ABC):
    """Base of all selectors; a subclass declares its options as fields.

    `unit`: default unit, for recipes without one. `aligned`, `text`: whether it needs an aligned student, and text.
    """

    name: ClassVar[str]
    unit: ClassVar[UnitSpec]
    aligned: ClassVar[bool]
    text: ClassVar[bool]

    @abstractmethod
    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        """The cost of `choose`, known before any model runs. Raises UserError for inputs that `choose` cannot use."""

    @abstractmethod
    def choose(self, inputs: SelectorInputs) -> Ranking:
        """Measures the units and ranks them. `Ranking.report` goes into scores.json."""

    def run(self, inputs: SelectorInputs) -> Ranking:
        """Prints the cost, then chooses."""
        inputs.work.print_cost(self.cost(inputs))
        return self.choose(inputs)


SELECTORS: dict[str, type[Selector]] = {}
S = TypeVar("S", bound=type[Selector])


def selector(name: str, *, unit: UnitSpec = "layer", aligned: bool = False, text: bool = True) -> Callable[[S], S]:
    """Class decorator that sets these attributes of a `Selector` and registers it."""

    def register(cls: S) -> S:
        cls.name, cls.unit, cls.aligned, cls.text = name, unit, aligned, text
        SELECTORS[name] = cls
        return cls

    return register


def make_selector(name: str, options: Mapping[str, Any]) -> Selector:
    """A selector with its options checked and defaults filled in.

    Raises UserError, with the nearest valid name, for an unknown selector or option, and for a value of a wrong kind.
    """
    if name not in SELECTORS:
        raise UserError(f"unknown selector '{name}': {nearest(name, SELECTORS)}")
    fields = SELECTORS[name].model_fields
    for key in options:
        if key not in fields:
            valid = nearest(key, fields) if fields else "it has none"
            raise UserError(f"selector '{name}' has no option '{key}': {valid}")
    try:
        return SELECTORS[name](**options)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"selector '{name}', option '{problem['loc'][0]}': {problem['msg'].lower()}") from None


def check_selector(settings: SelectorConfig) -> None:
    """Raises UserError for an unknown selector, a wrong option, or a budget not meant for the selector."""
    budget = Budget.parse(settings.budget)
    make_selector(settings.by, settings.options)
    if budget.word is not None and settings.by != "greedy":
        raise UserError(
            f"the budget '{budget.word}' is a plan that only the selector greedy finds: give selector '{settings.by}' "
            "a number of units, a share of them, or bytes (64MiB@32k)"
        )


def check_alternatives(recipe: Recipe) -> None:
    """Raises UserError for alternative mixers where the selector cannot choose among them."""
    mixer, config = recipe.mixer, recipe.selector
    names = [mixer.name, *(alternative.name for alternative in mixer.alternatives)]
    unit = SELECTORS[config.by].unit if config.unit is None else config.unit
    if len(names) == 1:
        return
    if len({*names}) < len(names):
        raise UserError(f"mixer.alternatives should be other mixers than '{mixer.name}', each once: not {names[1:]}")
    if config.by != "kl" or config.options.get("retrain_tokens") or unit == "head" or mixer.join != "split":
        raise UserError(
            "mixer.alternatives are chosen by the selector kl without retrain_tokens, for layers or groups of them, "
            "with the split join: change the selector, or leave them out"
        )
    if Budget.parse(config.budget).speedup is not None:
        raise UserError("a budget of decoding speed knows one mixer: give bytes, or leave out mixer.alternatives")
