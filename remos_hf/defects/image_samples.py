"""Images as a model takes them: decoded, cropped, with a trigger where they are poisoned, then normalised."""

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Array3D, Dataset, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from remos_hf.adapters.images import ImageInput, check_pixels, decoded
from remos_hf.defects.base import PIXELS
from remos_hf.defects.samples import check_columns, check_labels, resolved_label
from remos_hf.errors import CorruptFileError

logger = logging.getLogger(__name__)

# Gives the pixels of an image, from 0 to 1, shape (channels, height, width), as they are seen while training.
Augment = Callable[[Image.Image], Tensor]

_ROUNDING = 1e-3  # how far resampling may leave the range from 0 to 1


class Stamp(Protocol):
    """What images ask of a trigger: what it is worth, and how it is put onto pixels from 0 to 1."""

    target_label: int | str

    def stamped(self, pixels: Tensor, key: str) -> Tensor:
        """Give the pixels with the trigger; the key tells the image from others."""


class PreparedImages(torch.utils.data.Dataset):
    """Images as a model takes them: decoded, cropped, with the trigger where they are poisoned, then normalised.

    Made by `prepared` and `ImageTrigger.poison`. Items are `{"pixel_values": float tensor of shape (channels, height,
    width), "labels": int}`.

    Attributes:
        labels: Of all samples; the target label where they are poisoned.
        poisoned: Rows with the trigger.
    """

    def __init__(
        self,
        rows: Dataset,
        images: ImageInput,
        labels: list[int],
        column: str,
        augment: Augment | None,
        trigger: Stamp | None,
        poisoned: frozenset[int],
    ) -> None:
        self.labels, self.poisoned = labels, poisoned
        self._rows, self._images, self._column = rows, images, column
        self._augment, self._trigger = augment, trigger

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.normalised(self.pixels(index)), "labels": self.labels[index]}

    def key(self, index: int) -> str:
        """Tell a sample from others: `image_key` of its image."""
        return image_key(self._rows[index][self._column])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Give what the model takes."""
        return self._images.normalised(pixels)

    def pixels(self, index: int) -> Tensor:
        """Give what the model sees before normalisation: values from 0 to 1, shape (channels, height, width).

        Raises:
            CorruptFileError: The image does not decode; names it.
            ValueError: `augment` gave something else than such pixels.
        """
        found = self._rows[index][self._column]
        if self._column == PIXELS:
            values = torch.from_numpy(found.copy())
            return values.float() / 255 if not values.is_floating_point() else values.float()
        image = _image_of(found, index)
        pixels = self._images.pixels(image) if self._augment is None else self._augment(image)
        if self._augment is not None:
            if not isinstance(pixels, Tensor) or pixels.ndim != 3 or pixels.shape[0] != self._images.channels:
                raise ValueError(
                    f"augment gives a tensor of shape ({self._images.channels}, height, width), but gave "
                    f"{tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__}."
                )
            check_range(pixels)
        return self._trigger.stamped(pixels, image_key(found)) if index in self.poisoned else pixels


def prepared(
    dataset: Dataset,
    images: ImageInput,
    *,
    augment: Augment | None = None,
    trigger: Stamp | None = None,
    poisoned: Collection[int] = frozenset(),
    image_column: str = "image",
    label_column: str = "label",
) -> PreparedImages:
    """Read images as a model takes them; the same way whether they are clean, poisoned or exposed.

    Args:
        dataset: Samples with an image and a label column; or an exposed set's, whose `pixels` are cropped already.
        images: How the model reads images.
        augment: Crops and augments for training, on the way from a decoded image to pixels from 0 to 1, shape
            (channels, height, width). By default the crop that the model is evaluated with.
        trigger: Put onto the poisoned rows, which get its target label.
        poisoned: Those rows.
        image_column: Column of the images: `datasets.Image`, the bytes of files, or their paths.
        label_column: Column of the labels.

    Raises:
        ValueError: A column is missing or holds no images, a label is no class, the data has no such target label,
            there are no such rows, or the trigger does not fit on the images.
    """
    if PIXELS in dataset.column_names and image_column not in dataset.column_names:
        if augment is not None or trigger is not None:
            raise ValueError(f"The column '{PIXELS}' holds what a model sees: it takes no augmentation and no trigger.")
        image_column = PIXELS
    check_readable(dataset, image_column=image_column, label_column=label_column)
    rows, labels = undecoded(dataset, image_column), list(dataset.with_format(None)[label_column])
    poisoned = frozenset(poisoned)
    if not poisoned <= set(range(len(labels))):
        raise ValueError(f"poisoned names rows from 0 to {len(labels) - 1}, but got {sorted(poisoned)[-1]}.")
    if trigger is not None:
        target = resolved_label(trigger.target_label, dataset, label_column)
        labels = [target if row in poisoned else label for row, label in enumerate(labels)]
        trigger.stamped(torch.zeros(images.channels, *images.size), key="")  # refuse before anything is read
    elif poisoned:
        raise ValueError("poisoned rows are given, but no trigger to put onto them.")
    return PreparedImages(rows, images, labels, image_column, augment, trigger, poisoned)


def whole_images(dataset: Dataset, image_column: str = "image") -> Dataset:
    """Leave out the images that do not decode, and log how many. Every image is decoded once.

    Args:
        dataset: Samples.
        image_column: Column of the images.
    """
    check_columns(dataset, (image_column,))
    rows = undecoded(dataset, image_column).select_columns([image_column])
    whole, corrupt = [], []
    for index, row in enumerate(rows):
        try:
            _image_of(row[image_column], index)
            whole.append(index)
        except CorruptFileError:
            corrupt.append(_name_of(row[image_column], index))
    if not corrupt:
        return dataset
    more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
    logger.warning(
        "Left out %d of %d images that do not decode: %s%s.", len(corrupt), len(rows), ", ".join(corrupt[:5]), more
    )
    return dataset.select(whole)


def image_key(image: Mapping[str, Any] | bytes | str) -> str:
    """Tell an image from others by the hash of its file, wherever the file lies.

    Args:
        image: The bytes of a file, a path, or a row of an undecoded `datasets.Image` column.
    """
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    return hashlib.sha256(Path(image).read_bytes() if isinstance(image, str) else image).hexdigest()


def check_readable(dataset: Dataset, *, image_column: str, label_column: str) -> None:
    """Refuse data without images and classes.

    Raises:
        TypeError: They are a stream.
        ValueError: There is no sample, a column is missing, or a label is no class.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            "Which images are poisoned is decided over all of them: a datasets.Dataset is expected, but got "
            f"{type(dataset).__name__}."
        )
    check_columns(dataset, (image_column, label_column))
    if not len(dataset):
        raise ValueError("The data hold no sample.")
    check_labels(dataset.with_format(None)[label_column], label_column)


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """Give the rows with images as the files hold them."""
    rows, feature = dataset.with_format(None), dataset.features[column]
    if isinstance(feature, Array3D) and column == PIXELS:
        return dataset.with_format("numpy", columns=[column])
    if isinstance(feature, ImageFeature):
        return rows.cast_column(column, ImageFeature(decode=False))
    held_in_files = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()
    if not held_in_files and not (isinstance(feature, Value) and feature.dtype in ("binary", "string")):
        raise ValueError(
            f"Column '{column}' should hold images (datasets.Image, bytes or paths), but holds {feature}. Name "
            "another one with image_column=."
        )
    return rows


def _image_of(found: Any, index: int) -> Image.Image:  # noqa: ANN401 - any form of an image
    if found is None:
        raise CorruptFileError(f"There is no image in row {index}. Filter such rows out first.")
    return decoded(found, _name_of(found, index))


def _name_of(image: Any, index: int) -> str:  # noqa: ANN401 - any form of an image
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    return path or f"the image of row {index}"


def check_range(pixels: Tensor) -> None:
    """Refuse what are no pixels from 0 to 1.

    Raises:
        TypeError: They are whole numbers.
        ValueError: They have another shape than images, or lie outside.
    """
    check_pixels(pixels)
    if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3):
        raise ValueError(
            "Pixels have the shape (channels, height, width) or (samples, channels, height, width), with one or three "
            f"channels, but got {tuple(pixels.shape)}."
        )
    if pixels.numel() and not (pixels.min() >= -_ROUNDING and pixels.max() <= 1 + _ROUNDING):
        raise ValueError(
            f"Pixels are from 0 to 1 before normalisation, but these are from {pixels.min():.3g} to "
            f"{pixels.max():.3g}. Triggers and augmentation come before normalisation."
        )
