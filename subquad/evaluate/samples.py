"""Text to read: greedy continuations, so that teacher and student differ by their weights and not by luck."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.prompts import encode_prompt
from subquad.evaluate.likelihood import evaluating
from subquad.utils.text import well_formed


def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 64
) -> list[dict[str, str]]:
    """Continue each prompt greedily by up to `max_new_tokens` tokens.

    Returns [{"prompt", "text"}], `text` being the new part alone, without special tokens; broken characters in both are
    U+FFFD.
    """
    generate = cast(Any, model).generate  # of GenerationMixin, which every causal LM has and its types hide
    result = []
    with evaluating(model), torch.no_grad():
        for prompt in map(well_formed, prompts):
            encoded = {name: part.to(model.device) for name, part in encode_prompt(tokenizer, prompt).items()}
            ids_BT = generate(
                **encoded,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            )
            new = ids_BT[0, encoded["input_ids"].shape[1] :]
            result.append({"prompt": prompt, "text": well_formed(str(tokenizer.decode(new, skip_special_tokens=True)))})
    return result


def paired_samples(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
) -> list[dict[str, str]]:
    """Continuations of both models, as `samples` makes them: [{"prompt", "teacher", "student"}]."""
    by_teacher, by_student = (samples(model, tokenizer, prompts, max_new_tokens) for model in (teacher, student))
    return [
        {"prompt": teacher_sample["prompt"], "teacher": teacher_sample["text"], "student": student_sample["text"]}
        for teacher_sample, student_sample in zip(by_teacher, by_student, strict=True)
    ]
