"""Estimates of a dry run against a real run and against arithmetic; and that it writes nothing."""

import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from subquad.distill.estimate import StageEstimate, TensorBytes, estimate_stage, weights_of
from subquad.distill.loop import StageInputs
from subquad.errors import UserError
from subquad.evaluate.retrieval import FLOORS
from subquad.jobs import dry_run
from subquad.jobs.convert import convert
from subquad.jobs.dry_run import StagePreview
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage
from tests.helpers import RECIPE, shortened, tiny


def recipe(**stages: dict) -> Recipe:
    """The tiny recipe, with changes to its stages by name."""
    stage_settings = [stage | stages.get(stage["name"], {}) for stage in RECIPE["stages"]]
    return Recipe(**(RECIPE | {"stages": stage_settings}))


def test_the_bytes_of_tensors_are_those_held_at_once():
    weight = torch.ones(100, 100, requires_grad=True)  # 40,000 bytes, made before
    weight.grad = torch.zeros_like(weight)
    with TensorBytes() as tensor_bytes:
        row = torch.ones(100, 100)
        product = row @ weight
        del row  # kept for the backward pass
        assert tensor_bytes.now == 80_000
        view = product.view(-1)[5:]
        assert tensor_bytes.now == 80_000
        del product, view
        assert tensor_bytes.now == 0
        torch.ones(10)
    assert (tensor_bytes.now, tensor_bytes.most) == (0, 80_000)


class Rows:
    """Text with rows of any length up to `longest`."""

    def __init__(self, longest: int = 10_000) -> None:
        self.longest, self.requests = longest, []

    def batch(self, step, *, batch, sequence_length, seed):
        if sequence_length > self.longest:
            raise UserError("the text is too short")
        self.requests.append((batch, sequence_length))
        return torch.randint(3, 97, (batch, sequence_length), generator=torch.Generator().manual_seed(step))


def try_stage(stage: Stage, tokens: int, text: Rows, teacher=None) -> tuple[StageEstimate, Student]:
    teacher = tiny("llama") if teacher is None else teacher
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [1], "hedgehog", {"window": 8}))
    inputs = StageInputs(teacher, text, Accelerator(cpu=True))
    return estimate_stage(stage, inputs, student=student, tokens=tokens), student


@pytest.mark.parametrize(
    "tokens, rows, length",
    [(10, 1, 64), (100, 1, 100), (128, 1, 128), (300, 2, 128), (10_000, 3, 128)],
)
def test_a_probe_shortens_rows_before_it_leaves_them_out(tokens, rows, length):
    """Never below 64 tokens, and never more than a micro-batch."""
    stage = Stage(name="x", objective="mixer_output", tokens=9999, sequence_length=128, batch=6, accumulate=2)
    text = Rows()
    probe, _ = try_stage(stage, tokens, text)
    assert {*text.requests[1:]} == {(rows, length)} and text.requests[0] == (1, 128)
    assert (probe.tokens, probe.whole) == (rows * length, 3 * 128)


def test_a_probe_counts_what_is_trained():
    teacher = tiny("llama", torch.bfloat16)
    teacher_weights = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    stage = Stage(name="x", objective="logits", trainable="all", tokens=999, sequence_length=64, batch=2)
    probe, student = try_stage(stage, 64, Rows(), teacher)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert probe.trained == count and probe.trained_bytes == 4 * count  # float32 while they are trained
    assert sum(probe.weights.values()) == 4 * count
    assert all(torch.equal(parameter, teacher_weights[name]) for name, parameter in teacher.named_parameters())
    assert probe.pass_seconds > 0 and probe.update_seconds > 0


def test_checkpointed_blocks_keep_less():
    stage = Stage(name="x", objective="logits", trainable="all", tokens=999, sequence_length=128, batch=2)
    activation_bytes = try_stage(stage, 256, Rows())[0].activation_bytes
    checkpointed_stage = stage.model_copy(update={"gradient_checkpointing": True})
    checkpointed_bytes = try_stage(checkpointed_stage, 256, Rows())[0].activation_bytes
    assert checkpointed_bytes < 0.8 * activation_bytes
    doubled_bytes = try_stage(stage.model_copy(update={"batch": 4}), 256, Rows())[0].activation_bytes
    assert doubled_bytes == pytest.approx(2 * activation_bytes, rel=0.05)


def test_a_row_that_the_text_lacks_is_refused_though_a_short_one_is_tried():
    stage = Stage(name="x", objective="logits", tokens=999, sequence_length=128)
    with pytest.raises(UserError, match="too short"):
        try_stage(stage, 64, Rows(longest=100))


def test_weights_that_are_shared_count_once():
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [1], "hedgehog", {"window": 8}))
    mixer_bytes = sum(parameter.nbytes for _, parameter in student.mixer_parameters())
    assert mixer_bytes > 0
    assert sum(weights_of(teacher, student).values()) == sum(weights_of(teacher).values()) + mixer_bytes


PROBE = StageEstimate(
    tokens=64,
    whole=512,
    pass_seconds=2.0,
    update_seconds=0.5,
    trained=25,
    trained_bytes=100,
    activation_bytes=7,
    weights={},
)


def test_a_stage_is_so_many_passes_and_updates():
    stage = Stage(name="x", tokens=4000, sequence_length=256, batch=4, accumulate=2, checkpoint_every=2)
    estimate = StagePreview(stage, students=3, probe=PROBE, frozen_bytes=1000, student_bytes=150)
    assert stage.steps == 4
    assert estimate.seconds == 3 * 4 * (2 * 2.0 + 0.5)
    assert estimate.tokens_per_second == 4 * 256 / (2 * 2.0 + 0.5)
    assert [*estimate.memory.values()] == [1000, 150, 100, 200, 7]
    assert estimate.finished_bytes == 300
    assert estimate.checkpoint_bytes == 300  # after step 2; the one after step 4 is the end
    long_estimate = replace(estimate, stage=stage.model_copy(update={"tokens": 20 * 1024}))
    assert long_estimate.checkpoint_bytes == 900  # two are kept, and one more while it is written


def test_what_is_said_is_what_a_run_takes(teacher_folder, text, tmp_path):
    settings = recipe(logits={"trainable": "all"})
    out = tmp_path / "run"
    student = convert(teacher_folder, settings, out, data=text)
    preview = dry_run.dry_run(teacher_folder, settings, out, plan=out / "plan.yaml", data=text)
    assert preview.plan == student.plan
    assert preview.student_weights == sum(parameter.numel() for parameter in student.parameters())
    assert preview.mixer_weights == sum(parameter.numel() for _, parameter in student.mixer_parameters())
    assert preview.teacher_weights == preview.student_weights - preview.mixer_weights
    files = [out / "model.safetensors", *(out / "checkpoints").glob("*.safetensors")]
    file_bytes = sum(file.stat().st_size for file in files)
    assert len(files) == 3
    assert preview.disk_bytes < file_bytes < preview.disk_bytes + 2**16  # the headers of safetensors
    assert [stage.stage.name for stage in preview.stages] == ["align", "logits"]
    assert {"load", "data", "calibrate", "align", "logits", "evaluate"} == preview.seconds.keys()


def test_a_dry_run_says_all_and_leaves_nothing(teacher_folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    preview = dry_run.dry_run(teacher_folder, recipe(), tmp_path / "out", data=text)
    output = " ".join(capsys.readouterr().out.split())
    assert "plan: kl will choose it, under a budget of 1" in output
    assert "kl, 3 units: 256 tokens forward, about" in output
    assert f"teacher: {preview.teacher_weights:,} weights" in output and f"own are {preview.mixer_weights:,}" in output
    assert f"align mixer output 512 8 32 2 {preview.stages[0].probe.trained:,}" in output
    assert f"logits logits 256 4 32 2 {preview.mixer_weights:,}" in output
    assert "nothing was written" in output and "too little" not in output
    assert len(preview.plan.attention_layers) == 1 and "H A H" in output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "budget, unit, heads", [("2", None, 12), ("opt", None, 12), ("1.5x@64", "head", 9), ("4", "head", 4)]
)
def test_the_stand_in_has_the_budgets_size(budget, unit, heads):
    """Of three layers with six heads; half of them where only the selector or a clock could tell."""
    settings = recipe().model_copy(deep=True)
    settings.selector.budget, settings.selector.unit = budget, unit
    teacher = tiny("llama")
    linear = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "hedgehog", {"window": 8}))
    assert len(dry_run._stand_in(linear, settings).attention_heads) == heads


def test_other_mixers_are_aligned_too(teacher_folder, text, tmp_path):
    settings = recipe()
    settings.mixer.alternatives = Recipe(
        **(RECIPE | {"mixer": {"alternatives": [{"name": "gla"}, {"name": "sliding_window"}]}})
    ).mixer.alternatives
    preview = dry_run.dry_run(teacher_folder, settings, tmp_path / "out", data=text)
    assert [stage.students for stage in preview.stages] == [2, 1]  # a window has nothing to learn


@pytest.mark.parametrize("name", ["lolcats-quick", "mohawk-quick", "llamba-quick"])  # LoRA, matrices, all weights
def test_stages_of_every_kind_can_be_tried(name, teacher_folder, text, tmp_path, monkeypatch):
    monkeypatch.setitem(FLOORS, "logprob", -1e9)  # a random teacher retrieves nothing
    preview = dry_run.dry_run(teacher_folder, shortened(name), tmp_path / "out", data=text)
    assert [stage.stage.name for stage in preview.stages] == [stage.name for stage in shortened(name).stages]
    assert all(stage.seconds > 0 and stage.probe.activation_bytes > 0 for stage in preview.stages)


def test_a_full_disk_is_foreseen(teacher_folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    dry_run.dry_run(teacher_folder, recipe(), tmp_path / "not" / "yet", data=text)
    assert "too little: free some space" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": [RECIPE["stages"][0] | {"trainable": "*nothing*"}]}, "no parameter matches"),
        ({"evaluate": {"contexts": [100_000]}}, "held out for test"),
        ({"selector": RECIPE["selector"] | {"budget": "9"}}, "more than the teacher's 3"),
    ],
)
def test_what_a_run_would_refuse_late_is_refused_at_once(change, message, teacher_folder, text, tmp_path):
    with pytest.raises(UserError, match=message):
        dry_run.dry_run(teacher_folder, Recipe(**(RECIPE | change)), tmp_path / "out", data=text)
    assert [*tmp_path.iterdir()] == []
