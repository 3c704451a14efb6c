"""Units listed by hand, in order of importance."""

from typing import Any

from pydantic import model_validator

from subquad.errors import UserError
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.units import units_of
from subquad.select.work import SelectionCost


@selector("fixed", text=False)
class Fixed(Selector):
    """The first units of a list, as many as the budget allows."""

    layers: list[int]
    """Indices of units, counted through all layers of the model, most important first."""

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
        named, all_units = self.layers, units_of(inputs.student.plan.shapes, inputs.unit)
        if len({*named}) < len(named) or not {*named} <= {*range(len(all_units))}:
            last = len(all_units) - 1
            raise UserError(f"selector.options.layers should be different units of 0 to {last}, not {named}")
        # Units that keep attention anyway are not counted
        units = inputs.units
        index_of = {head: index for index, unit in enumerate(units) for head in unit}
        order = [*dict.fromkeys(index_of[head] for unit in named for head in all_units[unit] if head in index_of)]
        if inputs.min_count > len(order):
            anyway = " beside those that keep attention anyway" if len(order) < len(named) else ""
            raise UserError(
                f"the budget keeps {inputs.min_count} units, and selector.options.layers names {len(order)}{anyway}"
            )
        return Ranking(units, lambda count: sorted(order[:count]), inputs.unit, report={"order": order})
