"""Students of every family: exact where nothing is replaced, and conformant where something is."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from subquad.errors import UserError
from subquad.mixers import MIXERS as ALL_MIXERS
from subquad.model import layer_call
from subquad.model.conformance import ConformanceError, check_student
from subquad.model.interface import find_attention, shapes_of
from subquad.model.layer_call import ForwardContext, LayerCall, attending
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import FAMILIES, tiny

MIXERS = {
    "sliding_window": {"window": 12, "sinks": 2},
    "linear": {"feature": "elu"},
    "hedgehog": {"window": 12, "sinks": 2},
    "liger": {"window": 12},
    "retention": {"state_dim": 4},
    "gla": {},
    "gated_deltanet": {"conv": 3},
    "mamba2": {"activation": True},
    "discrete_mamba2": {"share_state": True},
    "kda": {},
    "rwkv7": {"rotary": False},
}


def mixed_plan(shapes, mixer="hedgehog"):
    """One layer replaced, one head-level hybrid with uneven key/value groups, one that keeps attention."""
    first, second, third = (list(range(shape.heads)) for shape in shapes)
    layers = [{mixer: first}, {"attention": second[::4], mixer: [h for h in second if h % 4]}, {"attention": third}]
    return Plan(shapes=shapes, mixers={"attention": {}, mixer: MIXERS[mixer]}, layers=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_is_the_teacher_exactly(family):
    teacher = tiny(family)
    student = Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
    tokens = torch.randint(3, 97, (2, 40))
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    assert torch.equal(student(tokens, attention_mask=mask).logits, teacher(tokens, attention_mask=mask).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_conformance(family):
    teacher = tiny(family)
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    student.calibrate(torch.randint(3, 97, (2, 64)))
    check_student(student, batch=3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_conformance_of_every_mixer(mixer):
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher), mixer))
    student.calibrate(torch.randint(3, 97, (2, 64)))
    check_student(student, batch=3)


def test_every_mixer_has_a_conformance_row():
    assert MIXERS.keys() == ALL_MIXERS.keys() - {"attention"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention_heads", [[], [0, 3]], ids=["no head attends", "some heads attend"])
def test_a_mixer_may_go_without_rotary_embedding(family, attention_heads):
    """It gets the queries and keys of position 0, cached or not; the other heads keep rotary embedding."""
    teacher = tiny(family)
    shapes = shapes_of(teacher)
    mixer_heads = [head for head in range(6) if head not in attention_heads]
    layer = {"discrete_mamba2": mixer_heads} | ({"attention": attention_heads} if attention_heads else {})
    plan = Plan(shapes=shapes, mixers={"attention": {}, "discrete_mamba2": {}}, layers=[layer] * 3)
    student = Student.from_teacher(teacher, plan)
    check_student(student)
    mixer_inputs = []
    mixer = student.attention_modules()[0].mixer["discrete_mamba2"]
    mixer.register_forward_pre_hook(lambda module, args: mixer_inputs.append(args[0]))
    tokens = torch.full((1, 9), 7)  # the same token everywhere: only its position could tell its query apart
    student(tokens, use_cache=False)
    if family != "gpt2":  # whose positions are in the hidden states
        torch.testing.assert_close(mixer_inputs[0].q_BHTD, mixer_inputs[0].q_BHTD[:, :, :1].expand(-1, -1, 9, -1))
        torch.testing.assert_close(mixer_inputs[0].k_BGTD, mixer_inputs[0].k_BGTD[:, :, :1].expand(-1, -1, 9, -1))
    rotary_student = Student.from_teacher(
        teacher,
        Plan(shapes=shapes, mixers={"attention": {}, "discrete_mamba2": {"rotary": True}}, layers=[layer] * 3),
        mixers_from=student,
    )
    assert torch.equal(rotary_student(tokens).logits, student(tokens).logits) == (family == "gpt2")


def test_restored_and_observed_layers_attend_with_rotary_embedding():
    """Teacher-forced passes and restored layers equal the teacher's, also where the mixer uses no rotary embedding."""
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "discrete_mamba2"))
    tokens = torch.randint(3, 97, (2, 30))
    for context in (attending(range(3)), ForwardContext(around=LayerCall.attention)):
        hidden_BTM = student.final_hidden(tokens, forward_context=context)
        torch.testing.assert_close(student.backbone.lm_head(hidden_BTM), teacher(tokens).logits)


def test_a_call_leaves_nothing_behind():
    """Nor does one that fails: hidden states held by every layer would be as much memory as the activations."""
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    attributes = [{*vars(module)} for module in student.modules()]
    student(torch.randint(3, 97, (1, 5)))
    assert layer_call._current.get() is None
    hook = student.mixers(1)["hedgehog"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student(torch.randint(3, 97, (1, 5)))
    hook.remove()
    assert layer_call._current.get() is None
    assert [{*vars(module)} for module in student.modules()] == attributes


@pytest.mark.parametrize("mixer", ["hedgehog", "discrete_mamba2"])  # one with rotary embedding, one without
def test_threads_share_a_student(mixer):
    """A student serves several threads at once: no module holds what one call is about."""
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher), mixer))
    prompts = [torch.randint(3, 97, (1, length)) for length in (5, 9, 14, 20)]

    def write(prompt_1T):
        return student.generate(prompt_1T, max_new_tokens=12, do_sample=False)

    expected = [write(prompt_1T) for prompt_1T in prompts]
    with ThreadPoolExecutor(4) as pool:
        outputs = [*pool.map(write, prompts * 4)]
    assert all(torch.equal(row, expected[index % 4]) for index, row in enumerate(outputs))


def test_bidirectional_mixers_are_refused():
    teacher = tiny("llama")
    plan = Plan.by_layer(shapes_of(teacher), [1], "gla", {"bidirectional": True})
    with pytest.raises(UserError, match="'gla' is bidirectional, and LlamaForCausalLM predicts"):
        Student.from_teacher(teacher, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_any_attention(family):
    """A model with no attention layer left still counts its tokens (transformers' own caches cannot)."""
    teacher = tiny(family)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "gla"))
    check_student(student)


def test_eager_teacher_keeps_eager():
    teacher = tiny("llama")
    teacher.set_attn_implementation("eager")
    student = Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
    tokens = torch.randint(3, 97, (1, 20))
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


def test_half_precision():
    teacher = tiny("llama", dtype=torch.bfloat16)
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    check_student(student)


def test_check_student_finds_a_broken_cache():
    """The checks can fail: a student that forgets its states between steps is caught."""
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "gla"))
    mixer = student.attention_modules()[1].mixer["gla"]
    mix = mixer.mix
    mixer.mix = lambda inputs, state: mix(inputs, {})
    with pytest.raises(ConformanceError, match="cached"):
        check_student(student)


def test_tensors_are_shared_until_unshared():
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    student_parameters, teacher_parameters = dict(student.backbone.named_parameters()), dict(teacher.named_parameters())
    assert teacher_parameters.keys() < student_parameters.keys()
    for name, parameter in teacher_parameters.items():
        assert student_parameters[name].data_ptr() == parameter.data_ptr()
        assert student_parameters[name] is not parameter
    name = "model.layers.0.mlp.up_proj.weight"
    student.unshare([f"backbone.{name}"])
    with torch.no_grad():
        student_parameters[name].zero_()
    assert teacher_parameters[name].abs().sum() > 0


def test_mixers_are_taken_from_another_student():
    teacher = tiny("llama")
    shapes = shapes_of(teacher)
    linear = Student.from_teacher(teacher, Plan.by_layer(shapes, [], "hedgehog"))
    for _, parameter in linear.mixer_parameters():
        parameter.data.uniform_()
    hybrid = Student.from_teacher(teacher, Plan.by_layer(shapes, [1], "hedgehog"), mixers_from=linear)
    linear_parameters = dict(linear.mixer_parameters())
    hybrid_parameters = dict(hybrid.mixer_parameters())
    assert len(hybrid_parameters) == len(linear_parameters) * 2 // 3
    assert all(torch.equal(parameter, linear_parameters[name]) for name, parameter in hybrid_parameters.items())


def test_calibration_brings_the_student_nearer():
    teacher = tiny("llama")
    torch.manual_seed(0)
    tokens = torch.randint(3, 97, (2, 64))
    for mixer in MIXERS.keys() - {"sliding_window", "liger"}:  # which have nothing to calibrate
        options = MIXERS[mixer] if mixer == "hedgehog" else {}  # a window that does not hold the whole text
        student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], mixer, options))
        error = (student(tokens).logits - teacher(tokens).logits).square().mean()
        student.calibrate(tokens)
        assert (student(tokens).logits - teacher(tokens).logits).square().mean() < error, mixer


def test_a_plan_of_another_shape_is_refused():
    teacher = tiny("llama")
    with pytest.raises(UserError, match="another shape"):
        Student.from_teacher(tiny("gpt2"), Plan.all_attention(shapes_of(teacher)))


def test_unsupported_models_are_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(UserError, match="BloomForCausalLM does not call"):
        find_attention(bloom)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="encoder-decoder"):
        find_attention(t5)


def test_latent_attention_is_refused_by_name():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=1,
        n_routed_experts=2,
    )
    with pytest.raises(UserError, match="multi-head latent attention"):
        find_attention(AutoModelForCausalLM.from_config(config).eval())


def test_foreign_caches_are_refused():
    from transformers import DynamicCache

    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="new_cache"):
            student(torch.tensor([[3, 4]]), **{name: DynamicCache()})


@torch.no_grad()
def test_the_cache_has_two_names():  # transformers' generate passes past_key_values before 5.24, and cache since
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    tokens = torch.tensor([[3, 4, 5, 6]])
    full_logits = student(tokens).logits[:, -1]
    for name in ("past_key_values", "cache"):
        cache = student.new_cache()
        student(tokens[:, :3], **{name: cache})
        assert cache.get_seq_length() == 3
        torch.testing.assert_close(student(tokens[:, 3:], **{name: cache}).logits[:, -1], full_logits)
        assert cache.get_seq_length() == 4
