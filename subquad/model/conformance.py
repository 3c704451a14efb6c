"""Conformance checks of a student, as one public function: properties that generation relies on.

Use: `check_student(Student.from_pretrained("runs/quick"))`.

Some models of transformers deviate from themselves: padded, or cached in pieces. A check that fails is repeated on the
teacher, which is the student's backbone with attention in all heads, and the student may deviate as much.

Legend: B batch, T tokens, V vocabulary.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from subquad.model.cache import CACHE
from subquad.model.interface import set_attention
from subquad.model.student import Student
from subquad.plan import dtype_name

TOLERANCE = 1e-4  # of the largest logit's size, in float32; wider dtypes do better, narrower ones get more
SLACK = 10.0  # a student may deviate by this many times its teacher's own deviation

Compared = tuple[Tensor, Tensor]  # logits, and those that they should equal


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
    was_training = student.training
    student.eval()
    try:
        return _Check(student, length, batch, seed).run()
    finally:
        student.train(was_training)


class _Check:
    """The checks of one student, and its teacher for those that it fails."""

    def __init__(self, student: Student, length: int, batch: int, seed: int) -> None:
        self.student, self.batch, self.length = student, batch, length
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens_BT = self._random_tokens(length)
        self.tolerance = TOLERANCE * max(1.0, torch.finfo(student.dtype).eps / torch.finfo(torch.float32).eps) ** 0.5
        self.deviations: dict[str, float] = {}

    def _random_tokens(self, length: int) -> Tensor:
        rows = next(self.student.get_input_embeddings().parameters()).shape[0]
        return torch.randint(3, rows, (self.batch, length), generator=self.generator).to(self.student.device)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """Backbone of the student with attention in all heads."""
        student = self.student
        config: Any = copy.deepcopy(student.config)
        teacher: Any = student.make_backbone(config, config.attention)
        set_attention(teacher, config.attention)
        weights = {name: tensor for name, tensor in student.backbone.state_dict().items() if ".mixer." not in name}
        teacher.load_state_dict(weights, strict=False, assign=True)
        return teacher.to(student.device, student.dtype).eval()

    def run(self) -> dict[str, float]:
        """Runs all checks; returns the deviation of each."""
        length = self.length
        pieces = {
            "cached, token by token": [1] * length,
            "cached, in pieces": [length // 2, 3, 1, length - length // 2 - 4],
        }
        for check, sizes in pieces.items():
            self._compare(check, partial(self._cached, sizes=sizes))
        self._check_bytes()
        order = torch.arange(self.batch - 1, -1, -1, device=self.tokens_BT.device)
        next_B1 = self._random_tokens(1)
        self._compare("reordered cache", partial(self._reordered, order=order, next_B1=next_B1))
        for row in range(self.batch):
            self._compare(f"left-padded row {row}", partial(self._padded, row=row))
        self._check_generate()
        self._check_saved()
        return self.deviations

    def _compare(self, check: str, compute: Callable[[Any], Compared]) -> None:
        """Raises ConformanceError where the student deviates more than rounding and its teacher do."""
        limit, self.deviations[check] = self.tolerance, _deviation(*compute(self.student))
        if not self.deviations[check] <= limit:  # a NaN fails too
            cached = partial(self._cached, sizes=[1] * self.length)  # as all of these checks decode with a cache
            limit = max(limit, *(SLACK * _deviation(*check(self.teacher)) for check in (compute, cached)))
        if not self.deviations[check] <= limit:
            raise ConformanceError(
                f"{check}: logits deviate by {self.deviations[check]:.1e} of the largest logit, allowed are {limit:.1e}"
            )

    def _cached(self, model: Any, sizes: list[int]) -> Compared:
        """Logits from feeding the tokens through the cache in pieces of these sizes, and without a cache."""
        cache = _new_cache(model)
        logits = [model(piece, use_cache=True, **{CACHE: cache}).logits for piece in self.tokens_BT.split(sizes, 1)]
        return torch.cat(logits, 1), model(self.tokens_BT, use_cache=False).logits

    def _reordered(self, model: Any, order: Tensor, next_B1: Tensor) -> Compared:
        """Logits after one more token, from a cache whose batch was reordered, and without a cache."""
        cache = _new_cache(model)
        model(self.tokens_BT, use_cache=True, **{CACHE: cache})
        cache.reorder_cache(order)
        logits = model(next_B1, use_cache=True, **{CACHE: cache}).logits
        return logits, model(torch.cat([self.tokens_BT[order], next_B1], 1), use_cache=False).logits[:, -1:]

    def _padded(self, model: Any, row: int) -> Compared:
        """Logits of a row in a left-padded batch, prefilled and decoded two steps, and of the row alone."""
        # Pad every row by another length
        pads = [(7 * index) % (self.length // 2) for index in range(1, self.batch + 1)]
        mask = torch.ones_like(self.tokens_BT)
        for index, pad in enumerate(pads):
            mask[index, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)

        # Prefill all but two tokens, and decode these
        cache, start, logits = _new_cache(model), 0, []
        for end in (self.length - 2, self.length - 1, self.length):
            arguments = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], CACHE: cache}
            logits.append(model(self.tokens_BT[:, start:end], use_cache=True, **arguments).logits)
            start = end
        row_logits = model(self.tokens_BT[row : row + 1, pads[row] :], use_cache=False).logits
        return torch.cat(logits, 1)[row : row + 1, pads[row] :], row_logits

    def _check_bytes(self) -> None:
        """Compares the cache's bytes with the plan's arithmetic."""
        cache = self.student.new_cache()
        self.student(self.tokens_BT, past_key_values=cache, use_cache=True)
        planned_bytes = self.student.plan.cache_bytes(self.length, self.batch, dtype_name(self.student))
        self.deviations["cache bytes"] = float(abs(cache.nbytes() - planned_bytes))
        if cache.nbytes() != planned_bytes:
            raise ConformanceError(
                f"cache bytes: the cache has {cache.nbytes()} bytes, and the plan's arithmetic gives {planned_bytes}"
            )

    def _check_generate(self, new_tokens: int = 6) -> None:
        """Compares `generate()` with greedy decoding by hand, and runs beam search."""
        prompt_BT = self.tokens_BT[:, : self.length // 2]
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

        def generated(model: Any, **more: Any) -> Tensor:
            return model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **settings, **more)

        def by_hand(model: Any) -> Tensor:
            eos_ids = model.generation_config.eos_token_id
            eos_ids = [] if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
            tokens_BT = prompt_BT
            for _ in range(new_tokens):
                logits_BV = model(tokens_BT, use_cache=False).logits[:, -1].float()
                logits_BV[:, eos_ids] = -torch.inf  # as min_new_tokens does
                tokens_BT = torch.cat([tokens_BT, logits_BV.argmax(-1, keepdim=True)], 1)
            return tokens_BT

        student = self.student
        if not torch.equal(generated(student), by_hand(student)) and torch.equal(
            generated(self.teacher), by_hand(self.teacher)
        ):
            raise ConformanceError("generate() gives other tokens than greedy decoding by hand")
        beams = generated(student, num_beams=3)
        if beams.shape != (self.batch, prompt_BT.shape[1] + new_tokens):
            raise ConformanceError(f"beam search returned a tensor of shape {tuple(beams.shape)}")

    def _check_saved(self) -> None:
        """Compares a saved and loaded student with the student, exactly."""
        student = self.student
        with tempfile.TemporaryDirectory() as folder:
            student.save_pretrained(folder)
            saved_student = Student.from_pretrained(folder, dtype=student.dtype).eval()
            saved_student.to(student.device)
            logits, expected = (model(self.tokens_BT, use_cache=False).logits for model in (saved_student, student))
        self.deviations["saved and loaded"] = _deviation(logits, expected)
        if not torch.equal(logits, expected):
            raise ConformanceError(
                f"saved and loaded: logits deviate by {self.deviations['saved and loaded']:.1e}, none is allowed"
            )


def _new_cache(model: Any) -> Any:
    """Empty cache of a student or of its teacher."""
    return model.new_cache() if isinstance(model, Student) else DynamicCache(config=model.config)


def _deviation(logits: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected logit."""
    return ((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
