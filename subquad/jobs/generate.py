"""The job behind `subquad generate`: a model continues a prompt."""

from pathlib import Path
from typing import Any, cast

import torch

from subquad.errors import UserError
from subquad.pretrained.load import load_pretrained


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The model's continuation of `prompt` (or, with `chat`, its answer), greedy at temperature 0."""
    loaded = load_pretrained(str(model))
    lm, tokenizer = loaded.model, loaded.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(lm.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast(Any, lm).generate(  # of GenerationMixin, which transformers' types hide
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    return str(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
