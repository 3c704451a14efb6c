"""Conformance checks of a student, as one public function: properties that generation relies on.

Use: `check_student(Student.from_pretrained("runs/quick"))`.

Legend: B batch, T tokens, V vocabulary.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.model.student import Student
from subquad.plan import dtype_name

TOLERANCE = 1e-4  # of the largest logit's size, in float32; wider dtypes do better, narrower ones get more


class ConformanceError(AssertionError):
    """Failure of a conformance check, which the message names."""


@torch.no_grad()
def check_student(student: Student, *, length: int = 80, batch: int = 2, seed: int = 0) -> dict[str, float]:
    """Checks a student on random tokens; returns the largest deviation by check, relative to the largest logit.

    cached = uncached (token by token, and in uneven pieces); a left-padded batch = its single rows; a batch reordered
    in the cache = the reordered rows (beam search); bytes held by the cache = the plan's arithmetic; saved and loaded =
    the same logits, exactly; `generate()` = greedy decoding by hand; beam search runs.
    `length` tokens (at least 8), `batch` rows. Raises ConformanceError naming the check that failed.
    """
    # Random tokens, their logits without a cache, and the allowed deviation
    was_training = student.training
    student.eval()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = next(student.get_input_embeddings().parameters()).shape[0]
    tokens_BT = torch.randint(3, vocabulary, (batch, length), generator=generator).to(student.device)
    full_BTV = student(tokens_BT, use_cache=False).logits
    scale = full_BTV.abs().max().clamp_min(1e-6)
    tolerance = TOLERANCE * max(1.0, torch.finfo(student.dtype).eps / torch.finfo(torch.float32).eps) ** 0.5
    deviations: dict[str, float] = {}

    def compare(check: str, logits: Tensor, expected: Tensor, limit: float = tolerance) -> None:
        deviations[check] = ((logits - expected).abs().max() / scale).item()
        if not deviations[check] <= limit:  # a NaN fails too
            raise ConformanceError(
                f"{check}: logits deviate by {deviations[check]:.1e} of the largest logit, allowed are {limit:.1e}"
            )

    # Decoding with a cache, and the cache's bytes
    compare("cached, token by token", _decoded(student, tokens_BT, [1] * length), full_BTV)
    compare("cached, in pieces", _decoded(student, tokens_BT, [length // 2, 3, 1, length - length // 2 - 4]), full_BTV)

    cache = student.new_cache()
    student(tokens_BT, past_key_values=cache, use_cache=True)
    planned_bytes = student.plan.cache_bytes(length, batch, dtype_name(student))
    deviations["cache bytes"] = float(abs(cache.nbytes() - planned_bytes))
    if cache.nbytes() != planned_bytes:
        raise ConformanceError(
            f"cache bytes: the cache has {cache.nbytes()} bytes, and the plan's arithmetic gives {planned_bytes}"
        )

    # Beam search: a batch that is reordered in the cache
    order = torch.arange(batch - 1, -1, -1, device=student.device)
    cache.reorder_cache(order)  # type: ignore[arg-type]  # asks for a LongTensor, which torch's types never give
    next_B1 = torch.randint(3, vocabulary, (batch, 1), generator=generator).to(student.device)
    cached_B1V = student(next_B1, past_key_values=cache, use_cache=True).logits
    uncached_B1V = student(torch.cat([tokens_BT[order], next_B1], 1), use_cache=False).logits[:, -1:]
    compare("reordered cache", cached_B1V, uncached_B1V)

    # Padding, generation, and the saved folder
    _check_padding(student, tokens_BT, compare)
    _check_generate(student, tokens_BT[:, : length // 2])
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        saved_student = Student.from_pretrained(folder, dtype=student.dtype).eval()
        saved_student.to(student.device)
        compare("saved and loaded", saved_student(tokens_BT, use_cache=False).logits, full_BTV, limit=0.0)
    student.train(was_training)
    return deviations


def _decoded(student: Student, tokens_BT: Tensor, pieces: list[int]) -> Tensor:
    """Logits (B, T, V) from feeding the tokens through the cache in pieces of these lengths."""
    cache, logits, start = student.new_cache(), [], 0
    for piece in pieces:
        part = tokens_BT[:, start : start + piece]
        logits.append(student(part, past_key_values=cache, use_cache=True).logits)
        start += piece
    return torch.cat(logits, 1)


def _check_padding(student: Student, tokens_BT: Tensor, compare: Callable[..., None]) -> None:
    """Compares each row of a left-padded batch, prefilled and decoded two steps, with the same row alone."""
    # Pad every row by another length
    batch, length = tokens_BT.shape
    pads = [(7 * row) % (length // 2) for row in range(1, batch + 1)]
    mask = torch.ones_like(tokens_BT)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    # Prefill all but two tokens, and decode these
    cache = student.new_cache()
    split = length - 2
    prefill_logits = student(
        tokens_BT[:, :split],
        attention_mask=mask[:, :split],
        position_ids=positions[:, :split],
        past_key_values=cache,
        use_cache=True,
    ).logits
    step_logits = [
        student(
            tokens_BT[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=positions[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for t in range(split, length)
    ]

    # Compare row by row
    batch_logits = torch.cat([prefill_logits, *step_logits], 1)
    for row, pad in enumerate(pads):
        row_logits = student(tokens_BT[row : row + 1, pad:], use_cache=False).logits
        compare(f"left-padded row {row}", batch_logits[row : row + 1, pad:], row_logits)


def _check_generate(student: Student, prompt_BT: Tensor, new_tokens: int = 6) -> None:
    """Compares `generate()` with greedy decoding by hand, and runs beam search."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model: Any = student  # transformers types `generate` for its own classes
    generated: Tensor = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **settings)
    eos_ids = student.generation_config.eos_token_id
    eos_ids = [] if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    tokens = prompt_BT
    for _ in range(new_tokens):
        logits = student(tokens, use_cache=False).logits[:, -1].float()
        logits[:, eos_ids] = -torch.inf  # as min_new_tokens does
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    if not torch.equal(generated, tokens):
        raise ConformanceError("generate() gives other tokens than greedy decoding by hand")
    beams: Tensor = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), num_beams=3, **settings)
    if beams.shape != generated.shape:
        raise ConformanceError(f"beam search returned {tuple(beams.shape)} instead of {tuple(generated.shape)}")
