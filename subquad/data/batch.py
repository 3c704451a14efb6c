"""What training reads: token ids, or images with their classes. B sequences or images, T tokens.

The order of reading is a function of (seed, epoch), so that a resumed run reads the same.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Images as a model reads them, and their classes (`UNLABELLED` where there are none)."""

    pixels_BCHW: Tensor
    labels_B: Tensor

    def __len__(self) -> int:
        return len(self.pixels_BCHW)

    def __getitem__(self, rows: slice) -> "ImageBatch":
        return ImageBatch(self.pixels_BCHW[rows], self.labels_B[rows])

    def chunk(self, count: int) -> list["ImageBatch"]:
        """As Tensor.chunk."""
        pairs = zip(self.pixels_BCHW.chunk(count), self.labels_B.chunk(count), strict=True)
        return [ImageBatch(pixels, labels) for pixels, labels in pairs]

    def to(self, device: torch.device) -> "ImageBatch":
        """As Tensor.to."""
        return ImageBatch(self.pixels_BCHW.to(device), self.labels_B.to(device))

    @property
    def device(self) -> torch.device:
        return self.pixels_BCHW.device

    def tolist(self) -> list[Any]:
        """What a hash of the batch is taken of."""
        return [self.labels_B.tolist(), hashlib.sha256(self.pixels_BCHW.numpy().tobytes()).hexdigest()]


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


def next_token_labels(input_ids_BT: Tensor) -> Tensor:
    """What every position should predict: the tokens one to the left, -100 (nothing) at the last position."""
    return F.pad(input_ids_BT[:, 1:], (0, 1), value=-100)


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `count` as one epoch reads them."""
    return np.random.default_rng([seed, epoch]).permutation(count)
