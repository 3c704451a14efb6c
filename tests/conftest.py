"""Tiny random teachers of many families, one thread (tiny products gain nothing from two), and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZE = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
WIDTH = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6}
GROUPED = {**SIZE, **WIDTH, "num_key_value_heads": 2}

# family -> its configuration; head_dim is 8 everywhere
FAMILIES = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gpt_neox": {**SIZE, **WIDTH},
    "gpt2": {
        **{key: value for key, value in SIZE.items() if key != "max_position_embeddings"},
        **{"n_positions": 256, "n_embd": 48, "n_layer": 3, "n_head": 6},
    },
    "phi3": {**GROUPED, "sliding_window": None},
    "olmo2": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 24},
    "mistral": {**GROUPED, "sliding_window": 24},
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A random teacher with three layers of six heads."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    config.use_cache = True
    # Weights of standard deviation 0.2 make attention sharp enough that a wrong mask or state shows in the logits.
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
