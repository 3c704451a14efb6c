"""Losses layer by layer, teacher-forced and free, against their definitions; and what a stage may train."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from subquad.distill.free_running import FreeRunning
from subquad.distill.layer_losses import matrix_distance, output_distance
from subquad.distill.loop import make_pass
from subquad.distill.parameters import checkpointed_blocks, choose_parameters, make_optimizer, parameter_names
from subquad.distill.passes import layers_in_order
from subquad.distill.teacher_forced import TeacherForced
from subquad.errors import UserError
from subquad.mixers import MIXERS, HeadGroup, MixerInputs, mixer_options
from subquad.model.interface import AttentionCall, find_attention, shapes_of, watched_attention
from subquad.model.layer_call import ForwardContext
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Stage
from tests.helpers import ALIGN, T, make_student, tiny

B, D, M = 2, 8, 24


def stage(**settings):
    return Stage(**{**ALIGN, **settings})


def tokens(rows=2, seed=3):
    return torch.randint(3, 97, (rows, T), generator=torch.Generator().manual_seed(seed))


def mixer_and_inputs(name, *, window=None, **options):
    """A random mixer over four of six heads (with two key/value heads), and its inputs in float64."""
    torch.manual_seed(0)
    group = HeadGroup((0, 1, 3, 4), queries_per_kv=3, head_dim=D, hidden_size=M, window=window)
    mixer = MIXERS[name](group, mixer_options(name, options)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    draw = partial(torch.randn, dtype=torch.float64)
    inputs = MixerInputs(draw(B, 4, T, D), draw(B, 2, T, D), draw(B, 2, T, D), draw(B, T, M), scale=D**-0.5)
    call = AttentionCall(draw(B, 6, T, D), draw(B, 2, T, D), D**-0.5, None, not options.get("bidirectional", False))
    return mixer, inputs, call


def plain_distance(mixer, inputs, call):
    heads = list(mixer.group.heads)
    k_BHTD = call.k_BGTD.repeat_interleave(3, 1)
    scores = (call.scale * call.q_BHTD @ k_BHTD.transpose(-1, -2))[:, heads]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.causal:
        ahead = torch.arange(T)[:, None] - torch.arange(T)
        scores = scores.masked_fill((ahead < 0) | (ahead >= (mixer.group.window or T)), -torch.inf)
    difference = mixer.matrix(inputs) - scores.softmax(-1)
    return torch.linalg.matrix_norm(difference, "fro").mean()


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("options", [{}, {"share_state": True}, {"bidirectional": True}], ids=str)
def test_matrix_distance_of_every_mixer(name, options):
    fields = MIXERS[name].options_class.model_fields
    if name == "attention" or not options.keys() <= fields.keys():
        pytest.skip("it has no such option")
    mixer, inputs, call = mixer_and_inputs(name, **options)
    expected = plain_distance(mixer, inputs, call)
    in_one = matrix_distance(mixer, inputs, call)
    torch.testing.assert_close(in_one, expected)
    in_blocks = matrix_distance(mixer, inputs, call, block=5)
    torch.testing.assert_close(in_blocks, expected)
    parameters = [p for p in mixer.parameters()]
    if expected.requires_grad:
        grads = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (expected, in_one, in_blocks)]
        for plain_grad, grad, blocks_grad in zip(*grads, strict=True):
            assert (plain_grad is None) == (grad is None) == (blocks_grad is None)
            if plain_grad is not None:
                torch.testing.assert_close(grad, plain_grad)
                torch.testing.assert_close(blocks_grad, plain_grad)


def test_matrix_distance_knows_softcaps_and_windows():
    mixer, inputs, call = mixer_and_inputs("retention", window=4)
    capped = replace(call, softcap=0.7)
    torch.testing.assert_close(matrix_distance(mixer, inputs, capped, block=3), plain_distance(mixer, inputs, capped))
    assert matrix_distance(mixer, inputs, capped) != matrix_distance(mixer, inputs, call)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mistral"])
def test_the_matrix_stage_compares_with_the_teachers_own_probabilities(family):
    """The teacher's probabilities, as its eager attention returns them."""
    teacher = tiny(family)
    student = make_student(teacher, attention_layers=(1,), mixer="gla")
    align = TeacherForced(stage(objective="matrix", trainable=["mixers", "qkvo"]), student, teacher)
    choose_parameters(student, stage(trainable=["mixers", "qkvo"]), align.reachable)
    long_BT = torch.randint(3, 97, (1, 40))  # longer than the windows of 24
    losses = align(long_BT, 1.0)
    teacher.set_attn_implementation("eager")
    probabilities = teacher(long_BT, output_attentions=True).attentions
    matrices = {}

    def inspect(call):
        for name, mixer in call.mixers.items():
            matrices[call.layer] = mixer.matrix(call.inputs(name))
        return torch.zeros_like(call.all_inputs.q_BHTD)

    with torch.no_grad():  # layer 0 sees what the teacher's does; the matrices of others would be of other inputs
        student.final_hidden(long_BT, forward_context=ForwardContext(around=inspect))
    expected = torch.linalg.matrix_norm(matrices[0] - probabilities[0], "fro").mean()
    torch.testing.assert_close(losses["layer 0"], expected, rtol=1e-4, atol=1e-5)
    modules = student.attention_modules()
    assert all(p.grad is None for p in modules[1].parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in modules[2].parameters())


def test_watching_changes_nothing():
    teacher = tiny("llama")
    with torch.no_grad():
        logits = teacher(tokens()).logits
        with watched_attention(teacher) as calls:
            assert torch.equal(teacher(tokens()).logits, logits)
    assert len(calls) == 3 and teacher.config._attn_implementation == "sdpa"


def test_a_mixer_without_a_matrix_is_named(monkeypatch):
    teacher = tiny("llama")
    student = make_student(teacher, mixer="gla")
    monkeypatch.delattr(type(student.mixers(0)["gla"]).__mro__[1], "mix")
    with pytest.raises(UserError, match="stage 'align' compares mixing matrices, and mixer 'gla' has none"):
        make_pass(stage(objective="matrix"), student, teacher)


def gradients(student, training_pass, settings, input_ids_BT):
    parameters = choose_parameters(student, settings, training_pass.reachable)
    losses = training_pass(input_ids_BT, 1.0)
    return losses, {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_gap_over_all_layers_is_a_free_run(family):
    teacher = tiny(family)
    student = make_student(teacher, attention_layers=(), mixer="gla")
    forced, free = (
        stage(objective="block_output", trainable="all", gap=3),
        stage(objective="block_output", trainable="all", teacher_forced=False),
    )
    losses, grads = gradients(student, make_pass(forced, student, teacher), forced, tokens())
    student.zero_grad()
    free_losses, free_grads = gradients(student, make_pass(free, student, teacher), free, tokens())
    assert list(losses) == [f"layer {i}" for i in range(3)]
    for layer in range(3):
        torch.testing.assert_close(losses[f"layer {layer}"], free_losses[f"block_output of layer {layer}"])
    block_names = [name for name in grads if any(f".{layer}." in name for layer in range(3))]
    for name in block_names:
        if grads[name] is not None:
            torch.testing.assert_close(grads[name], free_grads[name], rtol=1e-4, atol=1e-6)
    assert any(grads[name] is not None for name in block_names)


def test_blocks_see_the_teachers_input_and_mlps_may_learn():
    teacher = tiny("llama")
    student = make_student(teacher, attention_layers=(1,), mixer="gla")
    settings = stage(objective="block_output", trainable="all")
    align = make_pass(settings, student, teacher)
    losses, grads = gradients(student, align, settings, tokens())
    assert losses.keys() == {"layer 0", "layer 2"}
    inputs, outputs = [], []
    blocks = [teacher.get_submodule(site.path.rpartition(".")[0]) for site in find_attention(teacher)]
    with torch.no_grad():
        hooks = [
            block.register_forward_hook(
                lambda module, args, kwargs, output: inputs.append((args, kwargs)) or outputs.append(output),
                with_kwargs=True,
            )
            for block in blocks
        ]
        teacher(tokens(), use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in (0, 2):
            args, kwargs = inputs[layer]
            student_BTM = student.blocks()[layer](*args, **kwargs)
            torch.testing.assert_close(losses[f"layer {layer}"], output_distance(student_BTM, outputs[layer]))
    assert any(".mlp." in name and grad is not None for name, grad in grads.items())
    assert not any("layers.1." in name for name in grads)


def test_a_weighted_sum_is_the_sum():
    teacher = tiny("llama")
    student = make_student(teacher, mixer="gla")
    names = {"matrix": 0.5, "mixer_output": 2.0, "block_output": 1.0}
    sum_pass = make_pass(stage(objective=names, trainable="all"), student, teacher)
    losses, grads = gradients(student, sum_pass, stage(trainable="all"), tokens())
    assert sum(sum_pass.weights.values()) == pytest.approx(3.5) and losses.keys() == sum_pass.weights.keys()
    total = {}
    for name, weight in names.items():
        student.zero_grad()
        settings = stage(objective=name, trainable="all")
        alone, alone_grads = gradients(student, make_pass(settings, student, teacher), settings, tokens())
        for part, loss in alone.items():
            torch.testing.assert_close(losses[f"{name} of {part}"], loss)
        for parameter, grad in alone_grads.items():
            if grad is not None:
                total[parameter] = total.get(parameter, 0) + weight * grad
    assert total
    for parameter, grad in total.items():
        torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=1e-6)


def test_free_hidden_states_join_the_logits():
    teacher = tiny("llama")
    student = make_student(teacher, mixer="gla")
    settings = stage(objective={"logits": 1.0, "mixer_output": 0.3}, trainable="all")
    training_pass = make_pass(settings, student, teacher)
    assert isinstance(training_pass, FreeRunning)
    losses, _ = gradients(student, training_pass, settings, tokens())
    assert losses.keys() == training_pass.weights.keys() == {"logits", *(f"mixer_output of layer {i}" for i in (0, 2))}
    forced = make_pass(stage(objective="mixer_output"), student, teacher)(tokens(), 1.0)
    torch.testing.assert_close(losses["mixer_output of layer 0"], forced["layer 0"])
    assert losses["mixer_output of layer 2"] != forced["layer 2"]  # which has the teacher's input


def test_layers_join_in_order():
    student = SimpleNamespace(replaced_layers=lambda: [*range(8)])
    assert layers_in_order(student, 0.01)[0] == [0]
    assert layers_in_order(student, 0.25)[0] == [0, 4]
    assert layers_in_order(student, 0.5) == ([0, 2, 4, 6], frozenset({1, 3, 5, 7}))
    assert layers_in_order(student, 0.75)[0] == [0, 1, 2, 4, 5, 6]
    assert layers_in_order(student, 1.0) == ([*range(8)], frozenset())


def test_layers_that_wait_attend():
    teacher = tiny("llama")
    student = make_student(teacher, attention_layers=(), mixer="gla")
    settings = stage(objective="logits", replaced=0.3)
    training_pass = make_pass(settings, student, teacher)
    losses, grads = gradients(student, training_pass, settings, tokens())
    plan = Plan.by_layer(student.plan.shapes, [1, 2], "gla")
    first_layer_student = Student.from_teacher(teacher, plan, mixers_from=student)
    alone, _ = gradients(
        first_layer_student, make_pass(stage(objective="logits"), first_layer_student, teacher), stage(), tokens()
    )
    assert losses["logits"] > 0
    torch.testing.assert_close(losses["logits"], alone["logits"])
    assert {name.split(".")[3] for name, grad in grads.items() if grad is not None} == {"0"}
    for objective in ("mixer_output", "block_output"):
        layer_pass = make_pass(stage(objective=objective, replaced=0.3), student, teacher)
        assert layer_pass.weights == {"layer 0": 1.0}


SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6}


@pytest.mark.parametrize(
    "family, mlp, other_names",
    [
        ("llama", "mlp.", ["input_layernorm", "post_attention_layernorm", "embed_tokens", "model.norm"]),
        ("gpt2", "mlp.", ["ln_1", "ln_2", "wte", "ln_f"]),
        ("gpt_neox", "mlp.", ["input_layernorm", "embed_in", "final_layer_norm"]),
        ("phi", "mlp.", ["input_layernorm", "lm_head", "final_layernorm"]),
        ("opt", "fc1", ["self_attn_layer_norm", "embed_positions"]),
    ],
)
def test_sets_of_parameters(family, mlp, other_names):
    if family in ("phi", "opt"):
        options = {"ffn_dim": 64, "word_embed_proj_dim": 48} if family == "opt" else {}
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options)).eval()
    else:
        teacher = tiny(family)
    shapes = shapes_of(teacher)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [1], "gla"))
    all_names = {name for name, _ in student.named_parameters()}
    find = {wish: parameter_names(student, wish, stage()) for wish in ("mixers", "qkvo", "all", "all but mlp")}
    assert find["all"] == all_names
    assert find["mixers"] == {name for name in all_names if ".mixer." in name} != set()
    assert find["qkvo"] and all(".1." not in name and ".mixer." not in name for name in find["qkvo"])
    attention = [path for layer, path in enumerate(student.config.attention_paths) if layer != 1]
    attention_names = {name for name in all_names if any(f"backbone.{path}." in name for path in attention)}
    assert find["qkvo"] | find["mixers"] == attention_names
    without = all_names - find["all but mlp"]
    assert any(mlp in name for name in without)
    assert not any(".mixer." in name or "attn" in name.replace("self_attn_layer_norm", "") for name in without)
    assert all(any(part in name for name in find["all but mlp"]) for part in other_names)


def test_trained_names_may_be_combined_and_have_their_own_rates():
    student = make_student(tiny("llama"), mixer="gla")
    settings = stage(trainable=["mixers", "qkvo", "*norm*"], lr_groups={"qkvo": 1e-5})
    parameters = choose_parameters(student, settings, {name for name, _ in student.named_parameters()})
    groups = make_optimizer(parameters, settings, student).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in parameters.items()}
    assert {lr for name, lr in by_name.items() if "q_proj" in name} == {1e-5}
    assert {lr for name, lr in by_name.items() if "q_proj" not in name and ".mixer." in name or "norm" in name} == {
        1e-2
    }


def test_checkpointed_blocks_change_nothing():
    teacher = tiny("llama")
    student = make_student(teacher, mixer="gla")
    settings = stage(objective="logits", trainable="all")
    training_pass = make_pass(settings, student, teacher)
    _, grads = gradients(student, training_pass, settings, tokens())
    grads = {name: grad.clone() for name, grad in grads.items()}
    runs = []
    handle = student.backbone.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    student.zero_grad()
    with checkpointed_blocks(student, True):
        _, recomputed = gradients(student, training_pass, settings, tokens())
    handle.remove()
    assert len(runs) == 2  # once more, in the backward pass
    assert all(torch.equal(recomputed[name], grad) for name, grad in grads.items())
    assert not any(module.training for module in student.modules())
    student.backbone.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="Llama.* has no gradient checkpointing"), checkpointed_blocks(student, True):
        pass


@pytest.mark.parametrize("objective", ["logits", "labels", {"labels": 1.0, "logits": 0.5}], ids=str)
@pytest.mark.parametrize("classes", [97, 91, 101], ids="teacher of {} tokens".format)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_weights_get_the_gradient_of_the_whole_model(tied, classes, objective):
    """Of the loss as defined, through the model's own logits: the output head's too, whoever the teacher is."""
    teacher = tiny("llama", torch.float64, vocab_size=classes, tie_word_embeddings=tied)
    student = make_student(tiny("llama", torch.float64, tie_word_embeddings=tied), attention_layers=(1,), mixer="gla")
    settings = stage(objective=objective, trainable="all", teacher_forced=False)
    rows_BT = tokens() % 91
    _, grads = gradients(student, make_pass(settings, student, teacher), settings, rows_BT)
    student.zero_grad()

    logits_BTV, teacher_BTV = student(rows_BT, use_cache=False).logits, teacher(rows_BT).logits
    shared = min(97, classes) if "logits" in settings.weights else 97
    log_q, log_p = logits_BTV[..., :shared].log_softmax(-1), teacher_BTV[..., :shared].log_softmax(-1)
    losses = {"labels": F.cross_entropy(log_q[:, :-1].flatten(0, 1), rows_BT[:, 1:].flatten())}
    if "logits" in settings.weights:
        losses["logits"] = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    sum(weight * losses[name] for name, weight in settings.weights.items()).backward()
    expected_grads = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )
    head = "backbone.model.embed_tokens.weight" if tied else "backbone.lm_head.weight"
    assert grads[head].abs().max() > 0
