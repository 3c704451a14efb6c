"""Images for training and evaluation as a model reads them: floats with its size, mean and deviation, in batches.

The test part is the source's own if it has one. Otherwise it is split off the training images, as the selection part
always is.

Legend: B images of a batch, C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from subquad.data.batch import ImageBatch, epoch_order
from subquad.data.image_sources import Images, open_image_source
from subquad.errors import UserError

Part = Literal["train", "selection", "test"]


@dataclass(frozen=True)
class ImageSet:
    """Images in three parts, with a model's size and normalisation. An image is `tokens` tokens to the model."""

    parts: dict[Part, Images]
    classes: list[str]
    size: tuple[int, int]
    channels: int = 3
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    tokens: int = 1
    sha256: str = ""
    name: str = "images"

    def batch(self, step: int, *, batch: int, sequence_length: int = 0, seed: int = 0) -> ImageBatch:
        """Read the training images of one step; each is read once an epoch. `sequence_length` is ignored."""
        train = self.parts["train"]
        rows = []
        for row in range(step * batch, (step + 1) * batch):
            epoch, position = divmod(row, len(train))
            rows.append(int(epoch_order(len(train), seed, epoch)[position]))
        return self._read(train.select(rows))

    def sample(self, tokens: int) -> ImageBatch:
        """Read training images of about `tokens` tokens in total, at least one."""
        return self.batch(0, batch=min(len(self.parts["train"]), max(1, tokens // self.tokens)))

    def heldout(self, count: int, part: Part = "test") -> ImageBatch:
        """Read the first `count` images of a held-out part. Raises UserError if it has fewer."""
        [images] = self.heldout_batches(count, part, batch=count)
        return images

    def heldout_batches(self, count: int, part: Part = "test", batch: int = 64) -> Iterator[ImageBatch]:
        """Read the same images in batches, to limit memory. Raises UserError like `heldout`."""
        images = self.parts[part]
        if count > len(images):
            raise UserError(f"{count} images are wanted of the part '{part}', which has {len(images)}: ask for fewer")
        starts = range(0, count, batch)
        return (self._read(images.select(range(start, min(start + batch, count)))) for start in starts)

    @property
    def amount(self) -> str:
        """Amount of training data, as text for the console."""
        return f"{len(self.parts['train']):,} images of {self.tokens} tokens to train on"

    @property
    def sources(self) -> list[dict[str, str]]:
        """Name and hash of the source."""
        return [{"name": self.name, "sha256": self.sha256}]

    @property
    def remarks(self) -> list[str]:
        """Sentences for the console on what is odd about the images: none."""
        return []

    def _read(self, images: Images) -> ImageBatch:
        pixels_BCHW, labels_B = images.read()
        pixels_BCHW = pixels_BCHW.float() / 255
        if pixels_BCHW.shape[1] != self.channels:
            pixels_BCHW = pixels_BCHW.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(pixels_BCHW.shape[-2:]) != self.size:
            pixels_BCHW = torch.nn.functional.interpolate(pixels_BCHW, self.size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(list(x))[: self.channels, None, None] for x in (self.mean, self.std))
        return ImageBatch((pixels_BCHW - mean) / std, labels_B)


def load_images(
    source: str,
    processor: Any,
    *,
    channels: int = 3,
    tokens: int = 1,
    heldout_fraction: float = 0.1,
    max_images: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Load the images of `source` (image_sources.py), as a transformers image processor prepares them for a model.

    Args:
        channels: channels that the model reads.
        tokens: tokens that an image is to the model.
        heldout_fraction: share of the training images for the selection part, and for the test part if the source has
            none.
        max_images: largest number of training images, drawn with `seed`.

    Raises:
        UserError: the source is not a set of images, is damaged, or is too small.
    """
    # Split the training images; the test part is cut off them only if the source has none.
    image_source = open_image_source(source, processor)
    train = image_source.train
    order = epoch_order(len(train), 0, 0).tolist()  # the held-out images are the same for all seeds
    heldout_count = round(heldout_fraction * len(train))
    if heldout_count == 0 or len(train) - 2 * heldout_count < 1:
        raise UserError(f"{source} has {len(train)} training images: too few to hold some of them out")
    test = train.select(order[heldout_count : 2 * heldout_count]) if image_source.test is None else image_source.test
    train_order = order[heldout_count if image_source.test is not None else 2 * heldout_count :]
    if max_images is not None:
        train_order = [train_order[row] for row in epoch_order(len(train_order), seed, 0)[:max_images]]
    parts: dict[Part, Images] = {
        "train": train.select(train_order),
        "selection": train.select(order[:heldout_count]),
        "test": test,
    }
    # Size and normalisation of the model.
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    size = processed_size(processor)
    return ImageSet(
        parts, image_source.classes, size, channels, tuple(mean), tuple(std), tokens, image_source.sha256, source
    )


def processed_size(processor: Any) -> tuple[int, int]:
    """Height and width of an image processor's output. Raises UserError if they vary from image to image."""
    crop_size = getattr(processor, "do_center_crop", False) and processor.crop_size
    size = dict(crop_size or processor.size)
    if not (size.get("height") and size.get("width")):
        raise UserError(
            "the teacher's image processor gives images of various sizes: give it a height and a width, or a "
            "crop_size, in preprocessor_config.json"
        )
    return size["height"], size["width"]
