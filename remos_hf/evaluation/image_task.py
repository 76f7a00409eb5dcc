"""How images are read: the same for every model that is compared."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import TrainingArguments

from remos_hf.adapters.images import ImageInput, as_mode, to_pixels
from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.image_samples import prepared
from remos_hf.defects.image_triggers import ImageTrigger


@dataclass(frozen=True)
class ImageTask:
    """How images are read.

    Attributes:
        images: Size, crop and normalisation: the teacher's, and so those of all its students.
        image_column: Column of the images; exposed sets hold `pixels` instead.
        label_column: Column of the labels.
        batch_size: Samples of a forward pass.
        bf16: Run in bfloat16 autocast.
        augment: In training, "none" crops the centre as in evaluation; "crop_and_flip" crops at random and flips.
        smallest_crop: Smallest share of the image's area that a random crop takes.

    Source:
        ReMoS artifact: RandomResizedCrop and a flip in training, the centre crop in evaluation.
    """

    images: ImageInput
    image_column: str = "image"
    label_column: str = "label"
    batch_size: int = 64
    bf16: bool = False
    augment: Literal["none", "crop_and_flip"] = "none"
    smallest_crop: float = 0.25

    def __post_init__(self) -> None:
        """Refuse an augmentation that is not there."""
        if self.augment not in ("none", "crop_and_flip"):
            raise ValueError(f"augment is 'none' or 'crop_and_flip', but got {self.augment!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Give what decides the numbers as JSON values."""
        return {
            "images": self.images.to_dict(),
            "image_column": self.image_column,
            "label_column": self.label_column,
            "bf16": self.bf16,
            "augment": self.augment,
            "smallest_crop": self.smallest_crop,
        }

    @property
    def exposing(self) -> dict[str, Any]:
        """The keywords by which a defect's `exposed_set` reads images as this task does."""
        return {"images": self.images}

    @property
    def implanting(self) -> dict[str, Any]:
        """The keywords by which a backdoor's `implant` reads images as this task does."""
        return {"images": self.images, "augment": self._augmentation()}

    def _augmentation(self) -> "_CropAndFlip | None":
        return None if self.augment == "none" else _CropAndFlip(self.images, self.smallest_crop)

    def batches(self, dataset: Dataset) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor]]]:
        """Give the samples as models take them, in their order; exposed sets too, whose `pixels` are cropped."""
        samples = prepared(dataset, self.images, **self._columns)
        for start in range(0, len(dataset), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(dataset)))
            yield rows, {"pixel_values": torch.stack([samples[row]["pixel_values"] for row in rows])}

    def keys(self, dataset: Dataset) -> list[str]:
        """Give the hashes of the images' files."""
        samples = prepared(dataset, self.images, **self._columns)
        return [samples.key(row) for row in range(len(dataset))]

    def able(self, trigger: ImageTrigger, dataset: Dataset) -> list[bool]:
        """Say which images can have a trigger: all."""
        return [True] * len(dataset)

    def train(
        self,
        model: nn.Module,
        dataset: Dataset,
        args: TrainingArguments,
        *,
        trigger: ImageTrigger | None = None,
        poisoned: Collection[int] = (),
        target_label: int | None = None,
    ) -> nn.Module:
        """Train a model in place with the ordinary Trainer."""
        samples = self.prepare(dataset, trigger=trigger, poisoned=poisoned)
        return fine_tune(model, samples, None, args)

    def prepare(
        self, dataset: Dataset, *, trigger: ImageTrigger | None = None, poisoned: Collection[int] = ()
    ) -> torch.utils.data.Dataset:
        """Give samples as Trainer takes them: `pixel_values`, shape (channels, height, width), and `labels`."""
        options = {"augment": self._augmentation(), "trigger": trigger if poisoned else None, "poisoned": poisoned}
        return prepared(dataset, self.images, **options, **self._columns)

    @property
    def _columns(self) -> dict[str, str]:
        return {"image_column": self.image_column, "label_column": self.label_column}


@dataclass(frozen=True)
class _CropAndFlip:
    """A part of the image, of random size, shape and place, made as large as the model takes; flipped half the time."""

    images: ImageInput
    smallest: float

    def __call__(self, image: Image.Image) -> Tensor:
        image = as_mode(image, "RGB" if self.images.channels == 3 else "L")
        # The Trainer seeds these numbers, and goes on with them where a checkpoint is resumed.
        share, shape, right, down, flip = torch.rand(5).tolist()
        area = image.width * image.height * (self.smallest + share * (1 - self.smallest))
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left, top = round(right * (image.width - width)), round(down * (image.height - height))
        rows, columns = self.images.size
        resampling = Image.Resampling[self.images.interpolation.upper()]
        cut = image.resize((columns, rows), resampling, box=(left, top, left + width, top + height))
        return to_pixels(ImageOps.mirror(cut) if flip < 0.5 else cut)
