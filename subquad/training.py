"""Training as a recipe says it: the stages of a scope, and short stages for a selector's candidates."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from subquad.data.packing import tokenizer_hash
from subquad.data.text import Corpus
from subquad.distill.ledger import StageResult
from subquad.distill.loop import run_stage
from subquad.distill.teacher_cache import TeacherCache
from subquad.errors import UserError
from subquad.run import Run
from subquad.select.kl import Train
from subquad.stage import Stage
from subquad.student import Student
from subquad.teacher import Teacher, load_teacher


def align(run: Run, linear: Mapping[str, Student], source: Teacher, corpus: Corpus) -> list[StageResult]:
    """The all-linear stages, for the student of every mixer; what became of them for the first, the recipe's own."""
    first, *others = linear
    results = train_stages(run, linear[first], source, corpus, scope="all-linear")
    for name in others:
        if any(True for _ in linear[name].mixer_parameters()):  # a window has nothing to learn
            run.say(f"the same with {name}:")
            train_stages(run, linear[name], source, corpus, scope="all-linear", out=run.out / "alternatives" / name)
    return results


def train_stages(
    run: Run, student: Student, source: Teacher, corpus: Corpus, scope: str, out: Path | None = None
) -> list[StageResult]:
    """The stages of one scope, in order. `out`: where their log and checkpoints go; none: the run's folder."""
    if out is not None and run.main:
        out.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()
    results = []
    for index, stage in enumerate(run.recipe.stages):
        if stage.scope == scope:
            train = _runner(run, stage, index, source, corpus)
            with run.timed(stage.name):
                progress = run.console if run.main else None
                result = train(stage, student=student, out=out or run.out, progress=progress)
            run.say(
                f"{stage.name}: {result.tokens:,} tokens at {result.tokens_per_second:.0f} tokens/s, "
                f"{result.share_of_bare_forward:.0%} of the teacher's bare forward pass"
            )
            results.append(result)
    return results


def _runner(run: Run, stage: Stage, index: int, source: Teacher, corpus: Corpus) -> Callable[..., StageResult]:
    """`run_stage` with what the recipe says of a stage: its place, its teacher, its text."""
    target, text = logits_from(run, stage, source, corpus)
    return partial(
        run_stage,
        index=index,
        teacher_model=source.model,
        corpus=text,
        logits_from=target,
        seed=run.recipe.seed,
        accelerator=run.accelerator,
        resume=run.resume,
    )


def logits_from(run: Run, stage: Stage, source: Teacher, corpus: Corpus) -> tuple[Any, Corpus]:
    """What a stage's own teacher or its stored logits are, if it has such, and the text that these know."""
    if stage.teacher is not None:
        other = load_teacher(stage.teacher, dtype=run.recipe.dtype, device=str(run.accelerator.device))
        if other.tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise UserError(
                f"stage '{stage.name}' cannot learn from {other.name}: its vocabulary is not that of {source.name}"
            )
        return other.model, corpus
    if stage.teacher_cache is not None:
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
        return cache, corpus.first(cache.tokens)
    return None, corpus


def candidate_training(run: Run, source: Teacher, corpus: Corpus) -> Train | None:
    """How a selector trains a candidate: by the recipe's first stage on logits, with fewer tokens; None without one."""
    stages = enumerate(run.recipe.stages)
    found = next((one for one in stages if one[1].scope == "plan" and "logits" in one[1].weights), None)
    if found is None:
        return None
    index, stage = found
    run_short = _runner(run, stage, index, source, corpus)

    def train(student: Student, tokens: int, name: str) -> None:
        folder = run.out / "candidates" / name
        if run.main:
            folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        short = stage.model_copy(update={"tokens": tokens, "replaced": 1.0})
        run_short(short, student=student, out=folder)
        run.accelerator.wait_for_everyone()
        if run.main:
            shutil.rmtree(folder)

    return train
