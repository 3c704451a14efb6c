"""Shared parts of the claims: command line, teacher, text, students, and the stages that train them."""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.claims.runs import Result, Store
from benchmarks.common import command_of, facts
from subquad.data.batch import TokenSource
from subquad.data.curriculum import Lessons
from subquad.data.probes import Probe, make_probe
from subquad.data.text import load_corpus
from subquad.distill.loop import StageInputs, run_stage
from subquad.evaluate.retrieval import answers, usable
from subquad.jobs.run import make_accelerator
from subquad.model.base import BaseStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.model.tasks import TEXT
from subquad.plan import JoinStart, Plan
from subquad.pretrained.load import Teacher, load_pretrained
from subquad.recipes.stage import Stage
from subquad.select.ablation import Kind
from subquad.utils.files import first_line, write_json

SMALL_TEACHER = "tests/assets/small-teacher"


class Base:
    """A teacher, its students, what these learn from, and the runs."""

    lessons: TokenSource
    sources: list[dict[str, str]]  # name and hash of what these were made from

    def __init__(self, teacher: str, store: Store, task: str = TEXT) -> None:
        self.store = store
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher: Teacher = load_pretrained(teacher, task=task, device=self.device)
        self.shapes = shapes_of(self.teacher.model)

    def train(self, student: BaseStudent, stages: Sequence[Stage], seed: int) -> list[Result]:
        """Results of the stages."""
        results = []
        with tempfile.TemporaryDirectory() as folder:
            accelerator = make_accelerator(Path(folder))
            for index, stage in enumerate(stages):
                inputs = StageInputs(self.teacher.model, self.lessons, accelerator, index, seed)
                result = run_stage(stage, inputs, student=student, out=Path(folder))
                results.append({k: v for k, v in result.as_dict().items() if k != "final_parts"})
        return results


class Bench(Base):
    """A language model and its text; students of a small teacher learn from its own lessons, others from text."""

    def __init__(self, teacher: str, store: Store) -> None:
        super().__init__(teacher, store)
        tokenizer: Any = self.teacher.tokenizer
        self.corpus = load_corpus(None, tokenizer)
        self.sources = self.corpus.sources
        small = self.teacher.model.config.vocab_size < 10_000
        self.lessons = Lessons(self.corpus, tokenizer) if small else self.corpus

    def probe(self, task: str, context: int, rows: int, seed: int, text_BT: torch.Tensor) -> Probe:
        return make_probe(task, self.teacher.tokenizer, context, rows, seed=seed, haystack_ids=text_BT)

    def student(self, plan: Plan, seed: int, join_start: JoinStart = "identity") -> Student:
        """A student with this plan, its mixers not yet calibrated."""
        torch.manual_seed(seed)
        return Student.from_teacher(self.teacher.model, plan, join_start=join_start)

    def calibrate(self, student: Student, length: int, seed: int) -> None:
        rows = self.corpus.batch(0, batch=1, sequence_length=length, seed=seed + 7)
        student.calibrate(rows.to(student.device))


class Coverage:
    """Share of a teacher's retrieval that a student keeps, by task and in the mean.

    By accuracy, the share of the teacher's (Retrieval-Aware Distillation's measure); by log-probability, the nats that
    the student loses of it per answer token, for a teacher that fails all tasks. Those it fails are left out.
    """

    def __init__(self, teacher: PreTrainedModel, probes: Mapping[str, Probe], by: Kind | None = None) -> None:
        theirs = {task: answers(teacher, probe) for task, probe in probes.items()}

        def used(by: Kind) -> dict[str, Probe]:
            return {t: probe for t, probe in probes.items() if usable(teacher, probe, by, answered=theirs[t]).usable}

        self.by: Kind = by or ("accuracy" if used("accuracy") else "logprob")
        self.probes = used(self.by)
        self.theirs = {task: theirs[task].score()[self.by] for task in self.probes}

    def of(self, model: PreTrainedModel, **how: Any) -> dict[str, float]:
        """`how`: keyword arguments of `answers`."""
        found = {}
        for task, probe in self.probes.items():
            mine, theirs = answers(model, probe, **how).score()[self.by], self.theirs[task]
            found[task] = mine / theirs if self.by == "accuracy" else theirs - mine
        return found | {"mean": statistics.fmean(found.values())}


def parse(
    argv: Sequence[str] | None,
    module: str,
    about: str,
    parts: Sequence[str],
    plot: str,
    teacher: str = SMALL_TEACHER,
    data: str | None = None,
) -> argparse.Namespace:
    """Parses the command line of a claim; `plot`: subject of its picture; `data`: its set of images, if it has one."""
    name = module.rpartition(".")[2].replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, little of everything, no tuning: minutes")
    what = "a folder, or default: SmolLM2-135M-Instruct" if data is None else "a folder"
    parser.add_argument("--teacher", default=teacher, help=what)
    if data is not None:
        parser.add_argument("--data", default=data, metavar="SOURCE", help="a set of labelled images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--known", type=written, metavar="FILE", help="numbers of an earlier run, not to be run again")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"draw {plot}")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--work", type=Path, default=Path(f"runs/claims-{name}"), help="folder of the finished runs")
    arguments = parser.parse_args(argv)
    arguments.command = command_of(module, argv)
    arguments.parts = [part for part in parts if part in arguments.parts]
    return arguments


def written(file: str) -> Any:
    """The numbers that an earlier run wrote."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file} cannot be read ({first_line(error)})") from error


def run_parts(
    bench: Any,
    arguments: argparse.Namespace,
    more: Mapping[str, Any],
    print_report: Callable[[Mapping[str, Any], Console], None],
    draw: Callable[[Mapping[str, Any], Path], None],
    drawn: str,
) -> None:
    """Runs what is not yet done, prints, and writes what was asked for; `drawn`: the part that the picture needs."""
    if arguments.known:
        bench.store.adopt(arguments.known)
    report = facts(arguments.command, asdict(bench.setup), torch.device(bench.device))
    report |= {"teacher_name": bench.teacher.name, "sources": bench.sources, **more}
    for part in arguments.parts:
        report[part] = getattr(bench, part)()
    print_report(report, bench.store.console)
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot and drawn in report:
        draw(report, arguments.plot)
