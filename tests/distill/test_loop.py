"""Stages: what they compute, what they log, and that nothing which happens to them changes what they end with."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from subquad.distill import checkpoint as checkpoint_module
from subquad.distill import loop
from subquad.distill.layer_losses import output_distance
from subquad.distill.log import RunLog
from subquad.distill.parameters import choose_parameters, make_optimizer
from subquad.distill.schedule import learning_rate_factor, warmup_steps
from subquad.distill.state import StageResult
from subquad.distill.teacher_forced import TeacherForced
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.jobs.run import make_accelerator
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Stage
from subquad.utils import files
from subquad.utils.progress import StageProgress
from tests.helpers import (
    ALIGN,
    BATCH,
    LOGITS,
    STEPS,
    RandomText,
    T,
    assert_same_bits,
    lines,
    make_student,
    tiny,
    train,
    weights,
)

LAYERS = {
    **ALIGN, "name": "layers", "trainable": ["mixers", "qkvo"],
    "objective": {"matrix": 0.1, "mixer_output": 1.0, "block_output": 1.0},
}  # fmt: skip
BRIDGE = {**LOGITS, "name": "bridge", "objective": {"bridge": 1.0, "logits": 0.5}}


@pytest.fixture(autouse=True)
def _one_pass_of_the_bare_teacher(monkeypatch):
    monkeypatch.setattr(loop, "bare_forward_speed", partial(bare_forward_speed, seconds=0.0))


def test_schedules():
    factor = partial(learning_rate_factor, steps=100, warmup=10, min_ratio=0.2)
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1.0
    assert [factor(step, schedule="constant") for step in (10, 99)] == [1.0, 1.0]
    assert factor(54) == pytest.approx(0.6) and factor(99) == pytest.approx(0.2)
    assert factor(89, schedule="wsd") == 1.0
    assert factor(94, schedule="wsd") == pytest.approx(0.6) and factor(99, schedule="wsd") == pytest.approx(0.2)
    assert [warmup_steps(*case) for case in [(0.05, 100), (7, 100), (50, 20), (0.0, 9)]] == [5, 7, 20, 0]


def test_groups_of_learning_rates_and_weight_decay():
    student = make_student(tiny("llama"))
    settings = {**ALIGN, "weight_decay": 0.1, "lr_groups": {"*key_map*": 5e-4}}
    stage = Stage(**settings)
    all_names = {name for name, _ in student.named_parameters()}
    parameters = choose_parameters(student, stage, all_names)
    assert parameters.keys() == {name for name, _ in student.mixer_parameters()}
    assert {name for name, p in student.named_parameters() if p.requires_grad} == parameters.keys()
    groups = make_optimizer(parameters, stage, student).param_groups
    settings_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    by_kind = {name.rpartition("mixer.")[2]: settings_of[id(p)] for name, p in parameters.items()}
    assert by_kind == {
        "hedgehog.query_map.weight_HDF": (1e-2, 0.1), "hedgehog.key_map.weight_HDF": (5e-4, 0.1),
        "hedgehog.log_far_H": (1e-2, 0.0),
    }  # fmt: skip
    for bad_settings in ({"trainable": ["*nothing*"]}, {"lr_groups": {"*nothing*": 1.0}}):
        with pytest.raises(UserError, match=r"nothing.*mixer"):
            choose_parameters(student, Stage(**{**ALIGN, **bad_settings}), all_names)


def test_nothing_to_train_is_an_error(tmp_path):
    teacher = tiny("llama")
    with pytest.raises(UserError, match="nothing to train"):
        train(tmp_path, teacher=teacher, student=make_student(teacher, mixer="sliding_window"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("mixer", ["hedgehog", "gated_deltanet"])
def test_teacher_forced_layers_see_what_they_would_see_alone(family, mixer):
    """The reference for layer l: a student with only that layer replaced, run free, sees the teacher's input there."""
    teacher = tiny(family)
    student = make_student(teacher, attention_layers=(1,), mixer=mixer)
    tokens_BT = torch.randint(3, 97, (2, T))
    align = TeacherForced(Stage(**ALIGN), student, teacher)
    parameters = choose_parameters(student, Stage(**ALIGN), align.reachable)
    losses = align(tokens_BT, 0.5)
    assert losses.keys() == {"layer 0", "layer 2"} == align.weights.keys()

    shapes, paths = student.plan.shapes, student.config.attention_paths
    options = student.plan.mixers[mixer]
    for layer in (0, 2):
        plan = Plan.by_layer(shapes, [index for index in range(3) if index != layer], mixer, options)
        alone = Student.from_teacher(teacher, plan, mixers_from=student)
        reference = {name: p for name, p in alone.mixer_parameters()}
        for parameter in reference.values():
            parameter.requires_grad_()
        outputs = []
        for model in (teacher, alone.backbone):
            module = model.get_submodule(paths[layer])
            module.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output[0]))
            model(tokens_BT, use_cache=False) if model is teacher else alone(tokens_BT, use_cache=False)
        loss = output_distance(outputs[1], outputs[0])
        torch.testing.assert_close(losses[f"layer {layer}"], loss.detach(), rtol=1e-5, atol=1e-7)
        gradients = torch.autograd.grad(loss, reference.values(), allow_unused=True)
        for name, gradient in zip(reference, gradients, strict=True):
            grad = parameters[name].grad
            assert (grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(grad, 0.5 * 0.5 * gradient, rtol=1e-4, atol=1e-7)


def test_teacher_forced_pass_computes_no_more_than_it_needs():
    teacher = tiny("llama")
    student = make_student(teacher, attention_layers=(2,))
    hooks = [len(module._forward_hooks) for module in student.modules()]
    ran = []
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    align = TeacherForced(Stage(**ALIGN), student, teacher)
    choose_parameters(student, Stage(**ALIGN), align.reachable)
    ran.clear()
    align(torch.randint(3, 97, (2, T)), 1.0)
    assert "model.layers.0.mlp" in ran and "model.layers.1.self_attn.o_proj" in ran
    assert not {"model.layers.1.mlp", "model.layers.2.self_attn.q_proj", "model.norm", "lm_head"} & {*ran}
    assert [len(module._forward_hooks) for module in student.modules()] == hooks
    assert sum(len(module._forward_hooks) for module in teacher.modules()) == len([*teacher.modules()])  # ours above


@pytest.mark.parametrize("settings", [ALIGN, LOGITS], ids=["mixer_output", "logits"])
def test_a_stage_trains_what_it_should_and_leaves_the_teacher_alone(tmp_path, settings):
    teacher = tiny("llama")
    teacher_before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = make_student(teacher)
    untrained = weights(student)
    settings = {**settings, "tokens": 40 * BATCH * T}
    output = StringIO()
    student, result = train(tmp_path, settings, teacher=teacher, student=student, progress=Console(file=output))
    assert result.final_loss < 0.95 * result.first_loss
    assert_same_bits(teacher_before, dict(teacher.state_dict()))
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())

    changed_names = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, untrained[name])}
    shared_names = {
        name for name, tensor in student.backbone.state_dict().items()
        if name in teacher_before and tensor.data_ptr() == teacher.state_dict()[name].data_ptr()
    }  # fmt: skip
    if settings["name"] == "align":
        assert changed_names == {name for name, _ in student.mixer_parameters()}
        assert shared_names == teacher_before.keys()
    else:
        assert changed_names == untrained.keys() and not shared_names

    assert (result.steps, result.tokens) == (40, 40 * BATCH * T)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.share_of_bare_forward == pytest.approx(
        result.tokens_per_second / result.bare_forward_tokens_per_second
    )
    parts = {"layer 0", "layer 2"} if settings["name"] == "align" else {"logits", "labels"}
    assert result.final_parts.keys() == parts
    assert "step 40/40" in output.getvalue()
    assert StageResult(**json.loads(json.dumps(result.as_dict()))) == result


def test_log_says_what_happened(tmp_path):
    accelerator = make_accelerator(tmp_path)
    accelerator.init_trackers("tensorboard")
    train(tmp_path, {**ALIGN, "log_every": 4, "schedule": "constant", "warmup": 0}, accelerator=accelerator)
    accelerator.end_training()
    first_line, last_line = lines(tmp_path)
    assert [first_line["step"], last_line["step"]] == [4, 6]
    assert last_line["tokens"] == STEPS * BATCH * T and last_line["lr"] == 1e-2 and last_line["grad_norm"] > 0
    assert (last_line["stage"], last_line["name"]) == (0, "align") and last_line["seconds"] > first_line["seconds"]
    assert last_line["loss"] == pytest.approx(sum(last_line["parts"].values()) / 2)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_log_is_cut_back_to_the_step_that_training_goes_on_from(tmp_path):
    path = tmp_path / "log.jsonl"
    steps = [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 1)]
    path.write_text("".join(json.dumps({"stage": a, "step": b}) + "\n" for a, b in steps) + '{"stage": 1, "st')
    RunLog(path, stage=1, step=2).write({"stage": 1, "step": 3})
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == steps[:5]


def test_micro_batches_change_nothing(tmp_path):
    runs = [train(tmp_path / str(n), {**LOGITS, "accumulate": n}) for n in (1, 2, 4)]
    for student, result in runs[1:]:
        assert result.final_loss == pytest.approx(runs[0][1].final_loss, rel=1e-5)
        for name, tensor in student.state_dict().items():
            torch.testing.assert_close(tensor, runs[0][0].state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [ALIGN, LOGITS, LAYERS, BRIDGE], ids=lambda settings: settings["name"])
def test_bfloat16_weights_are_trained_in_float32(tmp_path, settings):
    teacher = tiny("llama", torch.bfloat16)
    student = make_student(teacher, mixer="hedgehog")
    weights_before = weights(student)
    # Steps of 1e-5 in weights of order one: each is lost in bfloat16, their sum is not.
    settings = {**settings, "tokens": 40 * BATCH * T, "lr": 4e-4, "schedule": "constant", "batch": BATCH}
    _, result = train(tmp_path, settings, teacher=teacher, student=student)
    weights_after = weights(student)
    assert {tensor.dtype for tensor in weights_after.values()} == {torch.bfloat16}
    changed_names = [name for name in weights_before if not torch.equal(weights_before[name], weights_after[name])]
    assert any("query_map" in name for name in changed_names)
    assert load_file(tmp_path / "checkpoints/stage-0.safetensors")[changed_names[0]].dtype == torch.float32
    assert result.final_loss < result.first_loss


def test_bare_forward_speed_counts_tokens():
    teacher = tiny("llama")
    passes = []
    teacher.model.register_forward_hook(lambda *_: passes.append(time.perf_counter()))
    start = time.perf_counter()
    speed = bare_forward_speed(teacher, torch.randint(3, 97, (2, T)), seconds=0.05)
    assert speed == pytest.approx(len(passes) * 2 * T / (time.perf_counter() - start), rel=0.2)


def test_progress_of_work_in_several_parts():
    """Each part has a number of steps of its own, and the time left is that of the part."""
    output = StringIO()
    with StageProgress(Console(file=output, width=100), "select by kl", unit="piece") as bar:
        for steps in (3, 3, 2):
            for step in range(1, steps + 1):
                bar.update(step, "7 tokens/s", steps)
    assert output.getvalue().splitlines() == [
        f"select by kl: piece {steps}/{steps}  7 tokens/s  0 s left" for steps in (3, 3, 2)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ALIGN, id="mixer_output"),
        pytest.param(LOGITS, id="logits", marks=pytest.mark.slow),
        pytest.param(BRIDGE, id="bridge", marks=pytest.mark.slow),
    ],
)
def test_interrupted_at_any_write_it_ends_with_the_same_bits(tmp_path, settings, monkeypatch):
    """Each run dies at another write to the disk, and is resumed until it is through."""

    class Killed(BaseException):
        pass

    uninterrupted, _ = train(tmp_path / "plain", settings)
    expected_weights = weights(uninterrupted)
    writes_left = 0

    def die_at_last_write(function, *args, **kwargs):
        nonlocal writes_left
        writes_left -= 1
        if writes_left == 0:
            raise Killed
        return function(*args, **kwargs)

    for module, name in ((os, "replace"), (checkpoint_module, "save_file"), (files, "sync")):
        monkeypatch.setattr(module, name, partial(die_at_last_write, getattr(module, name)))
    deaths = 0
    for budget in (1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 15, 18, 19, 20, 21, 22):
        out = tmp_path / str(budget)
        student, resume, writes_left = None, False, budget
        while student is None:
            try:
                student, result = train(out, settings, resume=resume)
            except Killed:
                deaths, resume, writes_left = deaths + 1, True, 10_000
        assert_same_bits(weights(student), expected_weights)
        assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
        assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(tmp_path / "plain")]
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["stage-0.safetensors"]
        reloaded, loaded = train(out, settings, resume=True)  # finished: loads and does not train
        assert_same_bits(weights(reloaded), expected_weights)
        assert loaded == result
    assert deaths == 16


class Interrupting(RandomText):
    """Somebody presses Ctrl-C in the middle of a step."""

    def __init__(self, press, at, times=1):
        self.press, self.at, self.times = press, at, times

    def batch(self, step, **kwargs):
        for _ in range(self.times if step == self.at else 0):
            self.press()
        return super().batch(step, **kwargs)


@pytest.mark.parametrize("at", [2, STEPS - 1])
def test_ctrl_c_ends_at_a_checkpoint_of_that_step(at, tmp_path, ctrl_c, capfd):
    """The step is finished and kept, whatever `checkpoint_every` says, and no step is done again."""
    settings, text = {**ALIGN, "checkpoint_every": 1000}, Interrupting(ctrl_c, at)
    uninterrupted, _ = train(tmp_path / "plain", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", settings, corpus=text)
    assert "Ctrl-C again" in capfd.readouterr().err
    checkpoint_names = {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()}
    in_last_step = at == STEPS - 1
    assert checkpoint_names == (
        {"stage-0.safetensors"} if in_last_step else {"latest.json", f"stage-0-step-{at + 1:06d}"}
    )
    student, _ = train(tmp_path / "stopped", settings, corpus=text, resume=True)  # that step again would stop again
    assert_same_bits(weights(student), weights(uninterrupted))
    assert [line["step"] for line in lines(tmp_path / "stopped")] == list(range(1, STEPS + 1))


def test_the_second_ctrl_c_waits_for_nothing(tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, corpus=Interrupting(ctrl_c, 2, times=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["stage-0-step-000002"]


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on(tmp_path):
    job = start_job(tmp_path / "killed", steps=150)
    deadline = time.monotonic() + 60
    while lines_whole(tmp_path / "killed") < 25:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    killed_at = lines_whole(tmp_path / "killed")
    assert 25 <= killed_at < 150
    resumed, _ = train(tmp_path / "killed", job_settings(150), resume=True)
    uninterrupted, _ = train(tmp_path / "plain", job_settings(150))
    assert_same_bits(weights(resumed), weights(uninterrupted))
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(1, 151))
    assert [line["loss"] for line in lines(tmp_path / "killed")] == [line["loss"] for line in lines(tmp_path / "plain")]


def test_second_stage_goes_on_after_the_first(tmp_path):
    teacher = tiny("llama")
    student = make_student(teacher)
    train(tmp_path, ALIGN, teacher=teacher, student=student)
    train(tmp_path, LOGITS, teacher=teacher, student=student, index=1)
    expected_weights = weights(student)
    fresh_student = make_student(teacher)
    for index, settings in enumerate((ALIGN, LOGITS)):
        train(tmp_path, settings, teacher=teacher, student=fresh_student, index=index, resume=True)
    assert_same_bits(weights(fresh_student), expected_weights)
    assert [line["stage"] for line in lines(tmp_path)] == [0] * STEPS + [1] * STEPS
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, STEPS + 1)] * 2
    train(tmp_path, ALIGN, teacher=teacher, student=make_student(teacher))  # from the start: the second stage is void
    assert {line["stage"] for line in lines(tmp_path)} == {0}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["stage-0.safetensors"]


def test_resuming_something_else_is_refused_and_named(tmp_path):
    train(tmp_path, ALIGN)
    with pytest.raises(UserError, match="another seed"):
        train(tmp_path, ALIGN, seed=1, resume=True)
    with pytest.raises(UserError, match="another recipe"):
        train(tmp_path, {**ALIGN, "lr": 1e-4}, resume=True)
    changed_teacher = tiny("llama")
    with torch.no_grad():
        changed_teacher.model.layers[2].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(UserError, match="another teacher"):
        train(tmp_path, ALIGN, teacher=changed_teacher, resume=True)
    with pytest.raises(UserError, match="another plan"):
        train(tmp_path, ALIGN, student=make_student(tiny("llama"), attention_layers=(0,)), resume=True)
    train(tmp_path, {**ALIGN, "log_every": 3, "checkpoint_every": 1}, resume=True)  # these change no weight


def test_full_disk_during_a_checkpoint_keeps_the_one_before(tmp_path, monkeypatch):
    save = checkpoint_module.save_file

    def fail_at_step_4(tensors, path, **kwargs):
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", fail_at_step_4)
        with pytest.raises(UserError, match=r"step 4.*No space left on device.*--resume"):
            train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest.json", "stage-0-step-000002"]
    resumed, _ = train(tmp_path, resume=True)
    uninterrupted, _ = train(tmp_path / "plain")
    assert_same_bits(weights(resumed), weights(uninterrupted))


def test_damaged_checkpoint_is_an_error_of_one_sentence(tmp_path):
    train(tmp_path)
    path = tmp_path / "checkpoints/stage-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        train(tmp_path, resume=True)


class PoisonAt(RandomText):
    """Before step `step`, makes a weight of one layer NaN."""

    def __init__(self, student, layer, step):
        self.parameter = next(student.attention_modules()[layer].mixer.parameters())
        self.step = step

    def batch(self, step, **settings):
        if step == self.step:
            self.parameter.data.fill_(float("nan"))
        return super().batch(step, **settings)


@pytest.mark.parametrize("settings, part", [(ALIGN, "layer 2"), (LOGITS, "logits")], ids=["mixer_output", "logits"])
def test_nan_is_named_and_the_last_good_checkpoint_kept(tmp_path, settings, part):
    teacher = tiny("llama")
    student = make_student(teacher)
    poison = PoisonAt(student, 2, step=4)
    with pytest.raises(UserError, match=f"'{settings['name']}' stopped at step 5 of 6: the loss of {part}.* is nan"):
        train(tmp_path, settings, teacher=teacher, student=student, corpus=poison)
    saved = load_file(tmp_path / "checkpoints/stage-0-step-000004/trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    resumed, _ = train(tmp_path, settings, resume=True)
    uninterrupted, _ = train(tmp_path / "plain", settings)
    assert_same_bits(weights(resumed), weights(uninterrupted))


def test_batch_that_does_not_divide_is_an_error(tmp_path):
    class TwoProcesses(Accelerator):
        num_processes = 2

    with pytest.raises(UserError, match="batch of 3 sequences"):
        train(tmp_path, {**ALIGN, "batch": 3}, accelerator=TwoProcesses(cpu=True))


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    job = start_job(tmp_path / "two", steps=STEPS, launcher=launch)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert "processes: 2" in output
    student, _ = train(tmp_path / "one", job_settings(STEPS))
    lines_of_two, lines_of_one = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert [line["step"] for line in lines_of_two] == [line["step"] for line in lines_of_one]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines_of_two] == pytest.approx([line[key] for line in lines_of_one], rel=1e-5)
    trained = load_file(tmp_path / "two/checkpoints/stage-0.safetensors")
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, student.state_dict()[name], rtol=1e-4, atol=1e-6)


def job_settings(steps):
    return {**LAYERS, "tokens": steps * BATCH * T, "checkpoint_every": 3}


def lines_whole(out):
    path = Path(out) / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_job(out, *, steps, launcher=()):
    """This file as a program: the stage of `job_settings` in processes of its own."""
    command = [sys.executable, *launcher, __file__, str(out), str(steps)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = make_accelerator(Path(sys.argv[1]))
    print(f"processes: {accelerator.num_processes}", flush=True)
    train(sys.argv[1], job_settings(int(sys.argv[2])), accelerator=accelerator)
    accelerator.end_training()
