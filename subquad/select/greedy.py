"""Distill-then-Replace: starting from the teacher, replace the unit that hurts a task least, again and again.

After alignment, each candidate (the units replaced so far and one more) is scored on the task's validation documents.
The best one is taken, until it falls below the floor, (1 - tolerance) x the teacher's score. M_opt is the last plan of
this path at or above the floor; M_best is the plan with the highest score, the later one of equals.

The best of many candidates has an optimistic score, so the reported plans are scored once more on test documents that
took part in no choice.

Source: Distill-then-Replace (arXiv 2601.11667, algorithm 1). Ties, which it does not specify, go to the later unit.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from subquad.data.probes import PROBE_TASKS
from subquad.plan import Plan
from subquad.recipes.stage import Length, RowLength
from subquad.results.scores import ReplacementPath, ReplacementStep
from subquad.select.inputs import SelectorInputs
from subquad.select.ranking import Ranking
from subquad.select.registry import Selector, selector
from subquad.select.supernet import Supernet, without
from subquad.select.task import Part, Score, TaskScore, task_score
from subquad.select.units import Unit, heads_of
from subquad.select.work import SelectionCost, SelectionWork
from subquad.utils.token_cost import TokenCost


@selector("greedy", aligned=True)
class Greedy(Selector):
    """Units ranked by how late greedy replacement reaches them, by the score on one task.

    With the budgets `opt` (as many replaced as the tolerance allows) and `best`, the path stops at the floor. Other
    budgets are points on the path.
    """

    task: str | Score = "dictionary"
    """A retrieval task, an lm-eval task, a JSONL file, or a Python function."""
    tolerance: float = 0.05
    """Share of the teacher's score that may be lost."""
    limit: Length = 500
    """Documents, or rows of a retrieval task, in each part, at most."""
    metric: str | None = None
    """Metric of an lm-eval task; None: its first known one (select/task.py)."""
    context: RowLength = 512
    """Tokens in each row of a retrieval task."""
    seed: int = 0

    def cost(self, inputs: SelectorInputs) -> SelectionCost:
        task, units, max_steps = self._task(inputs), len(inputs.units), self._max_steps(inputs)
        steps = units if max_steps is None else max_steps
        candidates = sum(units - step for step in range(steps))
        return SelectionCost(
            f"greedy on {task.name}: at most {candidates} candidates for {steps} of {units} units, fewer where the "
            "floor is reached",
            TokenCost(forward_tokens=(4 + candidates) * self._document_tokens),
        )

    def choose(self, inputs: SelectorInputs) -> Ranking:
        units = inputs.units
        path = greedy_path(
            inputs.supernet(),
            units,
            self._task(inputs),
            inputs.teacher.tokenizer,
            inputs.work,
            tolerance=self.tolerance,
            max_steps=self._max_steps(inputs),
            document_tokens=self._document_tokens,
        )
        order = [*path.remaining(len(units), len(path.steps)), *(step.unit for step in reversed(path.steps))]
        named = {"best": path.remaining(len(units), path.best), "opt": path.remaining(len(units), path.opt)}
        report = {"order": order, "path": path.model_dump()}
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

    def _max_steps(self, inputs: SelectorInputs) -> int | None:
        """The number of units to replace; None: as many as the floor allows."""
        return None if inputs.budget.word else len(inputs.units) - inputs.min_count

    @property
    def _document_tokens(self) -> int:
        """Tokens of all validation documents; 0 if unknown."""
        return self.limit * self.context if self.task in PROBE_TASKS else 0


def greedy_path(
    supernet: Supernet,
    units: Sequence[Unit],
    task: TaskScore,
    tokenizer: PreTrainedTokenizerBase,
    work: SelectionWork,
    *,
    tolerance: float = 0.05,
    max_steps: int | None = None,
    document_tokens: int = 0,
) -> ReplacementPath:
    """The path to the floor, or until `max_steps` units are replaced, whatever the floor.

    `document_tokens`: tokens of all validation documents, for the cost; 0 if unknown.
    """

    def plan_without(indices: Sequence[int]) -> Plan:
        return supernet.plan_with(without(supernet.all_heads, heads_of(units, indices)))

    def scores_of(name: str, plans: Sequence[Plan], part: Part = "validation") -> list[float]:
        def measure(index: int) -> list[float]:
            with supernet.activate(plans[index]) as student:
                return [task.score(student, tokenizer, part)]

        item_cost = TokenCost(forward_tokens=document_tokens)
        return work.map(f"greedy {task.name}, {name}", len(plans), measure, item_cost=item_cost)[:, 0].tolist()

    # Replace units one by one.
    base = scores_of("teacher", [plan_without([])])[0]
    floor = (1 - tolerance) * base
    replaced: list[int] = []
    steps: list[ReplacementStep] = []
    while len(replaced) < (len(units) if max_steps is None else max_steps):
        attending = [unit for unit in range(len(units)) if unit not in replaced]
        scores = scores_of(f"step {len(replaced)}", [plan_without([*replaced, unit]) for unit in attending])
        score, unit = max(zip(scores, attending, strict=True))
        if max_steps is None and score < floor:
            break
        replaced.append(unit)
        steps.append(ReplacementStep(unit=unit, score=score))

    # Choose the two plans, and score them on test documents.
    path_scores = [base, *(step.score for step in steps)]
    best = max(range(len(path_scores)), key=lambda number: (path_scores[number], number))
    opt = max([0, *(number for number, step in enumerate(steps, 1) if step.score >= floor)])
    test_scores = scores_of("test", [plan_without(replaced[:count]) for count in (0, best, opt)], "test")
    test = dict(zip(("base", "best", "opt"), test_scores, strict=True))
    return ReplacementPath(task=task.name, floor=floor, base=base, steps=steps, best=best, opt=opt, test=test)
