"""What the claims share: a teacher, its text, students of it, and stages that are run on them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.runs import Result, Store
from subquad.attention import find_attention
from subquad.data.text import load_corpus
from subquad.distill.loop import make_accelerator, run_stage
from subquad.join import JoinStart
from subquad.lessons import Lessons
from subquad.plan import Plan
from subquad.stage import Stage
from subquad.student import Student
from subquad.teacher import Teacher, load_teacher

SMALL_TEACHER = "tests/assets/small-teacher"


class Bench:
    """A teacher, its text, and the runs; students of a small teacher learn from its own lessons, others from text."""

    def __init__(self, teacher: str, store: Store) -> None:
        self.store = store
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher: Teacher = load_teacher(teacher, device=self.device)
        tokenizer: Any = self.teacher.tokenizer
        self.corpus = load_corpus(None, tokenizer)
        small = self.teacher.model.config.vocab_size < 10_000
        self.lessons = Lessons(self.corpus, tokenizer) if small else self.corpus
        self.shapes = [site.shape for site in find_attention(self.teacher.model)]

    def student(self, plan: Plan, seed: int, join_start: JoinStart = "identity") -> Student:
        """A student with this plan, its mixers not yet calibrated."""
        torch.manual_seed(seed)
        return Student.from_teacher(self.teacher.model, plan, join_start=join_start)

    def calibrate(self, student: Student, length: int, seed: int) -> None:
        rows = self.corpus.batch(0, batch=1, sequence_length=length, seed=seed + 7)
        student.calibrate(rows.to(student.device))

    def train(self, student: Student, stages: Sequence[Stage], seed: int) -> list[Result]:
        """What became of each stage."""
        results = []
        with tempfile.TemporaryDirectory() as folder:
            accelerator = make_accelerator(Path(folder))
            for index, stage in enumerate(stages):
                result = run_stage(
                    stage,
                    index=index,
                    student=student,
                    teacher_model=self.teacher.model,
                    corpus=self.lessons,
                    seed=seed,
                    out=Path(folder),
                    accelerator=accelerator,
                )
                results.append({k: v for k, v in result.as_dict().items() if k != "final_parts"})
        return results
