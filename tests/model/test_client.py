"""A student as a client of transformers uses it: attention implementations, sizes, losses, options of `generate`."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    TextStreamer,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from subquad.errors import UserError
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import encoder, make_teacher, mixed_plan, tiny

TOKENS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def all_attention(teacher):
    return Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))


def hybrid(teacher, mixer="gla", **options):
    return Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [1], mixer, options))


@pytest.fixture(scope="module")
def teacher():
    return tiny("llama")


# Attention implementations


@pytest.mark.parametrize(
    "switch",
    [
        lambda student, name: student.set_attn_implementation(name),
        lambda student, name: student.set_attn_implementation({"text_config": name}),
        lambda student, name: student.backbone.set_attn_implementation(name),
        lambda student, name: student.backbone.model.set_attn_implementation(name),
        lambda student, name: setattr(student.config, "_attn_implementation", name),
        lambda student, name: setattr(student.backbone.config, "_attn_implementation", name),
    ],
    ids=["student", "sub-configuration", "backbone", "decoder", "configuration", "backbone's configuration"],
)
@torch.no_grad()
def test_an_attention_implementation_is_that_of_the_kept_heads(switch, teacher):
    student = hybrid(teacher)
    logits = student(TOKENS).logits
    calls = []

    def counted(module, *args, **kwargs):
        calls.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counted", counted)
    for name in ("counted", "eager", "sdpa"):
        switch(student, name)
        torch.testing.assert_close(student(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)
        inner = student.backbone.config
        assert inner._attn_implementation == name and str(inner._attn_implementation) == f"subquad_{name}"
        assert copy.deepcopy(inner)._attn_implementation == name != "other" and inner._attn_implementation != "other"
    assert len(calls) == 1  # the layer that keeps attention, once
    assert (student(TOKENS).logits - teacher(TOKENS).logits).abs().max() > 1


@pytest.mark.parametrize("requested", ["eager", "sdpa", {"text_config": "eager"}, {"": "eager"}, None])
@torch.no_grad()
def test_a_saved_student_loads_with_any_implementation(requested, teacher, tmp_path):
    student = hybrid(teacher)
    student.set_attn_implementation("eager")
    student.save_pretrained(tmp_path)
    wishes = {} if requested is None else {"attn_implementation": requested}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **wishes)
    base = requested if isinstance(requested, str) else "eager"
    assert loaded.backbone.config._attn_implementation == f"subquad_{base}"
    assert loaded.config._attn_implementation == base
    torch.testing.assert_close(loaded(TOKENS).logits, student(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_an_implementation_that_is_not_installed_gives_way(teacher, tmp_path):
    student = hybrid(teacher)
    student.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"attention": "sdpa"', '"attention": "flash_attention_2"'))
    loaded = Student.from_pretrained(tmp_path)
    assert loaded.backbone.config._attn_implementation == "subquad_sdpa"
    with pytest.raises(ImportError, match="FlashAttention2"):
        Student.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@torch.no_grad()
def test_image_students_keep_their_mixers_too():
    teacher = encoder("vit")
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    pixels = torch.randn(1, 3, 32, 32)
    hidden = student(pixels).last_hidden_state
    for name in ("eager", "sdpa"):
        student.set_attn_implementation(name)
        torch.testing.assert_close(student(pixels).last_hidden_state, hidden, atol=1e-5, rtol=1e-4)


# Attention weights


@torch.no_grad()
def test_attention_weights_are_the_teachers_or_refused():
    teacher = tiny("llama")
    student = all_attention(teacher)
    with pytest.raises(UserError, match="sdpa computes no attention weights.*attn_implementation='eager'"):
        student(TOKENS, output_attentions=True)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    expected = teacher(TOKENS, output_attentions=True).attentions
    weights = student(TOKENS, output_attentions=True).attentions
    assert len(weights) == 3 and all(map(torch.equal, weights, expected))
    student.config.output_attentions = True
    assert len(student(TOKENS).attentions) == 3
    for model, inputs in ((hybrid(teacher), TOKENS), (image_hybrid(), torch.randn(1, 3, 32, 32))):
        with pytest.raises(UserError, match="no attention weights where mixers replaced attention"):
            model(inputs, output_attentions=True)


def image_hybrid(auto=None):
    teacher = encoder("vit", **({} if auto is None else {"auto": auto, "num_labels": 4}))
    return ImageStudent.from_teacher(teacher, mixed_plan(teacher))


# Sizes and switches in the configuration

SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "use_cache",
]  # fmt: skip


def test_sizes_are_read_at_the_students_configuration(teacher, tmp_path):
    student = hybrid(teacher)
    student.save_pretrained(tmp_path)
    configs = [student.config, copy.deepcopy(student.config), pickle.loads(pickle.dumps(student.config))]
    configs += [copy.copy(student.config), Student.from_pretrained(tmp_path).config]
    for config in configs:
        assert [getattr(config, name) for name in SIZES] == [getattr(teacher.config, name) for name in SIZES]
        assert config.get_text_config().vocab_size == 97
        assert not hasattr(config, "no_such_size") and not hasattr(config, "_no_such_state")
    assert not set(SIZES) & student.config.to_dict().keys()
    assert tiny("gpt2").config.n_embd == all_attention(tiny("gpt2")).config.hidden_size == 48
    image_config = image_hybrid().config
    assert image_config.hidden_size == 48 and image_config.image_size == 32 and image_config.num_channels == 3


@torch.no_grad()
def test_switches_set_at_the_students_configuration_reach_its_backbone(tmp_path):
    student = hybrid(tiny("llama"))
    student.config.pad_token_id = 7
    student.config.use_cache = False
    student.config.output_hidden_states = True
    student.config.made_up = 1
    inner = student.backbone.config
    assert (inner.pad_token_id, inner.use_cache, hasattr(inner, "made_up")) == (7, False, False)
    output = student(TOKENS)
    assert output.cache is None and len(output.hidden_states) == 4
    student.save_pretrained(tmp_path)
    loaded = Student.from_pretrained(tmp_path, output_hidden_states=False)
    assert loaded.config.pad_token_id == 7 and loaded.config.made_up == 1
    assert loaded(TOKENS).hidden_states is None
    image_student = image_hybrid(AutoModelForImageClassification)
    image_student.config.num_labels = 5
    assert image_student.backbone.config.num_labels == 5


# Embeddings of another size


@pytest.mark.parametrize(("family", "tie"), [("llama", True), ("llama", False), ("gpt2", True)])
@torch.no_grad()
def test_embeddings_are_resized(family, tie, tmp_path):
    teacher = tiny(family, tie_word_embeddings=tie)
    expected = teacher(TOKENS).logits
    for student in (all_attention(teacher), hybrid(teacher)):
        before = student(TOKENS).logits
        student.resize_token_embeddings(120, mean_resizing=True)
        logits = student(TOKENS).logits
        assert logits.shape[-1] == 120 == student.config.vocab_size == student.vocab_size and torch.equal(
            logits[..., :97], before
        )
        assert student(TOKENS, labels=TOKENS).loss.isfinite()
        assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tie
        new_tokens = TOKENS + 20
        student.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(new_tokens).logits, student(new_tokens).logits)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tie
        assert torch.equal(
            loaded.generate(new_tokens, max_new_tokens=4), student.generate(new_tokens, max_new_tokens=4)
        )
        student.resize_token_embeddings(pad_to_multiple_of=64)
        assert student.config.vocab_size == 128
    assert teacher.config.vocab_size == 97 and torch.equal(teacher(TOKENS).logits, expected)


# Gradient checkpointing


def test_checkpointing_switches_the_cache_off(teacher):
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "gla")).requires_grad_(True).train()

    def gradient(**wishes):
        student.zero_grad()
        output = student(TOKENS, labels=TOKENS, **wishes)
        output.loss.backward()
        return output.cache, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    _, expected = gradient(use_cache=False)
    student.gradient_checkpointing_enable()
    for wishes in ({"use_cache": True}, {"use_cache": True, "cache": student.new_cache()}, {}):
        cache, grad = gradient(**wishes)
        assert cache is None
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # where nothing is recomputed
        cache = student(TOKENS, use_cache=True).cache
    assert cache.get_seq_length() == 20
    with pytest.raises(UserError, match="cannot continue a cache of 20 tokens"):
        student(TOKENS, cache=cache)


# Options of generate


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[4]], "sequence_bias": {(5,): 3.0}},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, 7]},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 8},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_takes_the_teachers_options(options, teacher):
    tokens = []
    for model in (teacher, all_attention(teacher), hybrid(teacher)):
        torch.manual_seed(0)
        tokens.append(model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, **options))
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[2].shape == tokens[0].shape and not torch.equal(tokens[0], tokens[2])


def test_generate_returns_the_teachers_scores_and_hidden_states(teacher):
    wishes = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    outputs = [
        model.generate(TOKENS, max_new_tokens=4, return_dict_in_generate=True, **wishes)
        for model in (teacher, all_attention(teacher))
    ]
    for name in ("scores", "logits"):
        assert all(map(torch.equal, *[getattr(output, name) for output in outputs]))
    first, second = ([state for step in output.hidden_states for state in step] for output in outputs)
    assert len(first) == 16 and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
def test_other_caches_are_refused(name, teacher):
    student = hybrid(teacher)
    with pytest.raises(UserError, match=f"a cache of its own: generate without cache_implementation='{name}'"):
        student.generate(TOKENS, max_new_tokens=2, cache_implementation=name)


def test_a_default_cache_of_the_teachers_is_no_wish():
    teacher = tiny("llama")
    teacher.generation_config.cache_implementation = "static"
    assert all_attention(teacher).generate(TOKENS, max_new_tokens=2).shape == (2, 22)


def test_continuous_batching_is_refused(teacher):
    student = hybrid(teacher)
    for call in (
        lambda: student.generate_batch(TOKENS.tolist(), max_new_tokens=2),
        lambda: student.generate(TOKENS, max_new_tokens=2, cache_implementation="paged"),
        lambda: student.init_continuous_batching(),
    ):
        with pytest.raises(UserError, match="continuous batching .* call generate with a padded batch"):
            call()


def test_a_pipeline_and_a_streamer_write_the_teachers_text(tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_teacher(tmp_path))
    teacher = tiny("llama")
    texts = []
    for model in (teacher, all_attention(teacher)):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(write(["w1 w2 w3", "w4"], max_new_tokens=5, do_sample=False, batch_size=2))
        model.generate(TOKENS[:1], max_new_tokens=5, streamer=TextStreamer(tokenizer))
    assert texts[0] == texts[1] and len(texts[0]) == 2
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first == second and len(first.split()) == 25


LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
}  # fmt: skip


def test_the_familys_own_generation_is_asked():
    """Phi-3 begins anew without a cache where its long rotary factors begin, at 33 tokens."""
    teacher = tiny("phi3", **LONG_ROPE)
    prompt = torch.randint(3, 97, (2, 28), generator=torch.Generator().manual_seed(0))
    wishes = {"max_new_tokens": 16, "min_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    expected, output = (model.generate(prompt, **wishes) for model in (teacher, all_attention(teacher)))
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(torch.equal, output.logits, expected.logits))
    student = hybrid(teacher)
    tokens = student.generate(prompt, max_new_tokens=16, min_new_tokens=16)
    for length in (32, 33, 43):  # before, at and behind the border
        logits = student(tokens[:, :length], use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # as min_new_tokens does
        assert torch.equal(logits.argmax(-1), tokens[:, length])


def test_hooks_of_generate_are_the_backbones(teacher):
    """Every hook that a family may override is asked of the backbone's class."""
    from transformers import GenerationMixin

    own = {"_prepare_cache_for_generation", "init_continuous_batching"}
    student = hybrid(teacher)
    asked = set()

    def watch(name, method):
        def call(self, *args, **kwargs):
            asked.add(name)
            return method(self, *args, **kwargs)

        return call

    hooks = {
        name
        for name in vars(GenerationMixin)
        if name.startswith(("prepare_inputs", "_prepare_", "_update_model", "_expand_inputs", "_validate_model"))
    }
    cls = type(student.backbone)
    student.backbone.__class__ = type(cls.__name__, (cls,), {n: watch(n, getattr(cls, n)) for n in hooks})
    student.generate(TOKENS, max_new_tokens=2)
    assert asked >= {
        "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prepare_generation_config",
        "_prepare_model_inputs", "_prepare_position_ids_for_generation", "_expand_inputs_for_generation",
        "_validate_model_kwargs",
    }  # fmt: skip
    assert not asked & own
