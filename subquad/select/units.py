"""Units: sets of heads that keep attention together or not at all. A layer, a head, or a group of layers."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from subquad.errors import UserError
from subquad.plan import AttentionShape, Plan, every_head

Unit: TypeAlias = list[tuple[int, int]]  # heads, as (layer, head)
UnitSpec: TypeAlias = str | int | list[list[int]]  # "layer", "head", layers per group, or the groups


def units_of(shapes: Sequence[AttentionShape], spec: UnitSpec) -> list[Unit]:
    """The units of a model: its layers, its heads, groups of `spec` neighbouring layers, or the listed groups.

    Raises UserError for an invalid `spec`, and for groups that do not contain every layer once.
    """
    layers = [[(layer, head) for head in range(shape.heads)] for layer, shape in enumerate(shapes)]
    if spec == "layer":
        return layers
    if spec == "head":
        return [[head] for head in every_head(shapes)]
    if isinstance(spec, int) and spec >= 1:
        groups = [[*range(start, min(start + spec, len(layers)))] for start in range(0, len(layers), spec)]
    elif isinstance(spec, list):
        groups = spec
        if sorted(layer for group in groups for layer in group) != [*range(len(layers))] or [] in groups:
            raise UserError(f"selector.unit should have each of the {len(layers)} layers in one group, not {spec}")
    else:
        raise UserError(f"selector.unit should be layer, head, a number of layers or lists of layers, not '{spec}'")
    return [[head for layer in group for head in layers[layer]] for group in groups]


def open_units(plan: Plan, spec: UnitSpec) -> list[Unit]:
    """The units of the heads to which an all-linear plan does not leave attention anyway.

    Raises UserError as `units_of` does.
    """
    attending = {*plan.attention_heads}
    units = [[head for head in unit if head not in attending] for unit in units_of(plan.shapes, spec)]
    return [unit for unit in units if unit]


def kind_of(spec: UnitSpec) -> str:
    """The kind of unit: layer, head or group."""
    return spec if isinstance(spec, str) else "group"


def heads_of(units: Sequence[Unit], chosen: Iterable[int]) -> Unit:
    """The heads of these units, by index."""
    return [head for index in chosen for head in units[index]]


def layers_in(unit: Unit) -> list[int]:
    """The layers of a unit's heads, ascending."""
    return sorted({layer for layer, _ in unit})


def by_layer(values: Sequence[Any], units: Sequence[Unit]) -> list[Any]:
    """One value per unit in the form of scores.json: for heads, a list per layer."""
    if len(units) == len({*map(tuple, map(layers_in, units))}):
        return [*values]
    table: list[list[Any]] = [[] for _ in range(1 + max(layer for unit in units for layer, _ in unit))]
    for value, unit in zip(values, units, strict=True):
        table[unit[0][0]].append(value)
    return table


def uniform_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layer indices, at the centres of `count` equal intervals."""
    return [int((index + 0.5) * layers / count) for index in range(count)]
