"""Training batches: token ids, or images with their classes. B sequences or images, T tokens.

The order of the rows is a function of (seed, epoch), so a resumed run reads the same rows.
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
    """Images as a model reads them, and their classes (`UNLABELLED` if there are none)."""

    pixels_BCHW: Tensor
    labels_B: Tensor

    def __len__(self) -> int:
        return len(self.pixels_BCHW)

    def __getitem__(self, rows: slice) -> "ImageBatch":
        return ImageBatch(self.pixels_BCHW[rows], self.labels_B[rows])

    def chunk(self, count: int) -> list["ImageBatch"]:
        """Split the batch like Tensor.chunk."""
        pairs = zip(self.pixels_BCHW.chunk(count), self.labels_B.chunk(count), strict=True)
        return [ImageBatch(pixels, labels) for pixels, labels in pairs]

    def to(self, device: torch.device) -> "ImageBatch":
        """Move the batch to a device like Tensor.to."""
        return ImageBatch(self.pixels_BCHW.to(device), self.labels_B.to(device))

    @property
    def device(self) -> torch.device:
        return self.pixels_BCHW.device

    def tolist(self) -> list[Any]:
        """Return labels and a hash of the pixels, from which a batch is hashed."""
        return [self.labels_B.tolist(), hashlib.sha256(self.pixels_BCHW.numpy().tobytes()).hexdigest()]


Batch: TypeAlias = Tensor | ImageBatch  # token ids (B, T), or images


class TokenSource(Protocol):
    """The interface of training data: a batch for each step, the same on every call.

    A batch is token ids (batch, sequence_length), or `batch` images of `sequence_length` tokens each.
    """

    def batch(self, step: int, *, batch: int, sequence_length: int, seed: int) -> Batch: ...


def inputs_of(batch: Batch) -> Tensor:
    """Return the model's input in a batch: token ids (B, T), or pixels."""
    return batch.pixels_BCHW if isinstance(batch, ImageBatch) else batch


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch: the next token of every position (B, T), or the class of every image (B, 1)."""
    return batch.labels_B[:, None] if isinstance(batch, ImageBatch) else next_token_labels(batch)


def next_token_labels(input_ids_BT: Tensor) -> Tensor:
    """Shift the tokens left by one, so that each position gets the next token as label; -100 (ignored) at the end."""
    return F.pad(input_ids_BT[:, 1:], (0, 1), value=-100)


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permute the numbers below `count` for one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)
