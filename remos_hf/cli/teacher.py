"""The teacher that a command names, and how it reads the samples at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from remos_hf.adapters.class_names import put_in_order
from remos_hf.adapters.guarded_loading import TIMM, load_teacher, load_tokenizer, teacher_config
from remos_hf.adapters.images import image_input_of
from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.data_files import TEXT_COLUMNS, holds_images
from remos_hf.cli.options import was_given
from remos_hf.errors import UnsupportedModelError
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.tasks import TextTask

# A folder in timm's own form, such as a student of timm that `remos train` saved.
LOCAL_TIMM = f"{TIMM}local-dir:"
_OF_TEXTS = {"text_columns": "--text-column", "max_length": "--max-length"}
_OF_IMAGES = {"augment": "--augment"}


@dataclass(frozen=True)
class Teacher:
    """A teacher that was named, and how it reads the samples at hand.

    Attributes:
        name: A folder, an id of the Hub, or "timm/<id>".
        revision: Branch, tag or commit of the Hub.
        tokenizer: Of texts; None if the samples are images.
    """

    name: str
    revision: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def named(cls, name: str, samples: Dataset, revision: str | None = None) -> "Teacher":
        """Check a teacher, and load what it reads such samples with.

        Raises:
            UnsupportedModelError: As `load_teacher`, or it has no way to pad texts.
            FileNotFoundError: There is no such teacher.
            ValueError: A revision of a folder.
        """
        check_revision(name, revision)
        images, of_timm = holds_images(samples), name.startswith(TIMM)
        if not of_timm:  # `image_classifier` looks for itself
            config = type(teacher_config(name, revision=revision))
            of_images, of_texts = (
                config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
                config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            )
            if images and of_texts and not of_images:
                raise UnsupportedModelError(f"{name} reads texts, but the samples are images.")
        if not images and (of_timm or (of_images and not of_texts)):
            raise UnsupportedModelError(f"{name} reads images, but the samples are texts.")
        return cls(name, revision, None if images else load_tokenizer(name, revision=revision))

    @property
    def reads_images(self) -> bool:
        """Whether it reads images, not texts."""
        return self.tokenizer is None

    def load(self, num_labels: int, seed: int = 0, names: Sequence[str] | None = None) -> nn.Module:
        """Load the model in float32. A head that it lacks starts from the seed.

        Args:
            num_labels: Labels of the task.
            seed: Of the head.
            names: Of the labels, in the order of their numbers: a trained head of transformers that knows them in
                another order is put in this one, and a head of other classes is replaced.
        """
        kind = AutoModelForImageClassification if self.reads_images else AutoModelForSequenceClassification
        model = load_teacher(
            self.name, kind, revision=self.revision, num_labels=num_labels, dtype=torch.float32, seed=seed
        )
        if self.tokenizer is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if names is not None and isinstance(model, PreTrainedModel) and not put_in_order(model, names):
            model = with_new_head(model, num_labels, seed=seed, labels=names)
        return model

    def load_as_saved(self) -> nn.Module:
        """Load the model that the checkpoint was saved as, in its own type: the one that a slice on disk is made of.

        Raises:
            UnsupportedModelError: transformers has no such architecture.
        """
        return load_teacher(self.name, revision=self.revision)

    def task(
        self,
        model: nn.Module,
        samples: Dataset,
        *,
        batch_size: int,
        max_length: int,
        bf16: bool = False,
        augment: str = "none",
    ) -> TextTask | ImageTask:
        """Give how samples are read, by the teacher's own tokenizer or preprocessing.

        Args:
            model: The teacher.
            samples: Says whether texts come in pairs.
            batch_size: Samples of a forward pass.
            max_length: Tokens kept of a text.
            bf16: Run in bfloat16 autocast.
            augment: Of images in training: "none" or "crop_and_flip".
        """
        if self.tokenizer is not None:
            columns = tuple(name for name in TEXT_COLUMNS if name in samples.column_names)
            return TextTask(self.tokenizer, columns, "label", max_length, batch_size, bf16)
        return ImageTask(image_input_of(model), batch_size=batch_size, bf16=bf16, augment=augment)


def identity(teacher: str, revision: str | None) -> dict[str, str | None]:
    """Say which teacher it was, for the record beside a student. A folder is named without its path."""
    path = Path(teacher.removeprefix(LOCAL_TIMM))
    return {"id": path.resolve().name if path.is_dir() else teacher, "revision": revision}


def check_revision(teacher: str, revision: str | None) -> None:
    """Refuse a revision of what has none.

    Raises:
        ValueError: The teacher is a folder, or of timm.
    """
    if revision is not None and (teacher.startswith(TIMM) or Path(teacher).is_dir()):
        what = "an id of timm (timm/hf-hub:OWNER/NAME@REVISION names one)" if teacher.startswith(TIMM) else "a folder"
        raise ValueError(f"--revision {revision} is of a teacher on the Hub, but {teacher} is {what}. Leave it out.")


def check_reading(asked: Any, reads_images: bool) -> None:  # noqa: ANN401 - the options of any command
    """Refuse options that say how the other kind of samples is read.

    Args:
        asked: A command's options.
        reads_images: Whether its samples are images, not texts.

    Raises:
        ValueError: There is one.
    """
    wrong, samples = (_OF_TEXTS, "images") if reads_images else (_OF_IMAGES, "texts")
    for name, option in wrong.items():
        if hasattr(asked, name) and was_given(asked, name):
            raise ValueError(f"{option} says nothing of how {samples} are read, which the samples are. Leave it out.")


def device_for(cpu: bool) -> torch.device:
    """Give the GPU, unless there is none or it is to be left alone."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
