"""A GGUF file gives the very model that it was written from, or is refused, naming what has no place."""

import math

import numpy as np
import pytest
import torch

from subquad.errors import UserError
from subquad.pretrained.load import load_pretrained
from subquad.utils.files import sha256_of_file
from tests.helpers import tiny
from tests.pretrained.teachers import VOCABULARY, logits, write_gguf

SHORT_THETA = 100.0  # of tiny heads, so that each of their few frequencies turns within a test's tokens


def model_of(family: str = "llama", **changes) -> torch.nn.Module:
    return tiny(family, vocab_size=len(VOCABULARY), **changes)


def deviation(model: torch.nn.Module, other: torch.nn.Module, length: int = 20) -> float:
    """Largest absolute difference over the largest logit."""
    ids_BT = torch.arange(length)[None] % len(VOCABULARY)
    expected = other(ids_BT).logits
    return ((model(ids_BT).logits - expected).abs().max() / expected.abs().max()).item()


def test_a_gguf_file_is_converted_once(tmp_path, cache, monkeypatch):
    model = model_of()
    file = tmp_path / "Tiny.Q8.gguf"
    write_gguf(file, model)
    teacher = load_pretrained(str(file))
    assert teacher.name == "Tiny.Q8" and teacher.source == str(file)
    assert torch.allclose(logits(teacher.model), logits(model), atol=1e-5)
    assert "quantization_config" not in teacher.model.config.to_dict()
    # The file's metadata ask for single digits, although the merges would join them.
    assert teacher.tokenizer("a 12").tokens() == ["a", "Ġ", "1", "2"]
    assert "<|endoftext|>" in teacher.tokenizer.all_special_tokens + list(teacher.tokenizer.get_added_vocab())

    monkeypatch.setattr("subquad.pretrained.gguf._convert", lambda *_: pytest.fail("converted again"))
    again = load_pretrained(str(file), layers=1)
    assert again.model.config.num_hidden_layers == 1
    (converted,) = (cache / "teachers").iterdir()
    assert sha256_of_file(file)[:16] in converted.name
    teacher.model.save_pretrained(tmp_path / "saved")  # nothing of GGUF is left to refuse it


def test_other_gguf_tokenizers_keep_their_rule(tmp_path):
    write_gguf(tmp_path / "a.gguf", model_of(), pre="gpt-2")
    assert load_pretrained(str(tmp_path / "a.gguf")).tokenizer("a 12").tokens() == ["a", "Ġ", "12"]


@pytest.mark.parametrize("keep", [0, 3, 500, 0.5, 0.99])
def test_a_damaged_gguf_file(tmp_path, cache, keep):
    file = tmp_path / "a.gguf"
    write_gguf(file, model_of())
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"a\.gguf cannot be converted .* damaged or cut short") as raised:
        load_pretrained(str(file))
    assert "\n" not in str(raised.value)
    assert list((cache / "teachers").iterdir()) == []


# Rotary embedding.

ORIGINAL, FACTOR = 16, 4.0
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 0.2, "high_freq_factor": 1.0}
YARN = {"scaling.type": "yarn", "scaling.factor": FACTOR, "scaling.original_context_length": ORIGINAL}


def rope(**parameters) -> dict:
    """Rotary parameters of a short theta, as a tiny head has few frequencies."""
    scaled = {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
    return {"rope_parameters": {"rope_theta": SHORT_THETA, **scaled, **parameters}}


def frequencies(model: torch.nn.Module) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


def test_rotary_scaling_by_one_factor_a_frequency(tmp_path):
    """As in every Llama 3.1 and later."""
    model, unscaled = model_of(**rope(**LLAMA3)), model_of(rope_parameters={"rope_theta": SHORT_THETA})
    factors = {"rope_freqs.weight": (frequencies(unscaled) / frequencies(model)).numpy()}
    assert 1 == factors["rope_freqs.weight"].min() < factors["rope_freqs.weight"].max() == FACTOR
    write_gguf(tmp_path / "a.gguf", model, tensors=factors)
    loaded = load_pretrained(str(tmp_path / "a.gguf")).model
    assert deviation(loaded, model, length=60) < 1e-5
    assert deviation(unscaled, model, length=60) > 1e-2


@pytest.mark.parametrize(
    "parameters, settings",
    [
        ({"rope_type": "linear"}, {"scaling.type": "linear", "scaling.factor": FACTOR}),
        ({"rope_type": "linear"}, {"scaling.factor": FACTOR}),
        ({"rope_type": "linear"}, {"scale_linear": FACTOR}),
        ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": FACTOR}),
        ({"rope_type": "yarn"}, YARN),
        (
            {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5},
            {
                **YARN,
                "scaling.yarn_beta_fast": 4.0,
                "scaling.yarn_beta_slow": 0.5,
                "scaling.attn_factor": 1.5 / (1 + 0.1 * math.log(FACTOR)),
            },
        ),
    ],
)
def test_rotary_scaling_by_settings(tmp_path, parameters, settings):
    model = model_of(**rope(**parameters))
    write_gguf(tmp_path / "a.gguf", model, settings={f"rope.{key}": value for key, value in settings.items()})
    assert deviation(load_pretrained(str(tmp_path / "a.gguf")).model, model, length=60) < 1e-5
    if parameters["rope_type"] != "default":
        assert deviation(model_of(rope_parameters={"rope_theta": SHORT_THETA}), model, length=60) > 1e-2


def test_rotary_scaling_for_short_and_long_texts(tmp_path):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 1.5, 2.5, 4.0]}
    parameters = {"rope_theta": SHORT_THETA, "rope_type": "longrope", **factors}
    parameters["original_max_position_embeddings"] = ORIGINAL
    model = model_of(
        "phi3", rope_parameters=parameters, max_position_embeddings=64, original_max_position_embeddings=ORIGINAL
    )
    settings = {
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(64 / ORIGINAL) / math.log(ORIGINAL)),
        "rope.scaling.original_context_length": ORIGINAL,
    }
    tensors = {
        f"rope_factors_{part}.weight": np.array(factors[f"{part}_factor"], np.float32) for part in ("short", "long")
    }
    write_gguf(tmp_path / "a.gguf", model, "phi3", settings=settings, tensors=tensors)
    loaded = load_pretrained(str(tmp_path / "a.gguf")).model
    assert loaded.config.original_max_position_embeddings == ORIGINAL
    for length in (12, 40):
        assert deviation(loaded, model, length) < 1e-5


def test_rotary_embedding_on_a_share_of_each_head(tmp_path):
    model = model_of("phi3", rope_parameters={"rope_theta": SHORT_THETA, "partial_rotary_factor": 0.5})
    write_gguf(tmp_path / "a.gguf", model, "phi3", settings={"rope.dimension_count": 4})
    assert deviation(load_pretrained(str(tmp_path / "a.gguf")).model, model) < 1e-5
    write_gguf(tmp_path / "b.gguf", model_of(), settings={"rope.dimension_count": 4, "attention.key_length": 8})
    with pytest.raises(UserError, match=r"b\.gguf asks for rotary embedding that LlamaForCausalLM does not compute"):
        load_pretrained(str(tmp_path / "b.gguf"))


# Other settings.


@pytest.mark.parametrize(
    "family, changes, settings",
    [
        ("llama", {"rms_norm_eps": 0.1}, {}),
        ("llama", {"rope_parameters": {"rope_theta": SHORT_THETA}}, {}),
        ("qwen3", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
        ("qwen3", {}, {}),  # silence: the width divided among the heads, where transformers has 128
        ("qwen3", {"num_key_value_heads": 6}, {}),
        (
            "gemma2",
            {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
            {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention.sliding_window": 24},
        ),
        (
            "gemma2",
            {"query_pre_attn_scalar": 16, "sliding_window": 4},
            {"attention.scale": 0.25, "attention.sliding_window": 4},
        ),
        ("phi3", {"sliding_window": 5}, {"attention.sliding_window": 5}),
        ("phi3", {}, {"attention.key_length": 8, "logit_scale": 1.0, "expert_count": 0, "attention.causal": True}),
    ],
)
def test_settings_reach_the_model(tmp_path, family, changes, settings):
    model = model_of(family, **changes)
    without = ["attention.head_count_kv"] if changes.get("num_key_value_heads") == 6 else []
    write_gguf(tmp_path / "a.gguf", model, family, settings=settings, without=without)
    assert deviation(load_pretrained(str(tmp_path / "a.gguf")).model, model, length=40) < 1e-5


@pytest.mark.parametrize("length, heads, scalar", [(3, 6, 8), (46, 3, 16)])
def test_a_gemma_scales_its_scores_by_its_depth(tmp_path, length, heads, scalar):
    """The format leaves the scale to the reader: by a head's width, or in the largest model, by width over heads."""
    changes = {"num_hidden_layers": length, "num_attention_heads": heads, "num_key_value_heads": 1}
    model = model_of("gemma2", query_pre_attn_scalar=scalar, **changes)
    write_gguf(tmp_path / "a.gguf", model, "gemma2", settings={"attention.key_length": 8})
    assert load_pretrained(str(tmp_path / "a.gguf")).model.config.query_pre_attn_scalar == pytest.approx(scalar)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"logit_scale": 0.5}, r"logit_scale = 0\.5"),
        ({"residual_scale": 0.25, "embedding_scale": 12.0}, r"residual_scale = 0\.25, embedding_scale = 12\.0"),
        ({"attention.scale": 0.5}, r"attention\.scale = 0\.5"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0"),
        ({"attention.sliding_window": 16}, r"attention\.sliding_window = 16"),
        ({"attention.causal": False}, r"attention\.causal = False"),
        ({"attention.max_alibi_bias": 8.0}, r"attention\.max_alibi_bias = 8\.0"),
        ({"expert_count": 4, "expert_used_count": 2}, r"expert_count = 4, expert_used_count = 2"),
        ({"something_new": 3}, r"something_new = 3"),
        ({"rope.scaling.type": "newest"}, r"rope\.scaling\.type"),
        ({"rope.scaling.alpha": 50.0}, r"rope\.scaling\.alpha"),
    ],
)
def test_settings_without_a_place_are_refused(tmp_path, cache, settings, named):
    write_gguf(tmp_path / "a.gguf", model_of(), settings=settings)
    with pytest.raises(UserError, match=rf"a\.gguf has .*\({named}\)") as raised:
        load_pretrained(str(tmp_path / "a.gguf"))
    assert "\n" not in str(raised.value)
    assert list((cache / "teachers").iterdir()) == []


# Tensors.


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"without": ["blk.1.ffn_up.weight"]}, r"lacks 1 tensors of the model, e\.g\. blk\.1\.ffn_up\.weight"),
        ({"without": ["output_norm.weight", "token_embd.weight"]}, r"lacks 3 tensors .* \(lm_head\.weight\)"),
        ({"tensors": {"blk.1.ffn_up.weight": zeros(63, 48)}}, r"1 tensors of another shape .* blk\.1\.ffn_up\.weight"),
        ({"tensors": {"blk.2.attn_q.bias": zeros(48)}}, r"1 tensors .* no place for, e\.g\. blk\.2\.attn_q\.bias"),
        ({"tensors": {"blk.3.attn_norm.weight": zeros(48)}}, r"no place for, e\.g\. blk\.3\.attn_norm\.weight"),
        ({"tensors": {"rope_factors_new.weight": np.ones(4, np.float32)}}, r"\(rope_factors_new\.weight\)"),
    ],
)
def test_every_tensor_is_there_and_used(tmp_path, cache, changes, message):
    write_gguf(tmp_path / "a.gguf", model_of(), **changes)
    with pytest.raises(UserError, match=rf"a\.gguf .*{message}") as raised:
        load_pretrained(str(tmp_path / "a.gguf"))
    assert "\n" not in str(raised.value)
    assert list((cache / "teachers").iterdir()) == []
