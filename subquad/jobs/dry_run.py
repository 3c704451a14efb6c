"""Estimate of a conversion before it runs: weights, plan, training, time, memory and disk.

Notable:
- Nothing of a run is written: the students and their temporary folder are deleted. Only the caches that every command
  fills are written (the packed text, a teacher converted from GGUF).
- Time and activations are extrapolated from a few real steps of every stage on few tokens (distill/estimate.py), which
  take about `SECONDS` in total; all other bytes are computed.
- If the plan is not given, the estimate is for an evenly spaced plan of the budget's size instead of selecting one.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from subquad.distill.checkpoint import KEEP
from subquad.distill.estimate import StageEstimate, estimate_stage, weights_of
from subquad.evaluate.suite import check_heldout, evaluation_cost
from subquad.jobs.baselines import baseline_plans
from subquad.jobs.conversion import Conversion, checked_recipe
from subquad.jobs.select import selection_cost, teacher_speed
from subquad.jobs.train import stage_inputs
from subquad.model.base import BaseStudent
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage
from subquad.report import print_plan
from subquad.report.console import make_table
from subquad.select import SELECTORS, Budget, Ranking, choose_plan, open_units, uniform_layers
from subquad.utils import format as fmt
from subquad.utils.token_cost import TRAINING

SECONDS = 10.0  # approximate time for trial steps of all stages
PASSES = 3  # over the tokens of a stage's trial


@dataclass(frozen=True)
class StagePreview:
    """Estimate of a stage on each device; `students`: number of students that it trains, one after another."""

    stage: Stage
    students: int
    probe: StageEstimate
    frozen_bytes: int  # weights of the teacher, and of the stage's own teacher
    student_bytes: int  # weights that the students do not share with a teacher

    @property
    def seconds(self) -> float:
        """Training time of all students."""
        return self.students * self.probe.seconds(self.stage, self.stage.steps)

    @property
    def tokens_per_second(self) -> float:
        """Training speed of all processes together."""
        return self.students * self.stage.steps * self.stage.batch * self.stage.sequence_length / self.seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on a device by purpose."""
        return {
            "teacher": self.frozen_bytes,
            "student's own": self.student_bytes,
            "gradients": self.probe.trained_bytes,
            "AdamW": 2 * self.probe.trained_bytes,
            "activations": self.probe.activation_bytes,
        }

    @property
    def finished_bytes(self) -> int:
        """Bytes that the stage leaves on disk: the weights that it trained."""
        return self.students * self.probe.trained_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Largest size of its checkpoints (weights and AdamW's moments), including one that is being written."""
        count = min(KEEP + 1, (self.stage.steps - 1) // self.stage.checkpoint_every)
        return 3 * count * self.probe.trained_bytes


@dataclass
class Preview:
    """Estimate of a conversion."""

    teacher_weights: int
    student_weights: int
    mixer_weights: int  # of the student's weights, those that the teacher lacks
    plan: Plan  # the given plan, or an evenly spaced one of the budget's size
    model_bytes: int
    stages: list[StagePreview] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by part

    @property
    def disk_bytes(self) -> int:
        """Disk bytes of a finished run: the model and the weights that each stage trained."""
        return self.model_bytes + sum(stage.finished_bytes for stage in self.stages)

    @property
    def most_disk_bytes(self) -> int:
        """Largest disk bytes during the run, with the checkpoints of one stage."""
        return self.disk_bytes + max((stage.checkpoint_bytes for stage in self.stages), default=0)


def dry_run(
    teacher: str = "default",
    recipe: Recipe | str | Path = "quick",
    out: str | Path = "runs/quick",
    *,
    plan: str | Path | None = None,
    data: list[str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Preview:
    """Prints and returns an estimate of `convert` with these arguments. Writes nothing to `out`.

    Raises UserError for everything that `convert` would reject, except for the contents of `out`.
    """
    recipe = checked_recipe(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    load_options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    with (
        tempfile.TemporaryDirectory() as folder,
        Conversion.open(recipe, Path(folder) / "run", **load_options) as conversion,
    ):
        conversion.run.say(f"teacher: {conversion.teacher.name}; {conversion.data.amount}")
        check_heldout(conversion.recipe.evaluate, conversion.teacher, conversion.data)  # `convert` needs it at the end
        preview = _preview(conversion, given_plan)
        _print_preview(conversion, preview, Path(out))
    return preview


def _preview(conversion: Conversion, given_plan: Plan | None) -> Preview:
    """Estimate of the whole conversion, by trial steps on its own students."""
    # The steps before selection, as they have just run
    recipe, run = conversion.recipe, conversion.run
    linear_students, speed = conversion.all_linear_students(given_plan), teacher_speed(conversion)
    seconds = {part: run.seconds[part] for part in ("load", "data", "calibrate")}

    # The plan: given, or evenly spaced and of the budget's size
    if given_plan is None:
        run.say(f"plan: {recipe.selector.by} will choose it, under a budget of {recipe.selector.budget}")
        cost = selection_cost(conversion, linear_students)
        run.say("what follows is for a plan of the budget's size, evenly spaced:\n")
        seconds["select"] = cost.seconds(speed)
    plan = given_plan or _stand_in(linear_students[recipe.mixer.name], recipe)
    student = conversion.new_student(plan, mixers_from=linear_students.values())
    conversion.untie(student)
    preview = Preview(
        teacher_weights=_count(conversion.teacher.model),
        student_weights=_count(student),
        mixer_weights=sum(parameter.numel() for _, parameter in student.mixer_parameters()),
        plan=plan,
        model_bytes=sum(weights_of(student).values()),
        seconds=seconds,
    )

    # Training: trial steps of every stage
    for index, stage in enumerate(recipe.stages):
        preview.stages.append(_try_stage(conversion, index, linear_students, student, speed))
        seconds[stage.name] = preview.stages[-1].seconds

    # Evaluation: the teacher, the student and its baselines
    calibration_seconds = 2 * seconds["calibrate"] / len(linear_students)
    cost = evaluation_cost(recipe.evaluate, 2 + len(baseline_plans(recipe, plan)), conversion.data)
    seconds["evaluate"] = cost.seconds(speed) + calibration_seconds
    return preview


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _stand_in(linear_student: BaseStudent, recipe: Recipe) -> Plan:
    """Evenly spaced plan of the budget's size, or with half of the units if only selecting determines the size."""
    settings, budget = recipe.selector, Budget.parse(recipe.selector.budget)
    if budget.word is not None or budget.speedup is not None:
        budget = Budget.parse("50%")
    unit = SELECTORS[settings.by].unit if settings.unit is None else settings.unit
    units = open_units(linear_student.plan, unit)
    ranking = Ranking(units, lambda count: uniform_layers(len(units), count), unit)
    return choose_plan(linear_student, budget, ranking, recipe.mixer.join)[0]


def _try_stage(
    conversion: Conversion, index: int, linear_students: Mapping[str, BaseStudent], student: BaseStudent, speed: float
) -> StagePreview:
    """Trial of one stage on the student of the plan, or on the first of the all-linear students."""
    stages = conversion.recipe.stages
    stage, inputs = stages[index], stage_inputs(conversion, index)
    main_student, *alternatives = linear_students.values()
    trial_student, students = student, 1
    if stage.scope == "all-linear":
        trial_student = main_student
        students += sum(any(True for _ in alternative.mixer_parameters()) for alternative in alternatives)

    tokens = round(SECONDS / len(stages) * speed / PASSES / TRAINING)
    probe = estimate_stage(stage, inputs, student=trial_student, tokens=tokens)

    # Weights that teacher and student share count once.
    target = inputs.logits_from
    teacher_weights = weights_of(inputs.teacher, *([target] if isinstance(target, PreTrainedModel) else []))
    idle_weights = weights_of(*(model for model in linear_students.values() if model is not trial_student))
    weights = {**idle_weights, **probe.weights}
    student_bytes = sum(size for place, size in weights.items() if place not in teacher_weights)
    return StagePreview(stage, students, probe, sum(teacher_weights.values()), student_bytes)


def _print_preview(conversion: Conversion, preview: Preview, out: Path) -> None:
    """Prints plan, weights, stages, memory, time and disk."""
    recipe, run = conversion.recipe, conversion.run
    print_plan(preview.plan, run.console, recipe.dtype)
    conversion.warn_of(preview.plan)
    run.say(
        f"\nteacher: {preview.teacher_weights:,} weights; student: {preview.student_weights:,}, of which the mixers' "
        f"own are {preview.mixer_weights:,}"
    )
    for table in (_stages(preview), _memory(preview), _time(preview)):
        run.say("")
        run.console.print(table)
    run.say("time and activations are those of a real step on the tokens tried, in proportion; the rest is arithmetic")
    if recipe.evaluate.tasks:
        run.say(f"not counted: the tasks {', '.join(recipe.evaluate.tasks)}")
    free = _free_bytes(out)
    run.say(
        f"\ndisk: {fmt.size(preview.disk_bytes)} in {out} when done, at most {fmt.size(preview.most_disk_bytes)} on "
        f"the way; {fmt.size(free)} are free"
    )
    if free < preview.most_disk_bytes:
        run.say(f"that is too little: free some space, or give another --out than {out}")
    run.say("nothing was written: this was a dry run")


def _free_bytes(out: Path) -> int:
    """Free bytes on the disk that will hold the folder `out`."""
    existing_folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing_folder).free


def _stages(preview: Preview) -> Table:
    """Table of the stages' settings, and the weights that they train."""
    table = make_table("Stages", ["", "objective", "tokens", "steps", "length", "batch", "weights"])
    for row in preview.stages:
        stage, times = row.stage, f" × {row.students}" if row.students > 1 else ""
        table.add_row(
            Text(stage.name),
            fmt.objective(stage.objective),
            fmt.integer(stage.tokens) + times,
            fmt.integer(stage.steps) + times,
            fmt.integer(stage.sequence_length),
            fmt.integer(stage.batch),
            fmt.integer(row.probe.trained),
        )
    return table


def _memory(preview: Preview) -> Table:
    """Table of the bytes on a device while each stage trains."""
    table = make_table("Memory of each device", ["", *(preview.stages[0].memory if preview.stages else []), "together"])
    for row in preview.stages:
        sizes = [*row.memory.values(), sum(row.memory.values())]
        table.add_row(Text(row.stage.name), *(fmt.size(size) for size in sizes))
    return table


def _time(preview: Preview) -> Table:
    """Table of the time of all parts, and of the speed and the trial tokens of each stage."""
    table = make_table("Time", ["", "about", "tokens/s", "tried on"])
    stages = {row.stage.name: row for row in preview.stages}
    for part, seconds in preview.seconds.items():
        stage = stages.get(part)
        trial = [fmt.integer(stage.tokens_per_second), f"{stage.probe.tokens:,} tokens"] if stage else []
        table.add_row(Text(part), fmt.duration(seconds), *trial)
    table.add_row("total", fmt.duration(sum(preview.seconds.values())), style="bold")
    return table
