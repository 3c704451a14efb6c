"""KL-guided scores: restore one layer's attention in the all-linear student; how much nearer the teacher does it come?

The score of layer l is KL(teacher, all-linear) - KL(teacher, all-linear with l restored), on text that training does
not see. This is SMART's score (Zebra-Llama, arXiv 2505.17272) and, without its retraining of each candidate, KL-guided
selection's (arXiv 2512.20569, "greedy addition"); every candidate shares the aligned mixers, so one alignment serves
all.

A restored layer is the teacher's own block, whatever an alignment stage trained there. Restoring layer l changes
nothing below l: the all-linear pass keeps the output of every decoder block, and a candidate's pass starts at block l,
so that L candidates cost about L / 2 forward passes. The KL is taken at every `stride`-th position.

Legend: B rows, T tokens, M model width.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.attention import find_attention
from subquad.distill.heads import Head, final_hidden
from subquad.distill.tokens import FromHidden, chunked_loss
from subquad.select.prefix import recorded, resumed
from subquad.student import Student


@dataclass
class KLScores:
    """`restored[l]`: KL in nats per token with layer l restored; `scores[l]`: what that gained over `all_linear`."""

    all_linear: float
    restored: list[float]
    tokens: int  # that went through the teacher
    seconds: float

    @property
    def scores(self) -> list[float]:
        return [self.all_linear - restored for restored in self.restored]


@torch.no_grad()
def kl_scores(
    student: Student,
    teacher: PreTrainedModel,
    tokens_BT: Tensor,
    *,
    stride: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> KLScores:
    """Scores every layer of an all-linear, aligned `student`. `progress`: called with (passes done, in all)."""
    start = time.perf_counter()
    layers, rows = student.plan.num_layers, len(tokens_BT)
    blocks = student.blocks()
    originals = [teacher.get_submodule(site.block) for site in find_attention(teacher)]
    sums = torch.zeros(layers + 1, dtype=torch.float64)  # the last is the all-linear student
    done = 0

    def kl(student_BTM: Tensor, teacher_BTM: Tensor) -> float:
        loss = chunked_loss(
            student_BTM[:, ::stride],
            Head.of(student),
            weights={"logits": 1.0},
            teacher=FromHidden(teacher_BTM[:, ::stride], Head.of(teacher)),
        )
        return float(loss.total)

    for row in tokens_BT.split(1):
        row = row.to(student.device)
        teacher_BTM = final_hidden(teacher, row)
        with recorded(blocks) as outputs:
            sums[layers] += kl(student.final_hidden(row), teacher_BTM)
        for layer in range(layers):
            with resumed(blocks, layer, outputs), _replaced(blocks[layer], originals[layer]):
                sums[layer] += kl(student.final_hidden(row), teacher_BTM)
            done += 1
            if progress is not None:
                progress(done, rows * layers)
    means = (sums / rows).tolist()
    return KLScores(means[-1], means[:-1], tokens_BT.numel(), time.perf_counter() - start)


@contextmanager
def _replaced(block: nn.Module, original: nn.Module) -> Iterator[None]:
    """Within, the teacher's block stands in for one of the student's."""

    def of_teacher(*args: Any, student_pass: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    block.forward = of_teacher
    try:
        yield
    finally:
        del block.forward
