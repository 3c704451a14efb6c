"""Training of a recipe: its stages, in order."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from subquad.data.packing import tokenizer_hash
from subquad.distill.loop import StageInputs, run_stage
from subquad.distill.state import StageResult
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.jobs.conversion import Conversion, Data
from subquad.model.base import BaseStudent
from subquad.model.teacher_check import longest_input
from subquad.pretrained.load import load_pretrained
from subquad.select.inputs import Train


def align(conversion: Conversion, linear_students: Mapping[str, BaseStudent]) -> list[StageResult]:
    """Trains the all-linear stages for the student of every mixer; returns the results of the recipe's main mixer."""
    run = conversion.run
    main_mixer, *alternatives = linear_students
    results = train_stages(conversion, linear_students[main_mixer], scope="all-linear")
    for name in alternatives:
        student = linear_students[name]
        if any(True for _ in student.mixer_parameters()):  # a window has nothing to learn
            run.say(f"the same stages with {name}:")
            train_stages(conversion, student, scope="all-linear", out=run.out / "alternatives" / name)
    return results


def train_stages(
    conversion: Conversion, student: BaseStudent, scope: str, out: Path | None = None
) -> list[StageResult]:
    """Trains the stages of one scope, in order. `out`: folder of their log and checkpoints, by default the run's."""
    run = conversion.run
    if out is not None and run.main:
        out.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()
    results = []
    for index, stage in enumerate(conversion.recipe.stages):
        if stage.scope == scope:
            inputs = stage_inputs(conversion, index)
            with run.timed(stage.name):
                progress = run.console if run.main else None
                result = run_stage(
                    stage, inputs, student=student, out=out or run.out, progress=progress, resume=run.resume
                )
            run.say(
                f"{stage.name}: {result.tokens:,} tokens at {result.tokens_per_second:.0f} tokens/s, "
                f"{result.share_of_bare_forward:.0%} of the teacher's bare forward pass"
            )
            results.append(result)
    return results


def stage_inputs(conversion: Conversion, index: int) -> StageInputs:
    """Inputs of the recipe's stage number `index`: its teacher or stored logits, and the data that they cover.

    Raises UserError for a teacher with another vocabulary, or stored logits of another length.
    """
    recipe, teacher = conversion.recipe, conversion.teacher
    stage, accelerator = recipe.stages[index], conversion.run.accelerator
    data: Data = conversion.data
    logits_from: PreTrainedModel | TeacherCache | None = None
    if stage.teacher is not None:
        device = str(accelerator.device)
        stage_teacher = load_pretrained(stage.teacher, task=recipe.task, dtype=recipe.dtype, device=device)
        if stage_teacher.answers() != teacher.answers():
            raise UserError(
                f"stage '{stage.name}' cannot learn from {stage_teacher.name}: its {teacher.kind.answers} is not that "
                f"of {teacher.name}"
            )
        if not teacher.kind.of_images:
            longest = longest_input(stage_teacher.model, stage.sequence_length)
            if longest < stage.sequence_length:
                raise UserError(
                    f"stage '{stage.name}' has sequences of {stage.sequence_length:,} tokens, and its teacher "
                    f"{stage_teacher.name} takes at most {longest:,}: set its sequence_length to that"
                )
        logits_from = stage_teacher.model
    elif stage.teacher_cache is not None:
        logits_from = TeacherCache.open(
            Path(stage.teacher_cache),
            teacher_fingerprint=teacher.fingerprint,
            tokenizer_hash=tokenizer_hash(teacher.tokenizer),
        )
        if logits_from.sequence_length != stage.sequence_length:
            raise UserError(
                f"stage '{stage.name}' has sequences of {stage.sequence_length} tokens, and the logits in "
                f"{stage.teacher_cache} are of {logits_from.sequence_length}: set sequence_length to that"
            )
        data = conversion.corpus.first(logits_from.tokens)
    return StageInputs(teacher.model, data, accelerator, index, recipe.seed, logits_from)


def candidate_training(conversion: Conversion) -> Train | None:
    """Training of a selector's candidates: the recipe's first stage on logits, with fewer tokens; None without one."""
    stages = conversion.recipe.stages
    index = next((i for i, stage in enumerate(stages) if stage.scope == "plan" and "logits" in stage.weights), None)
    if index is None:
        return None
    run, stage, inputs = conversion.run, stages[index], stage_inputs(conversion, index)

    def train(student: BaseStudent, tokens: int, name: str) -> None:
        folder = run.out / "candidates" / name
        if run.main:
            folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        short_stage = stage.model_copy(update={"tokens": tokens, "replaced": 1.0})
        run_stage(short_stage, inputs, student=student, out=folder, resume=run.resume)
        run.accelerator.wait_for_everyone()
        if run.main:
            shutil.rmtree(folder)

    return train
