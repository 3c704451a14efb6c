"""What a conversion would take, before it is run: weights, plan, training, time, memory and disk.

Notable:
- Nothing of a run is written: the students are thrown away, and so is the folder that they were made in. Only the
  caches that every command fills are (the packed text, a teacher converted from GGUF).
- Time and activations are extrapolated from a few real steps of every stage on few tokens (distill/probe.py), which
  together take about `SECONDS`; all other bytes are arithmetic.
- Where the selector would have to work first, all this is for a plan of the budget's size, evenly spaced.
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
from subquad.jobs.baselines import even_plan
from subquad.jobs.conversion import Conversion, checked_recipe
from subquad.jobs.select import selection_cost, teacher_speed
from subquad.jobs.train import stage_inputs
from subquad.model.base import BaseStudent
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage
from subquad.report import print_plan
from subquad.report.console import make_table
from subquad.select import SELECTORS, Budget, Ranking, choose_plan, uniform_layers, units_of
from subquad.utils import format as fmt
from subquad.utils.token_cost import TRAINING

SECONDS = 10.0  # that trying all stages may take, about
PASSES = 3  # over the tokens that a stage is tried on


@dataclass(frozen=True)
class StagePreview:
    """What a stage will take on each device; `students`: that are trained so, one after the other."""

    stage: Stage
    students: int
    probe: StageEstimate
    frozen_bytes: int  # weights of the teacher, and of the stage's own
    student_bytes: int  # weights that the students do not share with it

    @property
    def seconds(self) -> float:
        return self.students * self.probe.seconds(self.stage, self.stage.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.students * self.stage.steps * self.stage.batch * self.stage.sequence_length / self.seconds

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on a device, by what they are for."""
        return {
            "teacher": self.frozen_bytes,
            "student's own": self.student_bytes,
            "gradients": self.probe.trained_bytes,
            "AdamW": 2 * self.probe.trained_bytes,
            "activations": self.probe.activation_bytes,
        }

    @property
    def finished_bytes(self) -> int:
        """What the stage leaves on disk: the weights that it trained."""
        return self.students * self.probe.trained_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """What its checkpoints take meanwhile (weights and AdamW's moments), with the one that is being written."""
        count = min(KEEP + 1, (self.stage.steps - 1) // self.stage.checkpoint_every)
        return 3 * count * self.probe.trained_bytes


@dataclass
class Preview:
    """What a conversion will take."""

    teacher_weights: int
    student_weights: int
    mixer_weights: int  # of the student's, those that the teacher lacks
    plan: Plan  # the given one, or one of the budget's size
    model_bytes: int
    stages: list[StagePreview] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by part

    @property
    def disk_bytes(self) -> int:
        """What a finished run takes: the model and what each stage trained."""
        return self.model_bytes + sum(stage.finished_bytes for stage in self.stages)

    @property
    def most_disk_bytes(self) -> int:
        """What it takes at most on the way, with the checkpoints of one stage."""
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
    """Says what `convert` with these arguments would take, and returns it. Writes nothing to `out`.

    Raises UserError for what `convert` would refuse, but for what `out` holds.
    """
    recipe = checked_recipe(recipe, teacher, data)
    given_plan = None if plan is None else Plan.load(plan)
    how = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    with tempfile.TemporaryDirectory() as folder, Conversion.open(recipe, Path(folder) / "run", **how) as conversion:
        conversion.run.say(f"teacher: {conversion.teacher.name}; {conversion.data.amount}")
        check_heldout(recipe.evaluate, conversion.teacher, conversion.data)  # `convert` asks for it at the end
        preview = _previewed(conversion, given_plan)
        _say(conversion, preview, Path(out))
    return preview


def _previewed(conversion: Conversion, given_plan: Plan | None) -> Preview:
    recipe, run = conversion.recipe, conversion.run
    linear, speed = conversion.all_linear_students(), teacher_speed(conversion)
    seconds = {part: run.seconds[part] for part in ("load", "data", "calibrate")}

    # The plan: given, or of the budget's size.
    if given_plan is None:
        run.say(f"plan: {recipe.selector.by} will choose it, under a budget of {recipe.selector.budget}")
        cost = selection_cost(conversion, linear)
        run.say("what follows is for a plan of the budget's size, evenly spaced:\n")
        seconds["select"] = cost.seconds(speed)
    plan = given_plan or _stand_in(linear[recipe.mixer.name], recipe)
    student = conversion.new_student(plan, mixers_from=linear.values())
    conversion.untie(student)
    preview = Preview(
        teacher_weights=_count(conversion.teacher.model),
        student_weights=_count(student),
        mixer_weights=sum(parameter.numel() for _, parameter in student.mixer_parameters()),
        plan=plan,
        model_bytes=sum(weights_of(student).values()),
        seconds=seconds,
    )

    # Training: a step of every stage is tried.
    for index, stage in enumerate(recipe.stages):
        preview.stages.append(_try(conversion, index, linear, student, speed))
        seconds[stage.name] = preview.stages[-1].seconds

    # Measuring: the teacher, the student and its baselines.
    even = even_plan(plan, recipe.mixer.name, recipe.mixer.options, recipe.dtype)
    aligned = any(stage.scope == "all-linear" for stage in recipe.stages)
    baselines = 0 if recipe.student else 2 + aligned + (even.layers != plan.layers)  # untrained and window, and these
    calibrated = 2 * seconds["calibrate"] / len(linear)
    cost = evaluation_cost(recipe.evaluate, 2 + baselines, conversion.data)
    seconds["evaluate"] = cost.seconds(speed) + calibrated
    return preview


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _stand_in(linear: BaseStudent, recipe: Recipe) -> Plan:
    """A plan of the budget's size, evenly spaced; half of it attends where only the selector knows how much."""
    settings, budget = recipe.selector, Budget.parse(recipe.selector.budget)
    if budget.word is not None or budget.speedup is not None:
        budget = Budget.parse("50%")
    unit = SELECTORS[settings.by].unit if settings.unit is None else settings.unit
    units = units_of(linear.plan.shapes, unit)
    choice = Ranking(units, lambda count: uniform_layers(len(units), count), unit)
    return choose_plan(linear, budget, choice, recipe.mixer.join)[0]


def _try(
    conversion: Conversion, index: int, linear: Mapping[str, BaseStudent], student: BaseStudent, speed: float
) -> StagePreview:
    """One stage, tried on its own student: that of the plan, or the first of the all-linear ones."""
    stages = conversion.recipe.stages
    stage, inputs = stages[index], stage_inputs(conversion, index)
    first, *others = linear.values()
    aligning = stage.scope == "all-linear"
    students = 1 + sum(any(True for _ in other.mixer_parameters()) for other in others) if aligning else 1
    trained = first if aligning else student

    tokens = round(SECONDS / len(stages) * speed / PASSES / TRAINING)
    probe = estimate_stage(stage, inputs, student=trained, tokens=tokens)

    # What teacher and student share counts once.
    target = inputs.logits_from
    teachers = weights_of(inputs.teacher, *([target] if isinstance(target, PreTrainedModel) else []))
    waiting = weights_of(*(model for model in linear.values() if model is not trained))
    own = sum(size for place, size in {**waiting, **probe.weights}.items() if place not in teachers)
    return StagePreview(stage, students, probe, sum(teachers.values()), own)


def _say(conversion: Conversion, found: Preview, out: Path) -> None:
    recipe, run = conversion.recipe, conversion.run
    print_plan(found.plan, run.console, recipe.dtype)
    run.say(
        f"\nteacher: {found.teacher_weights:,} weights; student: {found.student_weights:,}, of which the mixers' own "
        f"are {found.mixer_weights:,}"
    )
    for table in (_stages(found), _memory(found), _time(found)):
        run.say("")
        run.console.print(table)
    run.say("time and activations are those of a real step on the tokens tried, in proportion; the rest is arithmetic")
    if recipe.evaluate.tasks:
        run.say(f"not counted: the tasks {', '.join(recipe.evaluate.tasks)}")
    free = _free_bytes(out)
    run.say(
        f"\ndisk: {fmt.size(found.disk_bytes)} in {out} when done, at most {fmt.size(found.most_disk_bytes)} on the "
        f"way; {fmt.size(free)} are free"
    )
    if free < found.most_disk_bytes:
        run.say(f"that is too little: free some space, or give another --out than {out}")
    run.say("nothing was written: this was a dry run")


def _free_bytes(out: Path) -> int:
    """Of the disk that a folder, which may not be there yet, is on."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def _stages(found: Preview) -> Table:
    """Settings of the stages, and the weights that they train."""
    table = make_table("Stages", ["", "objective", "tokens", "steps", "length", "batch", "weights"])
    for one in found.stages:
        stage, times = one.stage, f" × {one.students}" if one.students > 1 else ""
        table.add_row(
            Text(stage.name),
            fmt.objective(stage.objective),
            fmt.integer(stage.tokens) + times,
            fmt.integer(stage.steps) + times,
            fmt.integer(stage.sequence_length),
            fmt.integer(stage.batch),
            fmt.integer(one.probe.trained),
        )
    return table


def _memory(found: Preview) -> Table:
    """Bytes while each stage is trained."""
    table = make_table("Memory of each device", ["", *(found.stages[0].memory if found.stages else []), "together"])
    for one in found.stages:
        sizes = [*one.memory.values(), sum(one.memory.values())]
        table.add_row(Text(one.stage.name), *(fmt.size(size) for size in sizes))
    return table


def _time(found: Preview) -> Table:
    """All parts, and of the stages how fast they went on how many tokens."""
    table = make_table("Time", ["", "about", "tokens/s", "tried on"])
    stages = {one.stage.name: one for one in found.stages}
    for part, seconds in found.seconds.items():
        one = stages.get(part)
        tried = [fmt.integer(one.tokens_per_second), f"{one.probe.tokens:,} tokens"] if one else []
        table.add_row(Text(part), fmt.duration(seconds), *tried)
    table.add_row("total", fmt.duration(sum(found.seconds.values())), style="bold")
    return table
