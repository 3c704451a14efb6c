"""Job of `subquad generate`: continues a prompt with a model."""

from pathlib import Path
from typing import Any, cast

import torch

from subquad.data.prompts import encode_prompt
from subquad.errors import UserError
from subquad.pretrained.load import load_pretrained
from subquad.utils.text import well_formed


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continuation of `prompt` by the model (with `chat`, its answer), greedy at temperature 0.

    Broken characters of the prompt, such as bytes that are not UTF-8, are read as U+FFFD.
    """
    prompt = well_formed(prompt)
    checkpoint = load_pretrained(str(model))
    lm, tokenizer = checkpoint.model, checkpoint.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"{model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    encoding = {name: part.to(lm.device) for name, part in encode_prompt(tokenizer, prompt, framed=not chat).items()}
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = cast(Any, lm).generate(  # a method of GenerationMixin, which transformers' types hide
        **encoding,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    return well_formed(str(tokenizer.decode(tokens[0, encoding["input_ids"].shape[1] :], skip_special_tokens=True)))
