"""Tiny random teachers of many families, one thread (tiny products gain nothing from two), and no network."""

import os
import signal
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


def make_teacher(folder):
    """A tiny Llama with a tokenizer of words w0 ... w92."""
    tiny("llama").save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def make_text(folder):
    """Sixty documents of random words."""
    torch.manual_seed(0)
    for document in range(60):
        words = " ".join(f"w{int(i)}" for i in torch.randint(0, 93, (120,)))
        (folder / f"{document}.txt").write_text(words, encoding="utf-8")
    return [str(folder)]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def ctrl_c():
    """Call it to press Ctrl-C; it works in tests that were started in the background, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield partial(signal.raise_signal, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler was not put back"
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
