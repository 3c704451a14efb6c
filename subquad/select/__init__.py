"""Selectors: measure units, and propose a plan under a budget.

A unit is a set of heads that keep attention together or not at all: a layer, a head, or a group of layers. A selector
measures the worth of each unit, or an order of them; the budget limits how many keep attention. So one set of scores
serves any budget. CONTRIBUTING.md explains how to add a selector.
"""

from importlib import import_module
from pkgutil import iter_modules

from subquad.select.budget import Budget, kept_layers
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking, choose_plan, pareto
from subquad.select.registry import (
    SELECTORS,
    Selector,
    check_alternatives,
    check_selector,
    make_selector,
    selector,
)
from subquad.select.retrieval_heads import RetrievalScores, retrieval_scores
from subquad.select.supernet import Supernet
from subquad.select.units import Unit, open_units, uniform_layers, units_of
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost

__all__ = [
    "SELECTORS",
    "TokenCost",
    "Supernet",
    "Budget",
    "Ranking",
    "SelectionCost",
    "SelectorInputs",
    "RetrievalScores",
    "Selector",
    "Unit",
    "SelectionWork",
    "check_alternatives",
    "check_selector",
    "make_selector",
    "selector",
    "choose_plan",
    "kept_layers",
    "open_units",
    "pareto",
    "retrieval_scores",
    "uniform_layers",
    "units_of",
]

for module in iter_modules(__path__):  # each file registers its selectors
    import_module(f"{__name__}.{module.name}")
