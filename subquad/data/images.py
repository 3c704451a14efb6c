"""Images to train and measure on: idx files (MNIST's format), folders by class, or an image set of `datasets`.

They are held as bytes and become what a model reads (floats of its size, mean and deviation) batch by batch. The order
is a function of (seed, epoch), so that a run which goes on reads what it would have read. The test part is the source's
own where it has one; else, as the selection part always is, it is cut off the training images.

Legend: N images, B images of a batch, C channels, H height, W width.
"""

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from subquad.errors import UserError
from subquad.interface import image_size

Part = Literal["train", "selection", "test"]

UNLABELLED = -100
IDX_TYPES = {8: np.uint8}
IDX_PARTS = {"train": "train", "test": "t10k"}


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


@dataclass(frozen=True)
class Pictures:
    """Bytes (N, C, H, W) and classes (N,)."""

    pixels_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def at(self, index: Tensor) -> "Pictures":
        """These of them."""
        return Pictures(self.pixels_NCHW[index], self.labels_N[index])


@dataclass(frozen=True)
class ImageSet:
    """Images in three parts, and what they become for a model."""

    parts: dict[Part, Pictures]
    classes: list[str]
    size: tuple[int, int]
    channels: int = 3
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def batch(self, step: int, *, batch: int, sequence_length: int = 0, seed: int = 0) -> ImageBatch:
        """The training images of one step; each is seen once an epoch. `sequence_length` is the model's own."""
        train = self.parts["train"]
        rows = []
        for row in range(step * batch, (step + 1) * batch):
            epoch, position = divmod(row, len(train))
            rows.append(int(_order(len(train), seed, epoch)[position]))
        return self._read(train.at(torch.tensor(rows)))

    def heldout(self, count: int, part: Part = "test") -> ImageBatch:
        """The first images of a part that training never sees. Raises UserError where it has not as many."""
        pictures = self.parts[part]
        if count > len(pictures):
            raise UserError(f"{count} images are wanted of the part '{part}', which has {len(pictures)}: ask for fewer")
        return self._read(pictures.at(torch.arange(count)))

    def share(self, share: float, seed: int = 0) -> "ImageSet":
        """The same set with this share of the training images, drawn at random."""
        train = self.parts["train"]
        kept = _order(len(train), seed, 0)[: max(1, round(share * len(train)))]
        return replace(self, parts={**self.parts, "train": train.at(kept)})

    def _read(self, pictures: Pictures) -> ImageBatch:
        pixels = pictures.pixels_NCHW.float() / 255
        if pixels.shape[1] != self.channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = torch.nn.functional.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(list(x))[: self.channels, None, None] for x in (self.mean, self.std))
        return ImageBatch((pixels - mean) / std, pictures.labels_N)


def _order(count: int, seed: int, epoch: int) -> Tensor:
    key = seed * 1_000_003 + epoch
    if _last.get("key") != (count, key):
        _last.update(key=(count, key), order=torch.randperm(count, generator=torch.Generator().manual_seed(key)))
    order: Tensor = _last["order"]
    return order


_last: dict[str, Any] = {}  # the order of the epoch under way


def load_images(
    source: str,
    config: Any,
    *,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> ImageSet:
    """The images of `source`, for a model with this configuration (its `image_size` and `num_channels`).

    `source`: a folder of idx files (`train-images-idx3-ubyte.gz` ...), a folder with one folder of images a class, or
    the name of an image set of `datasets`. `heldout_fraction`: of the training images for the selection part, and for
    the test part where the source has none.
    Raises UserError for a source that is none of these, damaged, or too small.
    """
    folder = Path(source)
    size = image_size(config)
    of_idx = folder.is_dir() and any(folder.glob("*-idx?-ubyte*"))
    pictures, classes = _idx(folder) if of_idx else _dataset(source, size)
    train = pictures["train"]
    order = _order(len(train), seed, 0)
    cut = round(heldout_fraction * len(train))
    if cut == 0 or len(train) - 2 * cut < 1:
        raise UserError(f"{source} has {len(train)} images to train on: too few to keep some of them apart")
    parts: dict[Part, Pictures] = {"selection": train.at(order[:cut]), "train": train.at(order[cut:])}
    if "test" in pictures:
        parts["test"] = pictures["test"]
    else:
        parts |= {"test": train.at(order[cut : 2 * cut]), "train": train.at(order[2 * cut :])}
    return ImageSet(parts, classes, size, config.num_channels, mean, std)


def _idx(folder: Path) -> tuple[dict[str, Pictures], list[str]]:
    found = {}
    for part, prefix in IDX_PARTS.items():
        pair = [sorted(folder.glob(f"{prefix}-{kind}-idx?-ubyte*")) for kind in ("images", "labels")]
        if all(pair):
            pixels, labels = (read_idx(files[0]) for files in pair)
            if len(pixels) != len(labels):
                raise UserError(f"{folder} has {len(pixels)} images and {len(labels)} labels for '{part}'")
            found[part] = Pictures(pixels[:, None], labels.long())
    if "train" not in found:
        raise UserError(
            f"{folder} has no images to train on: the files train-images-idx3-ubyte and ...-labels-... lack"
        )
    return found, [str(label) for label in range(int(found["train"].labels_N.max()) + 1)]


def read_idx(file: Path) -> Tensor:
    """An idx file of bytes, as it is or gzipped. Raises UserError for one that is damaged."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        zeros, kind, dimensions = int.from_bytes(data[:2], "big"), data[2], data[3]
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        if zeros or kind not in IDX_TYPES:
            raise ValueError("not an idx file of bytes")
        return torch.from_numpy(np.frombuffer(data, IDX_TYPES[kind], offset=4 + 4 * dimensions).reshape(shape).copy())
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise UserError(f"{file} is damaged or no idx file ({error}): copy it again") from None


def _dataset(source: str, size: tuple[int, int]) -> tuple[dict[str, Pictures], list[str]]:
    from datasets import load_dataset  # seconds to import

    try:
        name, how = ("imagefolder", {"data_dir": source}) if Path(source).is_dir() else (source, {})
        loaded: Any = load_dataset(name, **how)
    except Exception as error:  # whatever a library says of a file, a folder or the network
        raise UserError(f"no image set can be read from '{source}': {str(error).splitlines()[0]}") from None
    found: dict[str, Pictures] = {}
    classes: list[str] = []
    for part in ("train", "test"):
        if part in loaded:
            found[part], classes = _pictures(loaded[part], source, size)
    if "train" not in found:
        raise UserError(f"the image set '{source}' has no part 'train', but {', '.join(loaded)}")
    return found, classes


def _pictures(rows: Any, source: str, size: tuple[int, int]) -> tuple[Pictures, list[str]]:
    """The images of a part, each cut and scaled to the size, and the names of their classes."""
    features = rows.features
    image = next((name for name, kind in features.items() if type(kind).__name__ == "Image"), None)
    label = next((name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"), None)
    if image is None:
        raise UserError(f"'{source}' has no column of images, but {', '.join(features)}")
    arrays = [np.asarray(ImageOps.fit(picture.convert("RGB"), size[::-1])) for picture in rows[image]]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    labels = torch.full((len(pixels),), UNLABELLED) if label is None else torch.tensor(rows[label])
    return Pictures(pixels, labels), [] if label is None else list(features[label].names)
