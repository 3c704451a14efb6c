"""The inputs of a selector: the aligned student, its teacher, text to measure on, and the budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from subquad.data.text import Corpus
from subquad.model.base import BaseStudent
from subquad.pretrained.load import Teacher
from subquad.select.budget import Budget
from subquad.select.supernet import Supernet
from subquad.select.units import Unit, UnitSpec, kind_of, open_units
from subquad.select.work import SelectionWork

# (student, tokens, name): trains a candidate on logits, as the recipe's stage does
Train: TypeAlias = Callable[[BaseStudent, int, str], None]


@dataclass
class SelectorInputs:
    """Everything a selector may use. `text_BT`: rows used neither in training nor in the final evaluation."""

    student: BaseStudent  # all-linear but for layers that keep attention anyway; aligned if the selector needs it
    teacher: Teacher
    text_BT: Tensor
    budget: Budget
    unit: UnitSpec = "layer"
    corpus: Corpus | None = None  # the training text
    train: Train | None = None
    seed: int = 0
    work: SelectionWork = field(default_factory=SelectionWork)
    alternatives: Mapping[str, BaseStudent] = field(default_factory=dict)  # all-linear, by the name of their mixer

    @property
    def units(self) -> list[Unit]:
        return open_units(self.student.plan, self.unit)

    def supernet(self) -> Supernet:
        """All plans over the mixers of the student and of the alternatives."""
        return Supernet(self.student, self.teacher.model, self.alternatives)

    @property
    def count(self) -> int:
        """The number of units to keep; half of them if the budget is not a number of units."""
        units = len(self.units)
        counted = self.budget.context is None and self.budget.word is None
        return self.budget.count_of(units, kind_of(self.unit)) if counted else units // 2

    @property
    def min_count(self) -> int:
        """The least number of units to keep, as far as the budget states it."""
        return 0 if self.budget.context is not None else self.count
