"""Units: sets of heads that keep attention together or not at all. A layer, a head, or a group of layers."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from subquad.errors import UserError
from subquad.plan import AttentionShape, every_head

Unit: TypeAlias = list[tuple[int, int]]  # heads, as (layer, head)
Wish: TypeAlias = str | int | list[list[int]]  # "layer", "head", layers in a group, or the groups themselves


def units_of(shapes: Sequence[AttentionShape], wish: Wish) -> list[Unit]:
    """The units of a model: its layers, its heads, groups of that many neighbouring layers, or of the layers listed.

    Raises UserError for what is none of these, and for groups that do not have every layer once.
    """
    layers = [[(layer, head) for head in range(shape.heads)] for layer, shape in enumerate(shapes)]
    if wish == "layer":
        return layers
    if wish == "head":
        return [[head] for head in every_head(shapes)]
    if isinstance(wish, int) and wish >= 1:
        groups = [[*range(first, min(first + wish, len(layers)))] for first in range(0, len(layers), wish)]
    elif isinstance(wish, list):
        groups = wish
        if sorted(layer for group in groups for layer in group) != [*range(len(layers))] or [] in groups:
            raise UserError(f"selector.unit should have each of the {len(layers)} layers in one group, not {wish}")
    else:
        raise UserError(f"selector.unit should be layer, head, a number of layers or lists of layers, not '{wish}'")
    return [[head for layer in group for head in layers[layer]] for group in groups]


def kind_of(wish: Wish) -> str:
    """What such a unit is called: layer, head or group."""
    return wish if isinstance(wish, str) else "group"


def heads_of(units: Sequence[Unit], chosen: Iterable[int]) -> Unit:
    """The heads of these units, by index."""
    return [head for index in chosen for head in units[index]]


def layers_in(unit: Unit) -> list[int]:
    """The layers that a unit has heads of."""
    return sorted({layer for layer, _ in unit})


def by_layer(values: Sequence[Any], units: Sequence[Unit]) -> list[Any]:
    """One value a unit as they stand in scores.json: of heads, a list for each layer."""
    if len(units) == len({*map(tuple, map(layers_in, units))}):
        return [*values]
    table: list[list[Any]] = [[] for _ in range(1 + max(layer for unit in units for layer, _ in unit))]
    for value, unit in zip(values, units, strict=True):
        table[unit[0][0]].append(value)
    return table


def uniform_layers(layers: int, count: int) -> list[int]:
    """`count` of `layers` layer indices, at the centres of `count` equal stretches."""
    return [int((index + 0.5) * layers / count) for index in range(count)]
