"""Teachers with recurrent layers of their own, shared keys, learned sinks, or layers without rotary embedding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from subquad.errors import UserError
from subquad.model.cache import CACHE, own_bytes
from subquad.model.conformance import check_student
from subquad.model.interface import record_outputs, shapes_of
from subquad.model.layer_call import attending
from subquad.model.student import Student
from subquad.plan import ATTENTION, Plan
from subquad.select.prefix import skip_below
from tests.helpers import ALIGN, GROUPED, LOGITS, make_student, train

LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
ALTERNATING = ["linear_attention", "full_attention"] * 2
SHARING = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 12, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
}  # fmt: skip

# family -> its configuration; the values are kinds of architecture
HYBRIDS = {
    # recurrent layers between attention layers, and beside attention in a layer
    "qwen3_5_text": {**LINEAR, "num_hidden_layers": 4, "layer_types": ALTERNATING},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 96},
    # one attention module that several layers call
    "zamba2": {
        "num_hidden_layers": 5, "hybrid_layer_ids": [1, 3], "mamba_d_state": 8, "n_mamba_heads": 12,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "mamba_headdim": 8, "mamba_expand": 2,
        "mamba_ngroups": 1, "attention_head_dim": 16, "attention_hidden_size": 96, "num_mem_blocks": 1,
        "chunk_size": 16, "adapter_rank": 4,
    },
    # layers that read the keys and values of earlier ones
    "gemma3n_text": {
        **SHARING, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6, "altup_num_inputs": 2,
        "intermediate_size": [64] * 6, "head_dim": 8,
    },
    "gemma4_text": {**SHARING, "head_dim": 8, "global_head_dim": 8},
    # learned sinks; layers without rotary embedding; complex tables; no keyword arguments for attention modules
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 12,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "no_rope_layers": [1, 0, 1],
                    "attn_temperature_tuning": False},
    "stablelm": {},
}  # fmt: skip
SECOND, THIRD = "discrete_mamba2", "hedgehog"
OPTIONS = {SECOND: {"rotary": False}, THIRD: {"window": 6, "sinks": 2}}


def hybrid(family, dtype=torch.float32, **changes):
    """A random teacher whose weights make masks and states show in the logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**GROUPED, **HYBRIDS[family], **changes})
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_()
    return model


def mixed_plan(shapes):
    layers = [{ATTENTION: [0], SECOND: [1, 2], THIRD: [*range(3, shape.heads)]} for shape in shapes]
    return Plan(shapes=shapes, mixers={ATTENTION: {}, **OPTIONS}, layers=layers)


SLOW = {"gemma4_text", "lfm2", "llama4_text", "stablelm"}
FEW = [pytest.param(family, marks=pytest.mark.slow) if family in SLOW else family for family in HYBRIDS]


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_a_student_computes_generates_and_saves_as_it_should(family):
    teacher = hybrid(family)
    shapes = shapes_of(teacher)
    tokens_BT = torch.randint(3, 97, (2, 20))
    teacher_logits = teacher(tokens_BT, use_cache=False).logits
    limit = 1e-5 * teacher_logits.abs().max()
    kept = Student.from_teacher(teacher, Plan.all_attention(shapes))
    assert (kept(tokens_BT, use_cache=False).logits - teacher_logits).abs().max() <= limit
    mixed = Student.from_teacher(teacher, mixed_plan(shapes))
    # Every layer restored: queries and keys of heads with and without rotary embedding are the teacher's
    hidden_BTM = mixed.final_hidden(tokens_BT, forward_context=attending(range(len(shapes))))
    restored_logits = kept.get_output_embeddings()(hidden_BTM)
    own_logits = kept.get_output_embeddings()(kept.final_hidden(tokens_BT))
    assert (restored_logits - own_logits).abs().max() <= 1e-5 * own_logits.abs().max()
    assert (mixed(tokens_BT, use_cache=False).logits - teacher_logits).abs().max() > 100 * limit
    for student in (kept, mixed):
        check_student(student, length=14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1", "zamba2", "gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_a_plan_knows_the_bytes_of_the_teachers_own_cache(family, dtype):
    teacher = hybrid(family, getattr(torch, dtype))
    cache = DynamicCache(config=teacher.config)
    teacher(torch.randint(3, 97, (2, 30)), use_cache=True, **{CACHE: cache})
    keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    values = [layer.values for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held_bytes = sum(x.nbytes for x in (*keys, *values)) + sum(map(own_bytes, cache.layers))
    shapes = shapes_of(teacher)
    for shape in shapes:
        if shape.kv_from is not None and shape.window is not None:  # has a short window of keys of its own
            held_bytes += 2 * 2 * keys[0].itemsize * shape.kv_heads * (shape.window - 1) * shape.head_dim
    assert Plan.all_attention(shapes).cache_bytes(30, 2, dtype) == held_bytes


def test_shared_keys_are_stored_once():
    shapes = shapes_of(hybrid("gemma3n_text"))
    assert [shape.kv_from for shape in shapes] == [None, None, None, None, 2, 3]
    kept = Plan.all_attention(shapes)
    without_source = kept.with_layers("gla", {}, [3])
    full_kv_bytes = 2 * 4 * shapes[3].kv_heads * shapes[3].head_dim * 1000
    state_bytes = Plan.by_layer(shapes, [], "gla").cache_bytes(1000) // 6
    assert kept.cache_bytes(1000) == kept.with_layers("gla", {}, [5]).cache_bytes(1000) - state_bytes
    assert without_source.cache_bytes(1000) == kept.cache_bytes(1000) + state_bytes  # layer 5 keeps the keys itself
    assert without_source.with_layers("gla", {}, [5]).cache_bytes(1000) == (
        kept.cache_bytes(1000) + 2 * state_bytes - full_kv_bytes
    )


@torch.no_grad()
def test_heads_keep_their_own_learned_sinks():
    teacher = hybrid("gpt_oss")
    shapes = shapes_of(teacher)
    heads = [(0, 1), (0, 4), (1, 0), (2, 5)]
    wide_window = {"window": 30, "sinks": 0}  # which sees all of the text, so it is attention
    student = Student.from_teacher(teacher, Plan.by_head(shapes, heads, "sliding_window", wide_window))
    narrow = [layer for layer, shape in enumerate(shapes) if shape.window is not None]
    tokens_BT = torch.randint(3, 97, (2, 12))  # within the teacher's own window of 12
    assert narrow
    expected_logits = teacher(tokens_BT, use_cache=False).logits
    torch.testing.assert_close(student(tokens_BT, use_cache=False).logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "gemma3n_text", "zamba2", "stablelm"])
@pytest.mark.parametrize(
    "settings", [ALIGN, {**ALIGN, "objective": "block_output"}, LOGITS], ids=["mixer", "block", "logits"]
)
def test_stages_train_students_of_hybrids(family, settings, tmp_path):
    teacher = hybrid(family)
    student = make_student(teacher, attention_layers=(), mixer="gla")
    _, result = train(tmp_path, {**settings, "tokens": 4 * 4 * 16}, teacher=teacher, student=student)
    assert result.steps == 4 and all(torch.isfinite(x).all() for x in student.state_dict().values())


@pytest.mark.parametrize("family", ["gemma3n_text", "zamba2", "qwen3_5_text"])
@torch.no_grad()
def test_a_pass_begins_in_the_middle(family):
    student = make_student(hybrid(family), attention_layers=(0,), mixer="gla")
    tokens_BT = torch.randint(3, 97, (2, 12))
    with record_outputs(student.blocks()) as outputs:
        expected_BTM = student.final_hidden(tokens_BT)
    outputs = [*outputs]
    for layer in range(len(student.blocks())):
        with skip_below(student, layer, outputs, times=2):
            hidden_BTM = student.final_hidden(tokens_BT.repeat(2, 1))
        assert torch.equal(hidden_BTM, expected_BTM.repeat(2, 1, 1))


def test_values_may_be_narrower_than_keys(monkeypatch):
    """As in latent attention, whose cache is compressed: it is refused when it is opened."""
    sizes = {"q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4}
    experts = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    monkeypatch.setitem(HYBRIDS, "deepseek_v3", {**sizes, **experts, "num_key_value_heads": 6})
    with pytest.raises(UserError, match="caches fewer keys and values than its heads read, .* 6 times as much"):
        shapes_of(hybrid("deepseek_v3", kv_lora_rank=16))
    teacher = hybrid("deepseek_v3", kv_lora_rank=128)  # not compressed
    student = Student.from_teacher(teacher, mixed_plan(shapes_of(teacher)))
    assert [shape.value_dim for shape in student.plan.shapes] == [8, 8, 8]
    tokens_BT = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        hidden_BTM = student.final_hidden(tokens_BT, forward_context=attending(range(3)))
        expected_BTM = teacher.model(tokens_BT, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden_BTM, expected_BTM, rtol=1e-4, atol=1e-4)
    check_student(student, length=14)


def test_a_layer_that_attends_twice_is_refused_by_name():
    config = AutoConfig.for_model("diffllama", **{**GROUPED, "head_dim": 8})
    with pytest.raises(UserError, match="DiffLlamaForCausalLM calls attention more than once in a layer"):
        shapes_of(AutoModelForCausalLM.from_config(config))
