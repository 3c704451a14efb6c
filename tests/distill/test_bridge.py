"""The attention bridge, and students with a model of their own."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from subquad.distill import loop
from subquad.distill.bridge import SIDES
from subquad.distill.loop import make_pass
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.jobs.base_model import take_weights
from subquad.jobs.convert import convert
from subquad.mixers import MIXERS, mixer_options
from subquad.model.conformance import check_student
from subquad.model.interface import layer_map, shapes_of, watched_attention
from subquad.model.student import Student
from subquad.plan import ATTENTION, Plan
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import Stage
from tests.helpers import (
    ALIGN,
    FAMILIES,
    LOGITS,
    RECIPE,
    RandomText,
    T,
    assert_same_bits,
    lines,
    make_student,
    tiny,
    train,
    weights,
)

BRIDGE = {**ALIGN, "name": "bridge", "objective": "bridge", "trainable": "all"}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MAPPED = [name for name in MIXERS if name != ATTENTION]


def small_student(mixer="discrete_mamba2", options=None, **changes):
    """A student of random weights, with fewer layers than the tiny teachers, another width and other heads."""
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **SMALL, **changes})
    return Student.from_config(config, lambda shapes: Plan.by_layer(shapes, [], mixer, options), seed=1)


@pytest.fixture(autouse=True)
def _one_pass_of_the_bare_teacher(monkeypatch):
    monkeypatch.setattr(loop, "bare_forward_speed", partial(bare_forward_speed, seconds=0.0))


def test_layers_are_mapped_evenly():
    assert layer_map(2, 3) == [0, 1] and layer_map(6, 12) == [0, 2, 4, 6, 8, 10] and layer_map(3, 3) == [0, 1, 2]
    assert layer_map(4, 2) == [0, 0, 1, 1]


@pytest.mark.parametrize("mixer", MAPPED)
def test_every_mixer_has_queries_and_keys_that_the_bridge_can_train(mixer):
    teacher, student = tiny("llama"), small_student(mixer)
    training_pass = make_pass(Stage(**BRIDGE), student, teacher)
    maps = dict(training_pass.bridge.named_parameters())
    student.requires_grad_(True)
    parts = training_pass(torch.randint(3, 97, (2, T)), 1.0)
    assert [*parts] == ["bridge of layer 0", "bridge of layer 1"]
    assert all(float(weight.grad.abs().sum()) > 0 for weight in maps.values())
    for layer, module in enumerate(student.attention_modules()):
        assert float(module.q_proj.weight.grad.abs().sum()) > 0, layer
        assert float(module.k_proj.weight.grad.abs().sum()) > 0, layer


@pytest.mark.parametrize("sides", ["both", "queries", "keys"])
def test_the_distance_is_the_papers(sides):
    """Of queries and keys with rotary embedding, each through its own maps; the mean over layers of the sums."""
    teacher, student = tiny("llama"), small_student("retention", {"rotary": True})
    stage = Stage(**BRIDGE, bridge={"sides": sides, "width": 12})
    training_pass = make_pass(stage, student, teacher, seed=3)
    tokens_BT = torch.randint(3, 97, (2, T))
    with torch.no_grad():
        with watched_attention(teacher) as teacher_calls:
            teacher(tokens_BT)
        student_pairs = []
        for module in (m for m in student.modules() if type(m).__name__ == "Retention"):
            module.register_forward_pre_hook(lambda m, args: student_pairs.append((args[0].q_BHTD, args[0].k_BGTD)))
        student(tokens_BT, use_cache=False)
    expected_losses = []
    calls = [[*teacher_calls.values()][layer] for layer in (0, 1)]
    for layer, ((q, k), call) in enumerate(zip(student_pairs, calls, strict=True)):
        maps, total = training_pass.bridge.maps, 0.0
        for side, x, y in (
            ("queries", q, call.q_BHTD),
            ("keys", k.repeat_interleave(2, 1), call.k_BGTD),
        ):  # a state a head
            if f"{layer}_{side}" in maps:
                first_map, _, second_map = maps[f"{layer}_{side}"]
                assert first_map.out_features == 12
                inner = F.silu(x.transpose(1, 2).flatten(2) @ first_map.weight.T + first_map.bias)
                total += (inner @ second_map.weight.T + second_map.bias - y.transpose(1, 2).flatten(2)).square().mean()
        expected_losses.append(float(total.detach()))
    assert {*maps} == {f"{layer}_{side}" for layer in (0, 1) for side in (SIDES if sides == "both" else (sides,))}
    parts = training_pass(tokens_BT, 1.0)
    torch.testing.assert_close([float(part) for part in parts.values()], expected_losses)
    assert training_pass.weights == dict.fromkeys(parts, 0.5)


def test_the_maps_learn_and_are_dropped(tmp_path, monkeypatch):
    teacher, student = tiny("llama"), small_student()
    names = {*student.state_dict()}
    weights_before = weights(student)
    settings = {**BRIDGE, "tokens": 80 * 4 * T}
    _, result = train(tmp_path, settings, teacher=teacher, student=student)
    assert result.final_loss < 0.8 * result.first_loss
    assert {*student.state_dict()} == names and not torch.equal(
        weights_before["backbone.model.layers.0.self_attn.q_proj.weight"],
        student.state_dict()["backbone.model.layers.0.self_attn.q_proj.weight"],
    )
    # Without training the maps, as in the released code, the same steps do less.
    optimizer = loop.make_optimizer
    monkeypatch.setattr(
        loop, "make_optimizer", lambda p, *args: optimizer({k: v for k, v in p.items() if "bridge." not in k}, *args)
    )
    _, frozen_result = train(tmp_path / "frozen", settings, teacher=teacher, student=small_student())
    assert frozen_result.final_loss > 1.1 * result.final_loss


def test_given_the_teachers_inputs_or_not(tmp_path):
    """The bridge runs free by default; given the teacher's inputs it needs layers that are the teacher's."""
    teacher = tiny("llama")
    assert not Stage(**BRIDGE).forced
    _, forced = train(tmp_path, {**BRIDGE, "teacher_forced": True}, teacher=teacher)
    parts = lines(tmp_path)[0]["parts"]
    assert [*parts] == ["layer 0", "layer 2"] and forced.final_loss < forced.first_loss
    with pytest.raises(
        UserError, match="stage 'bridge' gives every layer the teacher's input, and the student's layers"
    ):
        train(tmp_path, {**BRIDGE, "teacher_forced": True}, teacher=teacher, student=small_student())
    with pytest.raises(UserError, match="stage 'bridge' compares hidden states, and the student's layers are not"):
        objective = {"mixer_output": 1.0, "logits": 1.0}
        train(tmp_path, {**BRIDGE, "objective": objective}, teacher=teacher, student=small_student())


def test_layers_that_the_user_maps(tmp_path):
    teacher, student = tiny("llama"), small_student()
    stage = Stage(**BRIDGE, bridge={"layers": [2, 0]})
    assert make_pass(stage, student, teacher).bridge.teacher_layers == [2, 0]
    for layers in ([0], [0, 3], [0, -1]):
        with pytest.raises(UserError, match=r"bridge.layers \[.*\]: give one of the teacher's layers 0 to 2 for each"):
            make_pass(Stage(**BRIDGE, bridge={"layers": layers}), student, teacher)
    with pytest.raises(ValueError, match="has settings under 'bridge', which is not among its objectives"):
        Stage(**ALIGN, bridge={"width": 4})


def test_a_stage_with_a_bridge_is_resumed_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    settings = {**BRIDGE, "objective": {"bridge": 0.5, "labels": 1.0, "logits": 0.5}}
    student, _ = train(tmp_path / "whole", settings, student=small_student())

    class Stopping(RandomText):
        def batch(self, step, **kwargs):
            if step == 3:
                raise KeyboardInterrupt
            return super().batch(step, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, student=small_student(), corpus=Stopping())
    resumed, _ = train(tmp_path / "cut", settings, student=small_student(), resume=True)
    assert_same_bits(weights(student), weights(resumed))


def test_logits_and_labels_teach_a_smaller_student(tmp_path):
    student, result = train(tmp_path, {**LOGITS, "lr": 1e-2}, student=small_student())
    assert result.final_loss < result.first_loss
    check_student(student)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_memory_starts_long_or_spread(mixer):
    """Decays near 1 (CAB's ablation), or as far apart as in Mamba-2: from below 0.3 to above 0.99."""
    decays_by_memory = {}
    for memory in ("long", "spread"):
        torch.manual_seed(0)
        student = small_student(mixer, {"memory": memory, "rotary": False}, num_attention_heads=4)
        decays = []
        for layer in range(2):
            (layer_mixer,) = student.mixers(layer).values()
            if mixer == "mamba2":
                decays.append((-layer_mixer.A_log_G.exp() * F.softplus(layer_mixer.dt.bias)).exp())
            else:
                decays.append(layer_mixer.decay.bias.sigmoid())
        decays_by_memory[memory] = torch.cat(decays)
    assert decays_by_memory["long"].min() > 0.99 and decays_by_memory["spread"].min() < 0.9
    assert mixer_options(mixer, {}).memory == "long"


def test_weights_of_the_teacher_that_fit_are_taken():
    teacher = tiny("llama", num_hidden_layers=4)
    config = deepcopy(teacher.config)
    config.num_hidden_layers, config.intermediate_size = 2, 40  # other MLPs
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    mlp = model.model.layers[1].mlp.up_proj.weight.clone()
    names = take_weights(model, teacher)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, teacher.model.layers[2].self_attn.q_proj.weight)
    assert torch.equal(model.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, mlp) and not any("up_proj" in name for name in names)
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **FAMILIES["gpt2"]))
    with pytest.raises(UserError, match="no weight of GPT2LMHeadModel has the name and shape of one of Llama"):
        take_weights(gpt2, teacher)


def cab(**student):
    stages = [{**BRIDGE, "lr": 1e-3}, {**LOGITS, "objective": {"labels": 1.0, "logits": 0.5}}]
    return Recipe(**RECIPE | {"stages": stages, "student": student, "selector": {"by": "uniform", "budget": "0"}})


def test_a_conversion_into_a_smaller_model(teacher_folder, text, tmp_path):
    recipe = cab(changes=SMALL)
    student = convert(teacher_folder, recipe, tmp_path / "out", data=text)
    assert len(student.plan.shapes) == 2 and student.plan.shapes[0].heads == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_bits(weights(student), weights(loaded))
    check_student(loaded)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bridge" in page


def test_a_model_of_the_students_own_needs_a_selector_that_asks_nothing(teacher_folder, text, tmp_path):
    recipe = cab()
    recipe.selector.by = "kl"
    with pytest.raises(UserError, match="selector 'kl' asks what the teacher's attention does in the student"):
        convert(teacher_folder, recipe, tmp_path / "out", data=text)
    with pytest.raises(UserError, match="student.changes names 'num_hiden_layers': did you mean 'num_hidden_layers'"):
        convert(teacher_folder, cab(changes={"num_hiden_layers": 2}), tmp_path / "out", data=text)


def test_a_gpt2_teacher_and_a_smaller_student(tmp_path):
    teacher = tiny("gpt2")
    config = AutoConfig.for_model("gpt2", **{**FAMILIES["gpt2"], "n_layer": 2})
    student = Student.from_config(config, lambda shapes: Plan.by_layer(shapes, [], "discrete_mamba2"))
    _, result = train(tmp_path, {**BRIDGE, "tokens": 20 * 4 * T}, teacher=teacher, student=student)
    assert result.final_loss < result.first_loss and len(shapes_of(teacher)) == 3
    assert make_student(teacher).plan.num_layers == 3
