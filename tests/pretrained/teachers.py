"""Tiny teachers on disk: a folder with a tokenizer of bytes, and a GGUF file as llama.cpp's converter writes it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny

VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "Ġ1", "<|endoftext|>", "<|im_end|>"]
MERGES = [("1", "2"), ("Ġ", "1")]


def save_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)


def save_teacher(folder: Path, family: str = "llama", **changes) -> torch.nn.Module:
    model = tiny(family, vocab_size=len(VOCABULARY), **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(20)[None]).logits


def write_gguf(
    file: Path,
    model: torch.nn.Module,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    settings: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray] = {},
    without: Collection[str] = (),
) -> None:
    """A model in float32, with these settings and tensors in addition, or instead, and without some of either."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    written = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        **settings,
    }
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in written.items():
        if key not in without:
            add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(VOCABULARY) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(len(VOCABULARY) - 1)
    for name, tensor in {**_tensors(model, architecture), **tensors}.items():
        if name not in without:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """Weights by GGUF's names: a Llama's queries and keys in llama.cpp's rotary layout, a Gemma's norms plus one."""
    config = model.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    result = {}
    for ours, tensor in model.state_dict().items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        weight = tensor.numpy()
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        if architecture.startswith("gemma") and "norm" in name:
            weight = weight + 1
        result[name] = weight
    return result
