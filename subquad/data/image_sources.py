"""Sources of images: idx files (MNIST's format), a folder per class, or an image set of `datasets`.

Images of idx files are kept in memory as bytes. An image set of `datasets` stays on disk and is decoded when read.

Legend: N images, C channels, H height, W width.
"""

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.utils.files import first_line, sha256_of_file

UNLABELLED = -100  # ignored by cross-entropy
IDX_TYPES = {8: np.uint8}
IDX_PARTS = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class InMemoryImages:
    """Images in memory: bytes (N, C, H, W) and classes (N,)."""

    pixels_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def select(self, index: Sequence[int]) -> "InMemoryImages":
        """Select images by their positions."""
        rows = torch.as_tensor(index)
        return InMemoryImages(self.pixels_NCHW[rows], self.labels_N[rows])

    def read(self) -> tuple[Tensor, Tensor]:
        """Return bytes (N, C, H, W) and classes (N,)."""
        return self.pixels_NCHW, self.labels_N


@dataclass(frozen=True)
class DatasetImages:
    """Rows of a `datasets` table, which a transformers image processor resizes and crops."""

    rows: Any
    image: str
    label: str | None
    processor: Any

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Sequence[int]) -> "DatasetImages":
        """Select images by their positions."""
        return DatasetImages(self.rows.select(index), self.image, self.label, self.processor)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return bytes (N, C, H, W) and classes (N,), `UNLABELLED` if there are none."""
        rows = self.rows[:]  # decodes all images, so it is called once
        images = [image.convert("RGB") for image in rows[self.image]]
        pixels_NCHW = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        labels = [UNLABELLED] * len(images) if self.label is None else rows[self.label]
        return pixels_NCHW.float().round().clamp(0, 255).to(torch.uint8), torch.tensor(labels)


Images: TypeAlias = InMemoryImages | DatasetImages


@dataclass(frozen=True)
class ImageSource:
    """All images of a source: training images, test images if it has any, and the names of the classes."""

    train: Images
    test: Images | None
    classes: list[str]
    sha256: str  # hash of the files, or the fingerprint of `datasets`


def open_image_source(source: str, processor: Any) -> ImageSource:
    """Open a folder of idx files (`train-images-idx3-ubyte.gz` ...), a folder with one subfolder of images per class,
    or an image set of `datasets`.

    Raises UserError for a source that is none of these, or damaged.
    """
    folder = Path(source)
    return _idx(folder) if folder.is_dir() and any(folder.glob("*-idx?-ubyte*")) else _dataset(source, processor)


def _idx(folder: Path) -> ImageSource:
    parts, digest = {}, hashlib.sha256()
    for part, prefix in IDX_PARTS.items():
        pair = [sorted(folder.glob(f"{prefix}-{kind}-idx?-ubyte*")) for kind in ("images", "labels")]
        if all(pair):
            pixels, labels = (read_idx(files[0]) for files in pair)
            if len(pixels) != len(labels):
                raise UserError(f"{folder} has {len(pixels)} images and {len(labels)} labels for '{part}'")
            parts[part] = InMemoryImages(pixels[:, None], labels.long())
            digest.update("".join(sha256_of_file(files[0]) for files in pair).encode())
    if "train" not in parts:
        raise UserError(
            f"{folder} has no training images: train-images-idx3-ubyte or train-labels-idx1-ubyte is missing"
        )
    classes = [str(label) for label in range(int(parts["train"].labels_N.max()) + 1)]
    return ImageSource(parts["train"], parts.get("test"), classes, digest.hexdigest())


def read_idx(file: Path) -> Tensor:
    """Read an idx file of bytes, plain or gzipped. Raises UserError if it is damaged."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        zeros, element_type, dimensions = int.from_bytes(data[:2], "big"), data[2], data[3]
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        if zeros or element_type not in IDX_TYPES:
            raise ValueError("not an idx file of bytes")
        return torch.from_numpy(
            np.frombuffer(data, IDX_TYPES[element_type], offset=4 + 4 * dimensions).reshape(shape).copy()
        )
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise UserError(f"{file} is damaged or no idx file ({error}): copy it again") from None


def _dataset(source: str, processor: Any) -> ImageSource:
    from datasets import load_dataset  # takes seconds to import

    try:
        name, options = ("imagefolder", {"data_dir": source}) if Path(source).is_dir() else (source, {})
        parts: Any = load_dataset(name, **options)
    except Exception as error:  # any error of a library about a file, a folder or the network
        raise UserError(f"no image set can be read from '{source}': {first_line(error)}") from None
    if "train" not in parts:
        raise UserError(f"the image set '{source}' has no part 'train', but {', '.join(parts)}")
    features = parts["train"].features
    image = next((name for name, feature in features.items() if type(feature).__name__ == "Image"), None)
    label = next((name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"), None)
    if image is None:
        raise UserError(f"'{source}' has no column of images, but {', '.join(features)}")
    images = {part: DatasetImages(rows, image, label, processor) for part, rows in parts.items()}
    classes = [] if label is None else list(features[label].names)
    return ImageSource(images["train"], images.get("test"), classes, parts["train"]._fingerprint)
