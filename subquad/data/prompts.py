"""Tokens of a prompt, which a model continues."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, framed: bool = True) -> dict[str, Tensor]:
    """Arguments of `generate` for a prompt: `input_ids` and `attention_mask`, each (1, T), int64.

    `framed`: with the tokens that the tokenizer puts before a text (BOS). Those that it puts behind one (EOS) are left
    out, because they tell a model that the text has ended.
    """
    encoded: Any = tokenizer(prompt, return_tensors="pt", add_special_tokens=framed)
    tokens = encoded["input_ids"].shape[1] - (_tokens_behind(tokenizer, prompt or "a") if framed else 0)
    return {name: encoded[name][:, :tokens] for name in ("input_ids", "attention_mask")}


def _tokens_behind(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of tokens that the tokenizer puts behind this text."""
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    framed: list[int] = tokenizer(text)["input_ids"]
    for before in range(len(framed) - len(bare) + 1):
        if framed[before : before + len(bare)] == bare:
            return len(framed) - before - len(bare)
    return 0
