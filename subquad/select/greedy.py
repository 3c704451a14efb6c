"""Distill-then-Replace: from the teacher, make the unit linear that a task misses least, again and again.

After alignment each candidate, the units replaced so far and one more, is scored on the task's validation documents,
and the best is taken, until it falls below the floor (1 - tolerance) x the teacher's score. M_opt is the last plan of
this path that holds the floor, M_best the one that scores highest, the later of equals.

A score that picks the best of many candidates is too good for it: the plans that are reported are scored once more on
test documents that no choice was made by.

Source: Distill-then-Replace (arXiv 2601.11667, algorithm 1); equals are parted by unit, the later first, since nothing
else is said.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from subquad.data.probes import PROBE_TASKS
from subquad.plan import Plan
from subquad.recipes.stage import Length
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet, without
from subquad.select.task import Score, TaskScore, task_score
from subquad.select.units import Unit, heads_of
from subquad.select.work import SelectionCost, Work
from subquad.utils.token_cost import TokenCost


@selector("greedy", aligned=True)
class Greedy(Selector):
    """Replaces what a task misses least, one unit after the other.

    With the budgets `opt` (as much as the tolerance allows) and `best` it stops at the floor; other budgets are points
    of the path.
    """

    task: str | Score = "dictionary"
    """A retrieval task, a task of lm-eval's, a JSONL file, or a Python function."""
    tolerance: float = 0.05
    """Share of the teacher's score that may be lost."""
    limit: Length = 500
    """Documents, or rows of a retrieval task, of each part, at most."""
    metric: str | None = None
    """Metric of a task of lm-eval's; none: the first known one (select/task.py)."""
    context: Length = 512
    """Tokens of a row of a retrieval task."""
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        task, units, most = self._task(inputs), len(inputs.units), self._most(inputs)
        steps = units if most is None else most
        candidates = sum(units - step for step in range(steps))
        return SelectionCost(
            f"greedy on {task.name}: at most {candidates} candidates for {steps} of {units} units, fewer where the "
            "floor is reached",
            TokenCost(forward_tokens=(4 + candidates) * self._document_tokens),
        )

    def choose(self, inputs: SelectorInputs) -> Ranking:
        units = inputs.units
        path = greedy_path(
            inputs.new_board(),
            units,
            self._task(inputs),
            inputs.source.tokenizer,
            inputs.work,
            tolerance=self.tolerance,
            most=self._most(inputs),
            document_tokens=self._document_tokens,
        )
        order = [*path.kept(len(units), len(path.steps)), *(step.unit for step in reversed(path.steps))]
        named = {name: path.kept(len(units), steps) for name, steps in (("best", path.best), ("opt", path.opt))}
        report = {"order": order, "path": path.as_dict()}
        return Ranking(units, lambda count: sorted(order[:count]), inputs.unit, named=named, report=report)

    def _task(self, inputs: SelectorInputs) -> TaskScore:
        return task_score(
            self.task,
            limit=self.limit,
            metric=self.metric,
            context=self.context,
            seed=self.seed,
            text_BT=inputs.text_BT,
        )

    def _most(self, inputs: SelectorInputs) -> int | None:
        """Units to replace; None: as many as the floor allows."""
        return None if inputs.budget.word else len(inputs.units) - inputs.least

    @property
    def _document_tokens(self) -> int:
        """Tokens of the validation documents together; 0 where they are not known."""
        return self.limit * self.context if self.task in PROBE_TASKS else 0


@dataclass
class GreedyStep:
    """One unit replaced: which, and what is scored since."""

    unit: int
    score: float


@dataclass
class GreedyPath:
    """The path from the teacher, and the two plans on it: numbers of steps."""

    task: str
    floor: float
    base: float
    steps: list[GreedyStep]
    best: int
    opt: int
    test: dict[str, float]  # of the teacher (base), M_best and M_opt

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def kept(self, units: int, steps: int) -> list[int]:
        """The units that still attend after so many steps."""
        gone = {step.unit for step in self.steps[:steps]}
        return [unit for unit in range(units) if unit not in gone]


def greedy_path(
    board: Supernet,
    units: Sequence[Unit],
    task: TaskScore,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
    *,
    tolerance: float = 0.05,
    most: int | None = None,
    document_tokens: int = 0,
) -> GreedyPath:
    """The path, to the floor or until `most` units are replaced (then whatever the floor says).

    `document_tokens`: of the validation documents together, for the cost, where they are known.
    """

    def plan_of(gone: Sequence[int]) -> Plan:
        return board.keeping(without(board.everything, heads_of(units, gone)))

    def scored(name: str, plans: Sequence[Plan], part: str = "validation") -> list[float]:
        def piece(index: int) -> list[float]:
            with board.following(plans[index]) as student:
                return [getattr(task, part)(student, tokenizer)]

        each = TokenCost(forward_tokens=document_tokens)
        return work.pieces(f"greedy {task.name}, {name}", len(plans), piece, each=each)[:, 0].tolist()

    last = len(units) if most is None else most
    base = scored("teacher", [plan_of([])])[0]
    floor = (1 - tolerance) * base
    gone: list[int] = []
    steps: list[GreedyStep] = []
    while len(gone) < last:
        left = [unit for unit in range(len(units)) if unit not in gone]
        scores = scored(f"step {len(gone)}", [plan_of([*gone, unit]) for unit in left])
        score, unit = max(zip(scores, left, strict=True))
        if most is None and score < floor:
            break
        gone.append(unit)
        steps.append(GreedyStep(unit, score))
    held = [0, *(number for number, step in enumerate(steps, 1) if step.score >= floor)]
    best = max(range(len(steps) + 1), key=lambda number: (steps[number - 1].score if number else base, number))
    tested = scored("test", [plan_of(gone[:count]) for count in (0, best, max(held))], "test")
    named = dict(zip(("base", "best", "opt"), tested, strict=True))
    return GreedyPath(task.name, floor, base, steps, best, max(held), named)
