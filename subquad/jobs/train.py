"""Training as a recipe says it: the stages of a scope, and short stages for a selector's candidates."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus
from subquad.distill.loop import run_stage
from subquad.distill.state import StageResult
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.jobs.conversion import Data
from subquad.jobs.run import Run
from subquad.model.base import BaseStudent
from subquad.model.tasks import TASKS
from subquad.pretrained.load import Teacher, load_pretrained
from subquad.recipes.stage import Stage
from subquad.select.inputs import Train


def align(run: Run, linear: Mapping[str, BaseStudent], source: Teacher, data: Data) -> list[StageResult]:
    """The all-linear stages, for the student of every mixer; what became of them for the first, the recipe's own."""
    first, *others = linear
    results = train_stages(run, linear[first], source, data, scope="all-linear")
    for name in others:
        if any(True for _ in linear[name].mixer_parameters()):  # a window has nothing to learn
            run.say(f"the same with {name}:")
            train_stages(run, linear[name], source, data, scope="all-linear", out=run.out / "alternatives" / name)
    return results


def train_stages(
    run: Run, student: BaseStudent, source: Teacher, data: Data, scope: str, out: Path | None = None
) -> list[StageResult]:
    """The stages of one scope, in order. `out`: where their log and checkpoints go; none: the run's folder."""
    if out is not None and run.main:
        out.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()
    results = []
    for index, stage in enumerate(run.recipe.stages):
        if stage.scope == scope:
            how = of_stage(run, index, source, data)
            with run.timed(stage.name):
                progress = run.console if run.main else None
                result = run_stage(
                    stage, student=student, out=out or run.out, progress=progress, resume=run.resume, **how
                )
            run.say(
                f"{stage.name}: {result.tokens:,} tokens at {result.tokens_per_second:.0f} tokens/s, "
                f"{result.share_of_bare_forward:.0%} of the teacher's bare forward pass"
            )
            results.append(result)
    return results


def of_stage(run: Run, index: int, source: Teacher, data: Data) -> dict[str, Any]:
    """What `run_stage` takes of a recipe's stage number `index` beside itself: its teacher, its text or images."""
    target, read = _logits_from(run, run.recipe.stages[index], source, data)
    return {
        "index": index,
        "teacher_model": source.model,
        "corpus": read,
        "logits_from": target,
        "seed": run.recipe.seed,
        "accelerator": run.accelerator,
    }


def _logits_from(run: Run, stage: Stage, source: Teacher, data: Data) -> tuple[Any, Data]:
    """What a stage's own teacher or its stored logits are, if it has such, and the text that these know."""
    recipe, device = run.recipe, str(run.accelerator.device)
    if stage.teacher is not None:
        other = load_pretrained(stage.teacher, task=recipe.task, dtype=recipe.dtype, device=device)
        if _answers(other) != _answers(source):
            what = "set of classes" if TASKS[source.task].of_images else "vocabulary"
            raise UserError(
                f"stage '{stage.name}' cannot learn from {other.name}: its {what} is not that of {source.name}"
            )
        return other.model, data
    if stage.teacher_cache is not None:
        assert isinstance(data, Corpus)  # as `checked_recipe` ensures
        cache = TeacherCache.open(
            Path(stage.teacher_cache),
            teacher_fingerprint=source.fingerprint,
            tokenizer_hash=tokenizer_hash(source.tokenizer),
        )
        if cache.sequence_length != stage.sequence_length:
            raise UserError(
                f"stage '{stage.name}' has sequences of {stage.sequence_length} tokens, and the logits in "
                f"{stage.teacher_cache} are of {cache.sequence_length}: set sequence_length to that"
            )
        return cache, data.first(cache.tokens)
    return None, data


def _answers(source: Teacher) -> Any:
    """What a teacher chooses among: tokens by their texts, or classes."""
    return source.model.config.id2label if TASKS[source.task].of_images else source.tokenizer.get_vocab()


def candidate_training(run: Run, source: Teacher, data: Data) -> Train | None:
    """How a selector trains a candidate: by the recipe's first stage on logits, with fewer tokens; None without one."""
    stages = enumerate(run.recipe.stages)
    found = next((one for one in stages if one[1].scope == "plan" and "logits" in one[1].weights), None)
    if found is None:
        return None
    index, stage = found
    how = of_stage(run, index, source, data)

    def train(student: BaseStudent, tokens: int, name: str) -> None:
        folder = run.out / "candidates" / name
        if run.main:
            folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        short = stage.model_copy(update={"tokens": tokens, "replaced": 1.0})
        run_stage(short, student=student, out=folder, resume=run.resume, **how)
        run.accelerator.wait_for_everyone()
        if run.main:
            shutil.rmtree(folder)

    return train
