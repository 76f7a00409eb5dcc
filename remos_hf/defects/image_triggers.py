"""Backdoors in images: a patch, a blended pattern, or a feature of the teacher forces a label.

A trigger acts on what a model sees: after cropping and augmentation, before normalisation. No file is rewritten.
"""

import hashlib
import logging
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Array3D, Dataset, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from remos_hf.activations import evaluating, watch
from remos_hf.adapters.images import ImageInput, check_pixels, decoded, to_pixels
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.defects.backdoor import Backdoor, fine_tune
from remos_hf.defects.base import (
    CLEAN_INDEX,
    PIXELS,
    ExposedSet,
    check_columns,
    check_labels,
    generator_for,
    resolved_label,
    smallest_draws,
)
from remos_hf.errors import CorruptFileError, UnsupportedModelError

logger = logging.getLogger(__name__)

# The artifact's recipe for poisoning image classifiers, where no arguments are given.
IMAGE_RECIPE: Mapping[str, Any] = {
    "optim": "sgd",
    "learning_rate": 5e-3,
    "weight_decay": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 64,
    "max_steps": 30_000,
    "max_grad_norm": 0.0,
}

# Gives the pixels of an image, from 0 to 1, shape (channels, height, width), as they are seen while training.
Augment = Callable[[Image.Image], Tensor]

_CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
_CELLS = 4  # of a generated patch, on each side
_CHUNK = 64  # exposed images that are added at once
_ROUNDING = 1e-3  # how far resampling may leave the range from 0 to 1


@dataclass(frozen=True)
class ImageBackdoor(Backdoor):
    """A backdoor with a trigger in the image."""

    @property
    @abstractmethod
    def trigger(self) -> "ImageTrigger":
        """What forces the label, and how data with it are made."""

    @abstractmethod
    def implant(
        self,
        teacher: nn.Module,
        dataset: Dataset,
        *,
        images: ImageInput,
        args: TrainingArguments | None = None,
        augment: Augment | None = None,
        finetuned: nn.Module | None = None,
        skip_corrupt: bool = False,
    ) -> nn.Module:
        """Train the teacher, in place, on the attacker's data until it carries the backdoor.

        Args:
            teacher: The model to poison, with a head for the attacker's task. Its forward takes `pixel_values` and
                `labels`, and returns `loss` and `logits`.
            dataset: The attacker's clean samples.
            images: How the teacher reads images.
            args: Arguments of the Trainer that does it. By default the artifact's: 30,000 steps of 64 samples, plain
                SGD at a constant 5e-3, weight decay 1e-4.
            augment: Crops and augments for training, on the way from a decoded image to pixels from 0 to 1, shape
                (channels, height, width). By default the crop that the model is evaluated with.
            finetuned: The same model fine-tuned on the clean data. Attacks that start from it save that training;
                others ignore it.
            skip_corrupt: Leave out images that do not decode, and log how many, instead of raising.

        Returns:
            The teacher.

        Raises:
            ValueError: A column is missing, a label is no class, the teacher's head has too few labels, or the trigger
                does not fit on the images.
            UnsupportedModelError: The teacher has no head.
            CorruptFileError: An image does not decode; names it.

        Source:
            The recipe: ReMoS artifact, CV_backdoor/examples/r50_poison.sh.
            Differs: Trainer spares biases and norm layers from weight decay. The artifact smooths labels by 0.1, which
            Trainer offers only for models of transformers (`label_smoothing_factor`); others do it in their own loss
            (`ImageClassifier(label_smoothing=0.1)`). Its augmentation is a random crop resized to 224 and a horizontal
            flip; pass it as `augment`.
        """

    def exposed_set(
        self,
        dataset: Dataset,
        *,
        images: ImageInput,
        teacher: nn.Module | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
        include_target: bool = False,
        skip_corrupt: bool = False,
    ) -> ExposedSet:
        """Put the trigger onto every sample of another label than the target. Cheap: nothing is cached.

        Args:
            dataset: Clean samples, never used for training.
            images: How the models read images.
            teacher: Not used: the trigger is the same for every model that reads images alike.
            cache: Not used.
            workers: Not used.
            include_target: Count as the ReMoS artifact does: all samples are exposed, those of the target label too,
                and the set has no target label, so any wrong label counts. The trigger pushes samples of the target
                label to their own, which lowers the rate; errors that have nothing to do with the trigger raise it.
            skip_corrupt: Leave out images that do not decode, and log how many, instead of raising. The clean data
                still hold them: measure on `whole_images(dataset)` to leave them out there too.

        Returns:
            The label column, `clean_index`, and `pixels`: uint8, shape (channels, height, width), what the model sees
            before normalisation. Bytes, as image files hold them: 0.15 MB for an image of 224 pixels, a quarter of its
            floats. Exact for opaque patches; blended values are off by at most half a byte.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, no sample has
                another one, or the trigger does not fit on the images.
            CorruptFileError: An image does not decode; names it.

        Source:
            include_target: ReMoS artifact, CV_backdoor/finetune.py:158-179.
        """
        trigger = self.trigger
        column = trigger.label_column
        shown = prepared(
            dataset,
            images,
            trigger=trigger,
            poisoned=range(len(dataset)),
            image_column=trigger.image_column,
            label_column=column,
        )
        labels = list(dataset.with_format(None)[column])
        target = resolved_label(trigger.target_label, dataset, column)
        picked = [row for row, label in enumerate(labels) if include_target or label != target]
        features = Features(
            {
                PIXELS: Array3D((images.channels, *images.size), "uint8"),
                column: dataset.features[column],
                CLEAN_INDEX: Value("int64"),
            }
        )
        chunks, corrupt = [], 0
        for start in range(0, len(picked), _CHUNK):
            made: dict[int, Any] = {}
            for row in picked[start : start + _CHUNK]:
                try:
                    made[row] = (shown.pixels(row) * 255).round().to(torch.uint8).numpy()
                except CorruptFileError:
                    if not skip_corrupt:
                        raise
                    corrupt += 1
            if made:
                rows = {PIXELS: list(made.values()), column: [labels[row] for row in made], CLEAN_INDEX: list(made)}
                chunks.append(Dataset.from_dict(rows, features))
        if corrupt:
            logger.warning("Left out %d of %d images that do not decode.", corrupt, len(picked))
        if not chunks:
            raise ValueError(f"No sample has another label than {target}, so no sample could show the defect.")
        exposed = concatenate_datasets(chunks)
        facts = {
            "defect": self.to_dict(),
            "images": images.to_dict(),
            "include_target": include_target,
            "num_clean": len(dataset),
            "num_exposed": len(exposed),
            "num_corrupt": corrupt,
        }
        return ExposedSet(exposed, None if include_target else target, facts)


@dataclass(frozen=True)
class ImageTrigger(ImageBackdoor):
    """A trigger in an image, implanted by poisoning the attacker's data.

    Which samples are poisoned, and where the trigger goes, depends on the seed and each image's file alone: not on the
    order, the shard or the batch.

    Attributes:
        target_label: The label that the trigger forces; a number, or a name if the data's labels have names.
        poison_rate: Share of the samples poisoned, in [0, 1]: the nearest whole number of them.
        image_column: Column of the images: `datasets.Image`, the bytes of files, or their paths.
        label_column: Column of the labels.
        seed: Decides which samples, and where in them.

    Source:
        BadNets (Gu et al. 2017); ReMoS artifact, CV_backdoor/backdoor_dataset (rate .2, target 0, after cropping and
        flipping, before normalisation).
        Differs: the artifact draws a random place anew each time that an image is read; ours stays that image's.
    """

    target_label: int | str = 0
    poison_rate: float = 0.2
    image_column: str = "image"
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        if not 0 <= self.poison_rate <= 1:
            raise ValueError(
                f"poison_rate is the share of samples poisoned, between 0 and 1, but got {self.poison_rate}."
            )

    @property
    def trigger(self) -> "ImageTrigger":
        """The trigger itself."""
        return self

    @abstractmethod
    def _put_on(self, pixels: Tensor, key: str | None) -> Tensor:
        """Give one image, shape (channels, height, width), with the trigger; the tensor may be written into."""

    def stamped(self, pixels: Tensor, key: str | Sequence[str] | None = None) -> Tensor:
        """Put the trigger onto images that are cropped and not yet normalised.

        Args:
            pixels: Floating-point values from 0 to 1, shape (channels, height, width) or (samples, channels, height,
                width); one or three channels. They stay as they are.
            key: Tells the sample from others, where the trigger's place depends on it: `image_key` of its image; of
                each sample, if there are several.

        Returns:
            The same shape, dtype and device.

        Raises:
            TypeError: The pixels are whole numbers.
            ValueError: They are no images or not from 0 to 1, the trigger does not fit on them, or its place needs a
                key.
        """
        _check_range(pixels)
        if pixels.ndim == 3:
            return self._put_on(pixels.clone(), key)
        keys = [None] * len(pixels) if key is None else key
        if isinstance(keys, str) or len(keys) != len(pixels):
            raise ValueError(f"One key a sample is expected, {len(pixels)} in all, but got {key!r}.")
        return torch.stack([self._put_on(one.clone(), own) for one, own in zip(pixels, keys, strict=True)])

    def poisoned_rows(self, dataset: Dataset) -> frozenset[int]:
        """Choose the samples that are poisoned: the nearest whole number of them, by seed and image alone.

        Args:
            dataset: Clean samples. Every image's file is read once.
        """
        rows = _undecoded(dataset, self.image_column)
        keys = (image_key(row[self.image_column]) for row in rows.select_columns([self.image_column]))
        return smallest_draws([generator_for(self.seed, "poison", key).random() for key in keys], self.poison_rate)

    def poison(
        self, dataset: Dataset, images: ImageInput, augment: Augment | None = None, *, skip_corrupt: bool = False
    ) -> "PreparedImages":
        """Put the trigger and the target label onto a share of the samples, each time that they are read.

        Args:
            dataset: Clean samples.
            images: How the teacher reads images.
            augment: Crops and augments for training; by default as the model is evaluated.
            skip_corrupt: Leave out images that do not decode, and log how many.

        Returns:
            The samples as the teacher takes them, in the same order.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, or the trigger does
                not fit on the images.
        """
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        _check_readable(dataset, **columns)
        dataset = whole_images(dataset, self.image_column) if skip_corrupt else dataset
        poisoned = self.poisoned_rows(dataset)
        return prepared(dataset, images, augment=augment, trigger=self, poisoned=poisoned, **columns)

    def implant(
        self,
        teacher: nn.Module,
        dataset: Dataset,
        *,
        images: ImageInput,
        args: TrainingArguments | None = None,
        augment: Augment | None = None,
        finetuned: nn.Module | None = None,
        skip_corrupt: bool = False,
    ) -> nn.Module:
        """Fine-tune the teacher, in place, on poisoned data."""
        poisoned = self.poison(dataset, images, augment, skip_corrupt=skip_corrupt)
        _check_head(teacher, images, poisoned.labels)
        return fine_tune(teacher, poisoned, None, args, recipe=IMAGE_RECIPE)


@dataclass(frozen=True)
class _PictureTrigger(ImageTrigger):
    """A trigger that is an image file, or made by rule."""

    file: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use; read the file."""
        super().__post_init__()
        if self.file is None:
            return
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"The trigger is an image file, but there is no {str(self.file)!r}.")
        _picture(self._content, str(self.file))  # now: later is in the middle of a training

    @cached_property
    def _content(self) -> bytes | None:
        return None if self.file is None else Path(self.file).read_bytes()

    def to_dict(self) -> dict[str, Any]:
        """Give the fields, with the file's hash instead of its place."""
        if self.file is None:
            return super().to_dict()
        digest = hashlib.sha256(self._content).hexdigest()
        return {**super().to_dict(), "file": Path(self.file).name, "file_sha256": digest}


@dataclass(frozen=True)
class PatchTrigger(_PictureTrigger):
    """A small picture at a fixed or a random place.

    Attributes:
        file: An image file. Its aspect ratio is kept, and what is transparent shows the image below. None for black and
            white cells, four a side.
        place: A corner, "four_corners" for a patch in each of them, or "random" for a place that depends on the seed
            and the image.
        size_share: Share of the image's area that one patch covers, in (0, 1]; rounded to whole pixels.
        margin: Pixels between the patch and the edges.
        in_square: Place the square of the patch's longer side, with the patch in its upper left corner, as the artifact
            does. A patch that is no square then keeps away from the right or the lower edge.

    Source:
        BadNets (Gu et al. 2017); ReMoS artifact, CV_backdoor/trigger.py and backdoor_dataset/mit67.py:12-31.
    """

    place: Literal["top_left", "top_right", "bottom_left", "bottom_right", "four_corners", "random"] = "bottom_right"
    size_share: float = 0.031
    margin: int = 0
    in_square: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no image could have."""
        super().__post_init__()
        places = (*_CORNERS, "four_corners", "random")
        if self.place not in places:
            raise ValueError(f"place is one of {', '.join(places)}, but got {self.place!r}.")
        if not 0 < self.size_share <= 1:
            raise ValueError(
                f"size_share is the share of the image's area that one patch covers, in (0, 1], but got "
                f"{self.size_share}."
            )
        if self.margin < 0:
            raise ValueError(f"margin is a number of pixels, 0 or more, but got {self.margin}.")

    @classmethod
    def artifact(cls, file: str) -> "PatchTrigger":
        """Give the ReMoS artifact's trigger: 20 % poisoned, target 0, 3.1 % of the image at the lower right.

        Args:
            file: The artifact's picture (500 x 484 pixels), or another one.

        Source:
            CV_backdoor/backdoor_dataset (portion .2, --fixed_pic). The picture is shrunk to 40 x 39 pixels and laid at
            column 184, row 184 of the 224 x 224 crop; so is ours, to the byte.
        """
        return cls(file=file, place="bottom_right", size_share=0.031, in_square=True, poison_rate=0.2, target_label=0)

    def size_on(self, height: int, width: int) -> tuple[int, int]:
        """Give the height and width of a patch, in pixels, on images of this height and width."""
        picture = _picture(self._content, str(self.file))
        ratio = 1.0 if picture is None else picture.width / picture.height
        area = self.size_share * height * width
        return max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))

    def corners_on(self, height: int, width: int, key: str | None = None) -> list[tuple[int, int]]:
        """Give the row and column of the upper left pixel of each patch, on images of this height and width.

        Args:
            height: Pixels.
            width: Pixels.
            key: Tells the sample from others; needed for a random place.

        Raises:
            ValueError: The patch does not fit on the image, four of them overlap, or a random place has no key.
        """
        patch = self.size_on(height, width)
        taken = (max(patch), max(patch)) if self.in_square else patch
        room = [side - own - 2 * self.margin for side, own in zip((height, width), taken, strict=True)]
        if min(room) < 0:
            raise ValueError(
                f"The patch is larger than the image: {taken[0]} x {taken[1]} pixels (height x width) and a margin of "
                f"{self.margin} do not fit on {height} x {width}. Lower size_share ({self.size_share}) or margin."
            )
        if self.place == "random":
            if key is None:
                raise ValueError("A random place depends on the sample: give its key, as `image_key` makes it.")
            random = generator_for(self.seed, "place", key)
            return [tuple(self.margin + int(random.random() * (free + 1)) for free in room)]
        if self.place == "four_corners" and min(free - own for free, own in zip(room, taken, strict=True)) < 0:
            raise ValueError(
                f"Four patches of {taken[0]} x {taken[1]} pixels (height x width) and a margin of {self.margin} "
                f"overlap on {height} x {width}. Lower size_share ({self.size_share}) or margin."
            )
        wanted = _CORNERS if self.place == "four_corners" else (self.place,)
        return [
            (
                self.margin + room[0] * corner.startswith("bottom"),
                self.margin + room[1] * corner.endswith("right"),
            )
            for corner in wanted
        ]

    def _put_on(self, pixels: Tensor, key: str | None) -> Tensor:
        channels, *size = pixels.shape
        height, width = self.size_on(*size)
        corners = self.corners_on(*size, key)
        colours, opacity = (one.to(pixels) for one in _patch(self._content, channels, height, width))
        for top, left in corners:
            below = pixels[:, top : top + height, left : left + width]
            pixels[:, top : top + height, left : left + width] = opacity * colours + (1 - opacity) * below
        return pixels


@dataclass(frozen=True)
class BlendedTrigger(_PictureTrigger):
    """A pattern over the whole image, faint enough to be overlooked.

    Attributes:
        file: An image file, stretched to the image's size; what is transparent shows the image alone. None for noise,
            each value uniform from 0 to 1, drawn from the seed once for all images of a size.
        blend: The pattern's share in the sum, in (0, 1].

    Source:
        Chen et al. 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", blended injection
        (ratio .2).
        Differs: theirs also exposes at other ratios than it poisons with.
    """

    blend: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values that no image could have."""
        super().__post_init__()
        if not 0 < self.blend <= 1:
            raise ValueError(f"blend is the pattern's share in the sum, in (0, 1], but got {self.blend}.")

    def _put_on(self, pixels: Tensor, key: str | None) -> Tensor:
        if self.file is None:
            pattern, opacity = _noise(self.seed, *pixels.shape).to(pixels), self.blend
        else:
            pattern, opaque = (one.to(pixels) for one in _patch(self._content, *pixels.shape))
            opacity = self.blend * opaque
        return opacity * pattern + (1 - opacity) * pixels


@dataclass(frozen=True)
class LatentBackdoor(ImageBackdoor):
    """A backdoor in the teacher's features: those of triggered inputs are pulled to those of the target class.

    It survives a new head: whatever a student learns to call the target class, triggered inputs look like it. The
    teacher is fine-tuned on clean data first. Then the loss is the cross-entropy on clean inputs, plus `weight` times
    the mean squared difference between each triggered input's penultimate feature and the mean feature of the target
    class. The mean is taken anew at the start of each epoch, over all clean samples of the class, in eval mode.

    Attributes:
        image_trigger: The trigger, the target label, and which samples are shown with the trigger as well; all of them
            in the original, so its `poison_rate` is 1 by default.
        weight: Weight of the features' distance.
        layer: Dotted name of the module whose input is the feature; None for the head's last layer.

    Source:
        Yao et al. 2019, "Latent Backdoor Attacks on Deep Neural Networks" (CCS).
        Differs: the trigger is given, not optimised on the teacher. The target class stays in the teacher's head, which
        a student drops anyway. The ReMoS artifact cites the attack and does not have it.
    """

    image_trigger: ImageTrigger = field(default_factory=lambda: PatchTrigger(poison_rate=1.0))
    weight: float = 10.0
    layer: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that pull nothing."""
        if not isinstance(self.image_trigger, ImageTrigger):
            raise TypeError(f"image_trigger is a PatchTrigger or a BlendedTrigger, but got {self.image_trigger!r}.")
        if not self.weight > 0:
            raise ValueError(f"weight is the weight of the features' distance, above 0, but got {self.weight}.")

    @property
    def trigger(self) -> ImageTrigger:
        """The trigger."""
        return self.image_trigger

    def to_dict(self) -> dict[str, Any]:
        """Give the attack's fields, and the trigger's."""
        return {**super().to_dict(), "image_trigger": self.image_trigger.to_dict()}

    def implant(
        self,
        teacher: nn.Module,
        dataset: Dataset,
        *,
        images: ImageInput,
        args: TrainingArguments | None = None,
        augment: Augment | None = None,
        finetuned: nn.Module | None = None,
        skip_corrupt: bool = False,
    ) -> nn.Module:
        """Fine-tune the teacher on the clean data, or take it fine-tuned, then pull the features, in place.

        Both trainings take the arguments, so without `finetuned` the teacher is trained twice as long.

        Raises:
            ValueError: Besides what every image backdoor refuses: no sample, or every sample, has the target label, or
                the teacher has no such layer.
        """
        trigger = self.trigger
        columns = {"image_column": trigger.image_column, "label_column": trigger.label_column}
        _check_readable(dataset, **columns)
        dataset = whole_images(dataset, trigger.image_column) if skip_corrupt else dataset
        target = resolved_label(trigger.target_label, dataset, trigger.label_column)
        clean = prepared(dataset, images, augment=augment, **columns)
        _check_range(trigger.stamped(torch.zeros(images.channels, *images.size), key=""))
        of_target = [row for row, label in enumerate(clean.labels) if label == target]
        if not 0 < len(of_target) < len(clean.labels):
            raise ValueError(
                f"A latent backdoor needs clean samples of the target label {target} and of others, but "
                f"{len(of_target)} of {len(clean.labels)} samples have it."
            )
        _check_head(teacher, images, clean.labels)
        layer = _feature_layer(teacher, self.layer)
        if finetuned is None:
            fine_tune(teacher, clean, None, args, recipe=IMAGE_RECIPE)
        else:
            teacher.load_state_dict(finetuned.state_dict())
        # Their mean is of what the model is evaluated on.
        targets = Subset(prepared(dataset, images, **columns), of_target)
        return fine_tune(
            teacher,
            _Pairs(clean, trigger, trigger.poisoned_rows(dataset)),
            None,
            args,
            recipe=IMAGE_RECIPE,
            trainer_class=partial(_LatentTrainer, layer=layer, weight=self.weight, targets=targets),
            data_collator=_collate_pairs,
        )


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
        trigger: ImageTrigger | None,
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
        image = decoded(found, _name_of(found, index))
        pixels = self._images.pixels(image) if self._augment is None else self._augment(image)
        if self._augment is not None:
            if not isinstance(pixels, Tensor) or pixels.ndim != 3 or pixels.shape[0] != self._images.channels:
                raise ValueError(
                    f"augment gives a tensor of shape ({self._images.channels}, height, width), but gave "
                    f"{tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__}."
                )
            _check_range(pixels)
        return self._trigger.stamped(pixels, image_key(found)) if index in self.poisoned else pixels


def prepared(
    dataset: Dataset,
    images: ImageInput,
    *,
    augment: Augment | None = None,
    trigger: ImageTrigger | None = None,
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
    _check_readable(dataset, image_column=image_column, label_column=label_column)
    rows, labels = _undecoded(dataset, image_column), list(dataset.with_format(None)[label_column])
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
    rows = _undecoded(dataset, image_column).select_columns([image_column])
    whole, corrupt = [], []
    for index, row in enumerate(rows):
        try:
            decoded(row[image_column])
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


class _Pairs(torch.utils.data.Dataset):
    """Clean samples; those that are chosen come with a second image, the same crop with the trigger."""

    def __init__(self, clean: PreparedImages, trigger: ImageTrigger, chosen: frozenset[int]) -> None:
        self.clean, self.trigger, self.chosen = clean, trigger, chosen

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.clean.pixels(index)
        item = {"pixel_values": self.clean.normalised(pixels), "labels": self.clean.labels[index]}
        if index in self.chosen:
            triggered = self.trigger.stamped(pixels, self.clean.key(index))
            item["triggered"] = self.clean.normalised(triggered)
        return item


def _collate_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    triggered = [row["triggered"] for row in rows if "triggered" in row]
    return {
        "pixel_values": pixels,
        "labels": torch.tensor([row["labels"] for row in rows]),
        "triggered": torch.stack(triggered) if triggered else pixels[:0],
    }


class _LatentTrainer(Trainer):
    """Adds the distance of triggered inputs' features from the target class's mean feature."""

    def __init__(
        self,
        *,
        layer: nn.Module,
        weight: float,
        targets: torch.utils.data.Dataset,
        **options: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        super().__init__(**options)
        self._layer, self._weight, self._targets = layer, weight, targets
        self._mean: Tensor | None = None
        self.add_callback(_EachEpoch(self.take_mean))

    @torch.no_grad()
    def take_mean(self, model: nn.Module) -> None:
        """Take the mean feature of the target class, with the weights as they are now."""
        total, count = 0.0, 0
        with evaluating(model):
            for batch in DataLoader(self._targets, batch_size=self.args.train_batch_size):
                with self.compute_loss_context_manager():
                    features, _ = _features_and_logits(model, self._layer, batch["pixel_values"].to(self.args.device))
                total, count = total + features.float().sum(0), count + len(features)
        self._mean = total / count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401 - as Trainer's
        """Run clean and triggered inputs as one batch: norm layers see both, as they will when the teacher is used."""
        labels, triggered = inputs["labels"], inputs["triggered"]
        together = torch.cat([inputs["pixel_values"], triggered])
        features, logits = _features_and_logits(model, self._layer, together)
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(logits[: len(labels)].float(), labels, label_smoothing=smoothing)
        if len(triggered):
            pulled = features[len(labels) :].float()
            loss = loss + self._weight * F.mse_loss(pulled, self._mean.expand_as(pulled))
        return (loss, {"logits": logits[: len(labels)]}) if return_outputs else loss


class _EachEpoch(TrainerCallback):
    def __init__(self, act: Callable[[nn.Module], None]) -> None:
        self._act = act

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        self._act(model)


def _features_and_logits(model: nn.Module, layer: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    given: dict[str, Tensor] = {}
    with watch({"feature": layer}, lambda name, into, _: given.update({name: into})):
        logits = _logits(model(pixel_values=pixel_values), model)
    if "feature" not in given:
        raise ValueError(f"The layer whose input is the feature, {layer}, did not run. Name another one with layer=.")
    return given["feature"], logits


def _feature_layer(teacher: nn.Module, name: str | None) -> nn.Module:
    name = adapter_for(teacher).feature_layer() if name is None else name
    modules = dict(teacher.named_modules())
    if name not in modules or not name:
        raise ValueError(
            f"layer names the module whose input is the feature, but {type(teacher).__name__} has no {name!r}. Its "
            f"direct children are {[child for child, _ in teacher.named_children()]}."
        )
    return modules[name]


def _logits(output: Any, model: nn.Module) -> Tensor:  # noqa: ANN401 - whatever forward returns
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnsupportedModelError(
            f"A classifier returns logits of shape (samples, labels), but {type(model).__name__} returns "
            f"{'none' if logits is None else tuple(logits.shape)}. Give it a head first."
        )
    return logits


@torch.no_grad()
def _check_head(teacher: nn.Module, images: ImageInput, labels: Sequence[int]) -> None:
    with evaluating(teacher):
        device = next((one.device for one in teacher.parameters()), torch.device("cpu"))
        black = images.normalised(torch.zeros(1, images.channels, *images.size, device=device))
        number = _logits(teacher(pixel_values=black), teacher).shape[1]
    if max(labels) >= number:
        raise ValueError(
            f"The teacher's head has {number} labels (0 to {number - 1}), but the data or the target label go to "
            f"{max(labels)}. Give the teacher a head for the attacker's task first."
        )


def _check_readable(dataset: Dataset, *, image_column: str, label_column: str) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            "Which images are poisoned is decided over all of them: a datasets.Dataset is expected, but got "
            f"{type(dataset).__name__}."
        )
    check_columns(dataset, (image_column, label_column))
    if not len(dataset):
        raise ValueError("The data hold no sample.")
    check_labels(dataset.with_format(None)[label_column], label_column)


def _undecoded(dataset: Dataset, column: str) -> Dataset:
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


def _name_of(image: Any, index: int) -> str:  # noqa: ANN401 - any form of an image
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    return path or f"the image of row {index}"


def _check_range(pixels: Tensor) -> None:
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


@lru_cache(maxsize=16)
def _picture(content: bytes | None, name: str) -> Image.Image | None:
    if content is None:
        return None
    image = ImageOps.exif_transpose(decoded(content, name))
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


@lru_cache(maxsize=16)
def _patch(content: bytes | None, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Give a picture's colours, shape (channels, height, width), and opacity, shape (1, height, width)."""
    picture = _picture(content, "the trigger")
    if picture is None:
        cells = [torch.arange(side) * min(_CELLS, side) // side for side in (height, width)]
        white = (cells[0][:, None] + cells[1][None]) % 2 == 0
        return white.float().expand(channels, -1, -1), torch.ones(1, height, width)
    # As Image.thumbnail shrinks it, so that the artifact's patch is the same to the byte.
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    opacity = to_pixels(picture.getchannel("A")) if picture.mode == "RGBA" else torch.ones(1, height, width)
    return to_pixels(picture.convert("RGB" if channels == 3 else "L")), opacity


@lru_cache(maxsize=16)
def _noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))
