"""What training reads: token ids, or images with their classes. B sequences or images, T tokens."""

from typing import Protocol, TypeAlias

from torch import Tensor

from subquad.data.images import ImageBatch
from subquad.distill.tokens import next_token_labels

Batch: TypeAlias = Tensor | ImageBatch  # token ids (B, T), or images


class TokenSource(Protocol):
    """What training needs of a corpus: the token ids (batch, sequence_length) of a step, the same whenever asked.

    Or as many images, of `sequence_length` tokens each.
    """

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> Batch: ...


def inputs_of(batch: Batch) -> Tensor:
    """What a model reads of a batch: token ids (B, T), or pixels."""
    return batch.pixels_BCHW if isinstance(batch, ImageBatch) else batch


def labels_of(batch: Batch) -> Tensor:
    """The next token of every position (B, T), or the class of every image (B, 1)."""
    return batch.labels_B[:, None] if isinstance(batch, ImageBatch) else next_token_labels(batch)
