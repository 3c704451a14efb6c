"""Settings in a GGUF file's metadata that transformers' reader leaves out, written into the configuration.

Notable:
- Every setting of the file ends in one of four ways: the configuration says the same after `settle`; the shapes of the
  tensors decide it, which are compared later; it has no effect; or the file is refused, naming it.
- Silence has a meaning, too: the format's own default, which may differ from that of transformers' class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from subquad.errors import UserError
from subquad.model.interface import shapes_of
from subquad.pretrained.gguf_file import GgufFile

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_eps")


@dataclass(frozen=True)
class Setting:
    """Fields of configurations that a setting may go to (the first that a class has), and values without effect."""

    fields: Sequence[str]
    neutral: Sequence[Any] = (0,)


SETTINGS = {
    "block_count": Setting(("num_hidden_layers",)),
    "embedding_length": Setting(("hidden_size",)),
    "attention.head_count": Setting(("num_attention_heads",)),
    "attention.head_count_kv": Setting(("num_key_value_heads", "num_kv_heads")),
    "attention.key_length": Setting(("global_head_dim", "head_dim")),
    "attention.layer_norm_rms_epsilon": Setting(_EPSILONS, ()),
    "attention.layer_norm_epsilon": Setting(_EPSILONS, ()),
    "attention.sliding_window": Setting(("sliding_window",)),
    "attention.sliding_window_pattern": Setting(("layer_types",)),
    "attention.scale": Setting(("attention_multiplier", "query_pre_attn_scalar")),
    "attention.output_scale": Setting((), (0, 1)),
    "attention.clamp_kqv": Setting(("clip_qkv",)),
    "attention.causal": Setting((), (True,)),
    "attn_logit_softcapping": Setting(("attn_logit_softcapping",)),
    "final_logit_softcapping": Setting(("final_logit_softcapping",)),
    "router_logit_softcapping": Setting(("router_logit_softcapping",)),
    "logit_scale": Setting(("logit_scale", "logits_scaling"), (0, 1)),
    "residual_scale": Setting(("residual_multiplier",), (0, 1)),
    "embedding_scale": Setting(("embedding_multiplier",), (0, 1)),
    "use_parallel_residual": Setting(("use_parallel_residual",)),
    "expert_count": Setting(("num_experts", "num_local_experts")),
    "expert_used_count": Setting(("num_experts_per_tok",)),
    "expert_weights_norm": Setting(("norm_topk_prob",)),
    "expert_weights_scale": Setting(("routed_scaling_factor",), (0, 1)),
    "expert_gating_func": Setting(("scoring_func",), (0, "softmax")),
}
# Settings that the shapes and names of the tensors decide, which are compared after loading, or that have no effect.
_DECIDED = {
    "vocab_size", "feed_forward_length", "attention.value_length", "attention.value_length_swa", "nextn_predict_layers",
    "attention.key_length_swa", "expert_feed_forward_length", "expert_shared_feed_forward_length",
    "expert_shared_count", "leading_dense_block_count", "full_attention_interval", "shortconv.l_cache",
    "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "context_length",
    "tensor_data_layout", "pooling_type",
}  # fmt: skip
_GATES = {1: "softmax", 2: "sigmoid"}
# Depths of the two Gemmas whose files mean scores scaled by the width over the heads; all others mean the head's width.
_SCALED_BY_WIDTH = (46, 62)


def settle(config: PreTrainedConfig, file: GgufFile) -> None:
    """Writes a file's settings into the configuration that transformers read from it; the rotary ones are elsewhere.

    Raises:
        UserError: settings that have an effect, and no place in the configuration.
    """
    known, refused = type(config)(), []
    for key, value in _values(file).items():
        setting = SETTINGS.get(key, Setting(()))
        field = next((field for field in setting.fields if hasattr(known, field)), None)
        if field == "query_pre_attn_scalar":
            value = round(value**-2) if math.isclose(value**-2, round(value**-2), rel_tol=1e-5) else value**-2
        if field is not None:
            if getattr(config, field) not in (value, max(value) if isinstance(value, list) else value):
                setattr(config, field, value)
        elif key not in _DECIDED and value not in setting.neutral and not _implied(file, key, value):
            refused.append(f"{key} = {file.settings.get(key, value)}")
    if refused:
        raise UserError(
            f"the GGUF file {file.path} has settings that {type(config).__name__} has no place for "
            f"({', '.join(refused)}): give the model's folder of safetensors instead"
        )
    if hasattr(known, "max_position_embeddings") and "context_length" in file.settings:
        config.max_position_embeddings = file.settings["context_length"]
    if "token_embd.weight" in file.shapes:
        config.vocab_size = file.shapes["token_embd.weight"][0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the class's own, where the file is silent
        if isinstance(index := getattr(config, name, None), int) and index >= config.get_text_config().vocab_size:
            setattr(config, name, None)


def check_windows(model: PreTrainedModel, file: GgufFile) -> None:
    """Compares the windows of a model's attention. Raises UserError if none has the file's."""
    window = file.settings.get("attention.sliding_window") or 0
    if 0 < window < file.settings.get("context_length", math.inf) and window not in {
        shape.window for shape in shapes_of(model)
    }:
        raise UserError(
            f"the GGUF file {file.path} asks for a window of {window} tokens, which {type(model).__name__} does not "
            "have: give the model's folder of safetensors instead"
        )


def _values(file: GgufFile) -> dict[str, Any]:
    """Settings other than rotary ones, in transformers' terms, with what the format means where a file is silent."""
    values = {key: value for key, value in file.settings.items() if not key.startswith("rope.")}
    heads, pattern = values["attention.head_count"], values.get("attention.sliding_window_pattern")
    width = values["embedding_length"] / heads if file.layers in _SCALED_BY_WIDTH else file.head_dim
    silent = {
        "attention.head_count_kv": heads,
        "attention.key_length": file.head_dim,
        "attention.scale": width**-0.5,
    }
    values = silent | values | {"block_count": file.layers}
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(file.layers)] if pattern else None
    if pattern is not None:
        kinds = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
        values["attention.sliding_window_pattern"] = kinds[: file.layers]
    if "expert_gating_func" in values:
        values["expert_gating_func"] = _GATES.get(values["expert_gating_func"], values["expert_gating_func"])
    return values


def _implied(file: GgufFile, key: str, value: Any) -> bool:
    """Whether a class without a field for a setting computes it anyway, as it is the only value that it knows."""
    heads = file.settings["attention.head_count"]
    only = {
        "attention.head_count_kv": heads,
        "attention.key_length": file.settings["embedding_length"] // heads,
        "attention.scale": file.head_dim**-0.5,
        "attention.sliding_window_pattern": ["full_attention"] * file.layers,
    }
    if key == "attention.scale":
        return math.isclose(value, only[key], rel_tol=1e-5)
    return bool(value == only.get(key))
