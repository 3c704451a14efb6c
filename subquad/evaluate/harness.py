"""Tasks of the lm-evaluation-harness, in process: its data, prompts and metrics, on any student or teacher.

Notable:
- lm-eval is an optional extra and slow to import, so it is imported here only when there is a task.
- A task is a name of lm-eval's, or a JSONL file of one's own (`data/questions.py`), which becomes a task of lm-eval's.
  Its YAML files are not taken by path: they may name code to run.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.errors import UserError
from subquad.evaluate.likelihood import evaluating
from subquad.utils.files import first_line
from subquad.utils.logging import quiet

BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean; lm-eval's 100,000 take minutes
TaskScores = dict[str, dict[str, float | None]]


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    batch: int = 4,
    fewshot: int | None = None,
    seed: int = 0,
    documents: Callable[[int], list[int]] | None = None,
) -> dict[str, TaskScores]:
    """Measure a causal language model on `tasks`: names of lm-eval's tasks, groups and tags, or JSONL files; or what
    `load_tasks` made of them, to load once for many models.

    `limit`: documents a task, the first ones; `documents`: those of these numbers instead, given how many there are;
    `batch`: rows at a time; `fewshot`: examples before each question, drawn by `seed`, instead of the task's own
    number. Returns {task: {metric: {"value", "stderr"}}}, `stderr` None where
    unknown; a group that has a score of its own stands for its members. Raises UserError as `load_tasks` does.
    """
    loaded = load_tasks(tasks, fewshot) if all(isinstance(task, str) for task in tasks) else list(tasks)
    if not loaded:
        return {}

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Run the tasks, on the documents asked for
    with evaluating(model), _quiet():
        document_numbers = None
        if documents is not None:
            members = TaskManager(include_defaults=False).load(loaded)["tasks"]
            document_numbers = {name: documents(len(task.eval_docs)) for name, task in members.items()}
        results = simple_evaluate(
            HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it gets a pad token where it has none
                backend="causal",
                batch_size=batch,
                softmax_dtype="float32",
            ),
            tasks=loaded,
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=fewshot,
            limit=limit if document_numbers is None else None,
            samples=document_numbers,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )

    # Scores by task; a group with a score of its own stands for its members
    members = {member for group in results.get("groups", {}) for member in results["group_subtasks"][group]}
    scores = {task: _scores(row) for task, row in results["results"].items() if task not in members}
    return {task: metrics for task, metrics in scores.items() if metrics}


def load_tasks(names: Sequence[str], fewshot: int | None = None) -> list[Any]:
    """Tasks and groups of lm-eval's with their data, which is downloaded where it is not here.

    Call it before long work: what can be wrong with a task shows here. Raises UserError without lm-eval, for an unknown
    name, a bad file, data that cannot be had, and tasks that run code or need more than text.
    """
    if not names:
        return []
    if find_spec("lm_eval") is None:
        install = "run pip install -e '.[eval]' in the checkout of Subquad"
        raise UserError(f"measuring the task '{names[0]}' needs lm-eval: {install}")
    from lm_eval.tasks import TaskManager

    from subquad.evaluate.question_task import question_task

    loaded: list[Any] = []
    with _quiet():
        for name in dict.fromkeys(names):
            # A file of questions
            if Path(name).suffix == ".jsonl":
                loaded.append(question_task(Path(name), fewshot or 0))
                continue

            # A task or a group of lm-eval's
            manager = _task_manager()
            if name not in manager.all_tasks:
                close = " or ".join(f"'{candidate}'" for candidate in get_close_matches(name, manager.all_tasks))
                raise UserError(
                    f"unknown task '{name}': {f'did you mean {close}? ' if close else ''}"
                    "(valid: a .jsonl file, or a name that `lm-eval ls tasks` lists)"
                )
            try:
                loaded_task = manager.load([name])
            except Exception as error:  # of whatever library its data or its code needs
                raise UserError(
                    f"the task '{name}' cannot be loaded ({first_line(error)}): check the network, or leave it out"
                ) from error

            # No task that runs code or needs images
            for task in loaded_task["tasks"].values():
                if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                    raise UserError(f"the task '{name}' runs code that models write, or needs more than text")
            group = loaded_task.get("groups", {}).get(name)
            loaded += loaded_task["tasks"].values() if group is None else [group]
        try:
            TaskManager(include_defaults=False).load(loaded)
        except ValueError as error:  # a task that stands in two of the groups
            raise UserError(f"the tasks {', '.join(names)} overlap ({first_line(error)}): leave one out") from error
    return loaded


def task_name(task: Any) -> str:
    """Name of a task or a group that `load_tasks` made."""
    return str(getattr(getattr(task, "config", None), "task", None) or getattr(task, "name", task))


@cache  # it reads thousands of files
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors alone, of the dozens of remarks that lm-eval and transformers make on the way."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)


def _scores(row: dict[str, Any]) -> TaskScores:
    """lm-eval's flat row ("acc,none": 0.5, "acc_stderr,none": "N/A", ...) by metric; a filter's name stays in it."""
    scores: TaskScores = {}
    for key, value in row.items():
        metric, comma, applied = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            stderr = row.get(f"{metric}_stderr,{applied}")
            scores[metric if applied == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, Real) else None,
            }
    return scores
