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
from subquad.select.units import Unit, Wish, kind_of, units_of
from subquad.select.work import Work

Train: TypeAlias = Callable[[BaseStudent, int, str], None]  # (student, tokens, name): as the recipe would, on logits


@dataclass
class SelectorInputs:
    """What a selector may look at. `text_BT`: rows that neither training nor the final measurement sees."""

    student: BaseStudent  # all-linear; aligned where the selector needs it
    source: Teacher
    text_BT: Tensor
    budget: Budget
    unit: Wish = "layer"
    corpus: Corpus | None = None  # the text to train on
    train: Train | None = None
    seed: int = 0
    work: Work = field(default_factory=Work)
    alternatives: Mapping[str, BaseStudent] = field(default_factory=dict)  # all-linear too, with other mixers, by name

    @property
    def units(self) -> list[Unit]:
        return units_of(self.student.plan.shapes, self.unit)

    def new_board(self) -> Supernet:
        """The plans over the student's mixers, and the alternatives'."""
        return Supernet(self.student, self.source.model, self.alternatives)

    @property
    def count(self) -> int:
        """How many units will be kept; where the budget leaves that open, half of them."""
        units = len(self.units)
        counted = self.budget.context is None and self.budget.word is None
        return self.budget.of(units, kind_of(self.unit)) if counted else units // 2

    @property
    def least(self) -> int:
        """How many units will be kept at least, as far as the budget says."""
        return 0 if self.budget.context is not None else self.count
