"""Units listed by hand, in order of importance."""

from typing import Any

from pydantic import model_validator

from subquad.errors import UserError
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.work import SelectionCost


@selector("fixed", text=False)
class Fixed(Selector):
    """The first units of a list, as many as the budget allows."""

    layers: list[int]
    """Indices of units, most important first."""

    @model_validator(mode="before")
    @classmethod
    def _has_layers(cls, options: Any) -> Any:
        layers = options.get("layers")
        if not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
            raise UserError(
                "selector 'fixed' needs the layers to keep, most important first: selector.options.layers=[4,10]"
            )
        return options

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        return SelectionCost("fixed")

    def choose(self, inputs: SelectorInputs) -> Ranking:
        units, order = inputs.units, self.layers
        if len({*order}) < len(order) or not {*order} <= {*range(len(units))}:
            raise UserError(f"selector.options.layers should be different units of 0 to {len(units) - 1}, not {order}")
        if inputs.min_count > len(order):
            raise UserError(
                f"the budget keeps {inputs.min_count} units, and selector.options.layers names {len(order)}"
            )
        return Ranking(units, lambda count: sorted(order[:count]), inputs.unit, report={"order": order})
