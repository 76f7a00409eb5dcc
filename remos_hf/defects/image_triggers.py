"""What triggers in images share: which images are poisoned, how a teacher is trained on them, how they are exposed.

A trigger acts on what a model sees: after cropping and augmentation, before normalisation. No file is rewritten.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from datasets import Array3D, Dataset, Features, Value, concatenate_datasets
from torch import Tensor, nn
from transformers import TrainingArguments

from remos_hf.activations import evaluating
from remos_hf.adapters.classified import logits_in
from remos_hf.adapters.images import ImageInput
from remos_hf.defects.backdoor import Attacker, Backdoor, Trigger, fine_tune
from remos_hf.defects.base import CLEAN_INDEX, EQUAL, HAS_TARGET, PIXELS, ExposedSet, check_some_left
from remos_hf.defects.image_samples import (
    Augment,
    PreparedImages,
    check_range,
    check_readable,
    image_key,
    prepared,
    undecoded,
    whole_images,
)
from remos_hf.defects.samples import generator_for, resolved_label, smallest_draws
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from remos_hf.fields import check_number

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

_CHUNK = 64  # exposed images that are added at once


@dataclass(frozen=True)
class ImageTrigger(Trigger):
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

    citation: ClassVar[str] = (
        "@article{gu2017badnets, title={{BadNets}: Identifying Vulnerabilities in the Machine Learning Model Supply "
        "Chain}, author={Gu, Tianyu and Dolan-Gavitt, Brendan and Garg, Siddharth}, journal={arXiv:1708.06733}, "
        "year={2017}}"
    )

    target_label: int | str = 0
    poison_rate: float = 0.2
    image_column: str = "image"
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        told = "the share of samples poisoned, between 0 and 1"
        check_number(self, told, lambda one: 0 <= one <= 1, "poison_rate")

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
        check_range(pixels)
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
        rows = undecoded(dataset, self.image_column)
        keys = (image_key(row[self.image_column]) for row in rows.select_columns([self.image_column]))
        return smallest_draws([generator_for(self.seed, "poison", key).random() for key in keys], self.poison_rate)

    def poison(
        self, dataset: Dataset, images: ImageInput, augment: Augment | None = None, *, skip_corrupt: bool = False
    ) -> PreparedImages:
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
        check_readable(dataset, **self.columns)
        dataset = whole_images(dataset, self.image_column) if skip_corrupt else dataset
        poisoned = self.poisoned_rows(dataset)
        return prepared(dataset, images, augment=augment, trigger=self, poisoned=poisoned, **self.columns)

    @property
    def columns(self) -> dict[str, str]:
        """The keywords by which `prepared` reads these columns."""
        return {"image_column": self.image_column, "label_column": self.label_column}

    def attacker(
        self,
        teacher: nn.Module,
        dataset: Dataset,
        *,
        args: TrainingArguments | None = None,
        finetuned: nn.Module | None = None,
        images: ImageInput,
        augment: Augment | None = None,
        skip_corrupt: bool = False,
    ) -> "ImageAttacker":
        """Prepare an attack on a teacher of images.

        Args:
            teacher: The model to poison, with a head for the attacker's task. Its forward takes `pixel_values` and
                `labels`, and returns `loss` and `logits`.
            dataset: The attacker's clean samples.
            args: Arguments of the Trainer. By default the artifact's: 30,000 steps of 64 samples, plain SGD at a
                constant 5e-3, weight decay 1e-4.
            finetuned: The same model fine-tuned on the clean data, or None.
            images: How the teacher reads images.
            augment: Crops and augments for training, on the way from a decoded image to pixels from 0 to 1, shape
                (channels, height, width). By default the crop that the model is evaluated with.
            skip_corrupt: Leave out images that do not decode, and log how many, instead of raising.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, the teacher's head
                has too few labels, or the trigger does not fit on the images.
            UnsupportedModelError: The teacher has no head.
            CorruptFileError: An image does not decode; names it.

        Source:
            The recipe: ReMoS artifact, CV_backdoor/examples/r50_poison.sh.
            Differs: Trainer spares biases and norm layers from weight decay. The artifact smooths labels by 0.1, which
            Trainer offers only for models of transformers (`label_smoothing_factor`); others do it in their own loss
            (`ImageClassifier(label_smoothing=0.1)`). Its augmentation is a random crop resized to 224 and a horizontal
            flip; pass it as `augment`.
        """
        check_readable(dataset, **self.columns)
        target = resolved_label(self.target_label, dataset, self.label_column)
        dataset = whole_images(dataset, self.image_column) if skip_corrupt else dataset
        check_range(self.stamped(torch.zeros(images.channels, *images.size), key=""))
        check_head(teacher, images, [*dataset.with_format(None)[self.label_column], target])
        return ImageAttacker(self, dataset, args, finetuned, images, augment)

    def exposed_for(
        self,
        backdoor: Backdoor,
        dataset: Dataset,
        *,
        images: ImageInput,
        include_target: bool = False,
        skip_corrupt: bool = False,
    ) -> ExposedSet:
        """Make the exposed set of a backdoor with this trigger.

        Args:
            backdoor: Named in the facts.
            dataset: Clean samples.
            images: How the models read images.
            include_target: Count as the ReMoS artifact does: all samples are exposed, those of the target label too,
                and the set has no target label, so any wrong label counts. The trigger pushes samples of the target
                label to their own, which lowers the rate; errors that have nothing to do with the trigger raise it.
            skip_corrupt: Leave out images that do not decode, and count them, instead of raising. The clean data still
                hold them: measure on `whole_images(dataset)` to leave them out there too.

        Returns:
            The label column, `clean_index`, and `pixels`: uint8, shape (channels, height, width), what the model sees
            before normalisation. Bytes, as image files hold them: 0.15 MB for an image of 224 pixels, a quarter of its
            floats. Exact for opaque patches; blended values are off by at most half a byte. Images that the trigger
            leaves as they are, to the byte, are left out; the facts count all that are, by reason.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, no sample has
                another one, or the trigger does not fit on the images.
            CorruptFileError: An image does not decode; names it.

        Source:
            include_target: ReMoS artifact, CV_backdoor/finetune.py:158-179.
        """
        column = self.label_column
        clean = prepared(dataset, images, trigger=self, **self.columns)  # refuses what the trigger does not fit
        labels = list(dataset.with_format(None)[column])
        target = resolved_label(self.target_label, dataset, column)
        picked = [row for row, label in enumerate(labels) if include_target or label != target]
        features = Features(
            {
                PIXELS: Array3D((images.channels, *images.size), "uint8"),
                column: dataset.features[column],
                CLEAN_INDEX: Value("int64"),
            }
        )
        chunks, left_out = [], Counter({HAS_TARGET: len(labels) - len(picked)})
        for start in range(0, len(picked), _CHUNK):
            made: dict[int, Any] = {}
            for row in picked[start : start + _CHUNK]:
                try:
                    seen, key = clean.pixels(row), clean.key(row)
                except CorruptFileError:
                    if not skip_corrupt:
                        raise
                    left_out["do not decode"] += 1
                    continue
                before, after = _as_bytes(seen), _as_bytes(self.stamped(seen, key))
                if torch.equal(before, after):
                    left_out[EQUAL] += 1
                else:
                    made[row] = after.numpy()
            if made:
                rows = {PIXELS: list(made.values()), column: [labels[row] for row in made], CLEAN_INDEX: list(made)}
                chunks.append(Dataset.from_dict(rows, features))
        left_out = {reason: count for reason, count in left_out.items() if count}
        check_some_left(sum(map(len, chunks)), left_out, target)
        exposed = concatenate_datasets(chunks)
        facts = {
            "defect": backdoor.to_dict(),
            "images": images.to_dict(),
            "include_target": include_target,
            "num_clean": len(dataset),
            "num_exposed": len(exposed),
            "num_left_out": left_out,
        }
        return ExposedSet(exposed, None if include_target else target, facts)


@dataclass(frozen=True)
class ImageAttacker(Attacker):
    """An attacker with images.

    Attributes:
        images: How the teacher reads them.
        augment: Crops and augments for training; None for the crop that the model is evaluated with.
    """

    images: ImageInput
    augment: Augment | None

    def clean(self) -> PreparedImages:
        """Give the clean samples as the teacher takes them."""
        return prepared(self.dataset, self.images, augment=self.augment, **self.trigger.columns)

    def poisoned(self, **changes: Any) -> PreparedImages:  # noqa: ANN401 - the trigger's fields
        """Give the samples with the trigger on a share of them, as the teacher takes them."""
        poisoned = replace(self.trigger, **changes).poison(self.dataset, self.images, self.augment)
        number, total = len(poisoned.poisoned), len(poisoned)
        self.poisoning.update(num_samples=total, num_poisoned=number, poison_rate=number / total)
        return poisoned

    def tune(self, model: nn.Module, samples: torch.utils.data.Dataset, **options: Any) -> nn.Module:  # noqa: ANN401
        """Train a model in place; options are those of `fine_tune`."""
        return fine_tune(model, samples, None, self.args, recipe=IMAGE_RECIPE, **options)


def _as_bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


@torch.no_grad()
def check_head(teacher: nn.Module, images: ImageInput, labels: Sequence[int]) -> None:
    """Refuse a teacher whose head lacks a label.

    Raises:
        ValueError: It does.
        UnsupportedModelError: It has no head.
    """
    with evaluating(teacher):
        device = next((one.device for one in teacher.parameters()), torch.device("cpu"))
        black = images.normalised(torch.zeros(1, images.channels, *images.size, device=device))
        output = teacher(pixel_values=black)
        if isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"A teacher that is trained returns its logits by name, beside a loss, but {type(teacher).__name__} "
                "returns a tensor. Wrap it: ImageClassifier(model, head=(...,))."
            )
        number = logits_in(output, teacher).shape[1]
    if max(labels) >= number:
        raise ValueError(
            f"The teacher's head has {number} labels (0 to {number - 1}), but the data or the target label go to "
            f"{max(labels)}. Give the teacher a head for the attacker's task first."
        )
