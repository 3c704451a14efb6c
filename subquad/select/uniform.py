"""Evenly spaced units: the baseline that measures nothing."""

from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.units import uniform_layers
from subquad.select.work import SelectionCost


@selector("uniform", text=False)
class Uniform(Selector):
    """Evenly spaced units."""

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        return SelectionCost("uniform")

    def choose(self, inputs: SelectorInputs) -> Ranking:
        units = inputs.units
        return Ranking(units, lambda count: uniform_layers(len(units), count), inputs.unit)
