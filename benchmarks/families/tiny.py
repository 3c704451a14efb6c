"""Tiny random models of every causal language model and image encoder that transformers has.

A family's own default configuration is shrunk by the names of its attributes (`SIZES`), so that a new family needs no
row here. Of its layers, as many are kept as show every value of its per-layer lists.

Notable:
- Weights have standard deviation 0.2: attention is sharp enough that a wrong mask or state shows in the logits.
- `OVERRIDES` is for what no name tells. It should stay short.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from subquad.model.tasks import TASKS, TEXT, Task

VOCABULARY, POSITIONS, WIDTH, HEADS, HEAD_DIM, LAYERS, WINDOW = 97, 256, 64, 4, 16, 3, 8
CLASSES, FEATURES = "image-classification", "image-feature-extraction"

# Largest value of an attribute whose whole name matches; the first match counts. Smaller defaults stay.
SIZES: Sequence[tuple[str, int]] = (
    (r"(\w+_)?vocab_size(_\w+)?|\w+_vocab|ngram_vocab_size_base", VOCABULARY),
    (r"(\w+_)?(max_position_embeddings|max_seq_len|n_positions|n_ctx|context_length|max_length)", POSITIONS),
    (r"max_\w+_positions|num_position_embeddings", POSITIONS),
    (r"n_(input|recurrent|output)_layers", 1),
    (r"(\w+_)?num_(hidden_)?layers(_per_stack)?|n_layers?|\w+coder_layers|num_blocks|depth", LAYERS),
    (r"(\w+_)?num_(key_value|kv|query)_(heads|groups)|(\w+_)?num_key_heads", HEADS // 2),
    (r"(\w+_)?(num|n|attention|value|mamba)_heads|n_head|(\w+_)?num_attention_heads", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"(\w+_)?(head_?dim|head_size)|d_head|dim_head|kv_channels|d_kv|qk_(nope|rope)_head_dim", HEAD_DIM),
    (r"(\w+_)?(experts_per_tok(en)?|moe_k|topk|topk_group|top_k)", 2),
    (r"(n|num)_(expert_)?groups?|\w+_n?_?groups", 2),
    (r"(\w+_)?(num|n)_(\w+_)?experts|zero_expert_num|moe_num_experts", 4),
    (r"(\w+_)?(sliding_window|window_size|sliding_window_size|chunk_size|window_len)|local_attention", WINDOW),
    (r"(\w+_)?(rank|lowrank)", 16),
    (r"(\w+_)?(state_size|d_state|block_size)", 16),
    (r"(\w+_)?(period|interval)", 2),
    (r"(\w+_)?offset", 1),
    (r"(\w+_)?image_size", 64),
    (r"patch_size", 8),
    (r"(\w+_)?(hidden_size|embed_dim|embedding_size|embd_dim|proj_dim|emb_dim)(_\w+)?|d_model|n_embd", WIDTH),
    (r"embedding_dim|lru_width|\w+_(out|output|input|in)_dim|projection_(dim|size)|(\w+_)?(output|input)_size", WIDTH),
    (r"(\w+_)?(intermediate_size|ffn_dim|ffn_size|d_ff|d_inner)(_\w+)?|feed_forward_size", WIDTH),
    (r"n_inner|dff|dim_ff|mlp_dim", WIDTH),
)  # fmt: skip

SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ZAMBA = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS, "mamba_dt_rank": 4}
INDEXER = {"indexer_budget": 16, "indexer_compress_ratio": 4}

# model type -> attributes of its configuration, over those that `SIZES` gives
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    # Hybrids whose default has no attention layer, or nothing else
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, **ZAMBA},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # The last layers share keys and values with earlier ones of the same kind
    "gemma3n_text": {
        **SHARING,
        "intermediate_size": [WIDTH] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "gemma4_text": SHARING,
    # Sizes that must agree, or that the default leaves open although the model needs them
    "depth_pro": {"intermediate_hook_ids": [2, 1]},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {"rope_parameters": {kind: ROPE for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": HEADS // 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "mamba2": {"num_heads": 2 * WIDTH // HEAD_DIM},
    "reformer": {"axial_pos_embds_dim": [WIDTH // 2, WIDTH // 2], "axial_pos_shape": [16, 16]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, **INDEXER},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}

# Attributes that a default may leave open, and their values: those that the model would take by itself, or needs.
OPEN = {
    **{"head_dim": HEAD_DIM, "num_key_value_heads": HEADS // 2},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
}

STARTS = r"initializer_range|init_std|embed_init_std|initializer_factor"
LAYER_NUMBERS = r"(\w+_)?(layers|idxs|ids|indices|indexes)"


def families(task: str = TEXT) -> list[str]:
    """Model types of a task: of causal language models, or of image encoders with and without a classifier."""
    if task == TEXT:
        return sorted({*TASKS[TEXT].families} - {TASKS[TEXT].student_type})
    return sorted({*TASKS[CLASSES].families, *MODEL_FOR_IMAGE_MAPPING_NAMES})


def task_of(model_type: str) -> Task:
    """Task for which a family is tried: text if it has a causal language model, then classes, then features."""
    return next(task for task in TASKS.values() if model_type in task.families)


def make_tiny(model_type: str) -> PreTrainedModel:
    """Random float32 model of a family in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model: PreTrainedModel = task_of(model_type).auto.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Shrunken default configuration of a family."""
    default = CONFIG_MAPPING[model_type]
    config = default(**shrunken(default()))
    names = task_of(model_type).families[model_type]
    config.architectures = [names] if isinstance(names, str) else [names[0]]
    for part in parts(config):
        part.use_cache = True
        if hasattr(part, "is_decoder") and task_of(model_type).name == TEXT:
            part.is_decoder = True
        for name in vars(part):
            if re.fullmatch(STARTS, name):
                setattr(part, name, 0.2)
    return config


def parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Configuration and those inside it."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for value in inner for part in parts(value))]


def shrunken(config: PreTrainedConfig) -> dict[str, Any]:
    """Attributes of a configuration, shrunken; those that shrinking does not change are left to the default."""
    given = {field.name for field in fields(config)}  # others are computed from these  # type: ignore[arg-type]
    values = {name: value for name, value in vars(config).items() if name in given}
    staged = (isinstance(values.get(name), list | tuple) for name in ("num_heads", "num_attention_heads", "depths"))
    if any(staged):  # every stage has its own width: fewer blocks will do
        return {"depths": [1] * len(values["depths"])} if "depths" in values else {}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = {"model_type": value.model_type, **shrunken(value)}
        elif isinstance(value, dict):
            smaller = {key: _size(key, item) for key, item in value.items()}
            changed |= {name: smaller} if smaller != value else {}
        elif value is None and name in OPEN:
            changed[name] = OPEN[name]
        elif _size(name, value) != value:
            changed[name] = _size(name, value)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention has no groups
        changed["num_key_value_heads"] = HEADS
    return {**changed, **_layers(values), **OVERRIDES.get(config.model_type, {})}


def _size(name: str, value: Any) -> Any:
    """Value of an attribute, shrunken by its name."""
    if isinstance(value, list | tuple):
        return type(value)(_size(name, item) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(r"(\w+_)?token_(id|index)(s)?|\w+_id", name):
        return {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0)
    limits = (size for pattern, size in SIZES if re.fullmatch(pattern, name))
    return min(value, next(limits, value))


def _layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Number of layers, and per-layer lists cut to as few layers as show each of their values."""
    counts = {
        name: value
        for name, value in values.items()
        if isinstance(value, int) and _size(name, LAYERS + 1) == LAYERS and _size(name, 0) == 0
    }
    count = max(counts.values(), default=0)
    rows: dict[str, list[Any]] = {}
    for name, value in values.items():
        if not isinstance(value, list | tuple) or not value:
            continue
        if len(value) == count and not _are_numbers(name, value, count):
            rows[name] = [_size(name, item) for item in value]
        elif _are_numbers(name, value, count):
            rows[name] = [layer in value for layer in range(count)]
    if not rows:
        return {}
    chosen: list[int] = []
    for column in rows.values():
        chosen += [layer for layer in range(count) if column[layer] not in column[:layer]]
    spare = [layer for layer in range(count) if layer not in chosen]
    chosen = sorted({*chosen, *spare[: max(0, LAYERS - len({*chosen}))]})
    cut: dict[str, Any] = {name: len(chosen) for name, value in counts.items() if value == count}
    for name, column in rows.items():
        if _are_numbers(name, values[name], count):
            cut[name] = [index for index, layer in enumerate(chosen) if column[layer]]
        else:
            cut[name] = [column[layer] for layer in chosen]
    return cut


def _are_numbers(name: str, value: Sequence[Any], count: int) -> bool:
    """Whether a list names layers by their numbers."""
    numbers = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
    rising = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return len(numbers) == len(value) and rising and max(numbers) < count and bool(re.fullmatch(LAYER_NUMBERS, name))
