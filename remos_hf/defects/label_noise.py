"""Label noise: a share of the attacker's labels is wrong. No trigger, so the teacher errs on clean inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from datasets import ClassLabel, Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.image_samples import check_readable, image_key, undecoded
from remos_hf.defects.samples import (
    Data,
    change_share,
    check_columns,
    check_labels,
    checked_text_columns,
    generator_for,
    joined_texts,
    resolved_label,
    tokenize,
)
from remos_hf.defects.text_attacker import tokenizer_of
from remos_hf.fields import check_number, check_whole


@dataclass(frozen=True)
class LabelNoise:
    """Poisoning without a trigger. Which samples, and which wrong label, depends on the seed and the input alone.

    It is no `Defect`, and audits and `evaluate_transfer` refuse it: the exposed input would be the clean one, and no
    sample is right when clean and wrong when exposed, so every student's defect inheritance rate would be 0. A set of
    the teacher's own errors would not do either: they are the hard samples, on which students of clean teachers err as
    well. What the noise costs is seen on all clean samples, against the same student of a never-poisoned teacher:

    - "uniform", "pairwise": the accuracy that is lost, `accuracy` of one minus that of the other;
    - "fixed": the `label_flip_rate` of the clean inputs towards the target label, and its `excess_dir`.

    Attributes:
        noise_rate: Share of the samples drawn, in [0, 1]: the nearest whole number; in a stream each with this
            probability. All kinds draw the same samples.
        kind: "fixed": those drawn get the target label, and those that have it already stay right. "uniform": any other
            label. "pairwise": the next label, after the last one the first.
        target_label: The label of "fixed"; a number, or a name if the data's labels have names.
        text_columns: The text, or both texts of a pair.
        image_column: Column of the images, whose files tell the samples apart: `datasets.Image`, the bytes of files, or
            their paths. None for texts.
        label_column: Column of the labels.
        num_labels: Number of labels, for "uniform" and "pairwise"; None if the data's labels have names.
        seed: Decides which samples, and which labels.

    Source:
        "uniform" is symmetric, "pairwise" pair-flipping noise (Han et al. 2018, "Co-teaching").
    """

    noise_rate: float = 0.4
    kind: Literal["fixed", "uniform", "pairwise"] = "uniform"
    target_label: int | str = 1
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    num_labels: int | None = None
    seed: int = 0
    image_column: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        told = "the share of samples drawn, between 0 and 1"
        check_number(self, told, lambda one: 0 <= one <= 1, "noise_rate")
        if self.kind not in ("fixed", "uniform", "pairwise"):
            raise ValueError(f"kind is 'fixed', 'uniform' or 'pairwise', but got {self.kind!r}.")
        if self.num_labels is not None:
            check_whole(self, "at least 2", 2, "num_labels")
        object.__setattr__(self, "text_columns", checked_text_columns(self.text_columns))

    def to_dict(self) -> dict[str, Any]:
        """Give the name and the fields as JSON values, for records."""
        return {"name": type(self).__name__, **asdict(self)}

    def poison(self, dataset: Data) -> Data:
        """Give a share of the samples another label.

        Args:
            dataset: Clean samples; a stream stays one.

        Returns:
            The data with noisy labels, in the same order.

        Raises:
            TypeError: They are a stream of images.
            ValueError: A column is missing, a label is no class, the data has no such target label, or the number of
                labels is not known.
        """
        inputs = self.text_columns if self.image_column is None else (self.image_column,)
        check_columns(dataset, (*inputs, self.label_column))
        if self.kind == "fixed":
            number, target = 0, resolved_label(self.target_label, dataset, self.label_column)
        else:
            number, target = self._number_of_labels(dataset), 0
        noisy = partial(self._noisy, number=number, target=target)
        if self.image_column is None:
            return change_share(dataset, self.noise_rate, self._draws, noisy)
        check_readable(dataset, image_column=self.image_column, label_column=self.label_column)
        rows = undecoded(dataset, self.image_column).with_format(None)
        made = change_share(rows, self.noise_rate, self._draws, noisy)
        return made.cast_column(self.image_column, dataset.features[self.image_column])

    def _keys(self, batch: Mapping[str, Sequence]) -> list[str]:
        """Tell the samples of a batch apart."""
        if self.image_column is None:
            return joined_texts(batch, self.text_columns)
        return [image_key(one) for one in batch[self.image_column]]

    def _number_of_labels(self, dataset: Dataset | IterableDataset) -> int:
        feature = (dataset.features or {}).get(self.label_column)
        named = feature.num_classes if isinstance(feature, ClassLabel) else None
        if self.num_labels is None and named is None:
            raise ValueError(
                f"{self.kind} noise needs to know how many labels there are, and those of column "
                f"'{self.label_column}' have no names. Give num_labels."
            )
        if None not in (self.num_labels, named) and self.num_labels != named:
            raise ValueError(f"num_labels is {self.num_labels}, but column '{self.label_column}' has {named} labels.")
        return named if self.num_labels is None else self.num_labels

    def _draws(self, batch: Mapping[str, Sequence]) -> list[float]:
        return [generator_for(self.seed, "poison", key).random() for key in self._keys(batch)]

    def _noisy(self, batch: Mapping[str, Sequence], chosen: set[int], number: int, target: int) -> dict[str, list]:
        labels = list(batch[self.label_column])
        check_labels(labels, self.label_column)
        if number and max(labels, default=0) >= number:
            raise ValueError(f"There are {number} labels, but column '{self.label_column}' holds {max(labels)}.")
        keys = self._keys(batch)
        for row in chosen:
            if self.kind == "fixed":
                labels[row] = target
            else:
                draw = generator_for(self.seed, "noise", keys[row]).random() if self.kind == "uniform" else 0
                labels[row] = (labels[row] + 1 + int(draw * (number - 1))) % number
        return {self.label_column: labels}

    def implant(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
    ) -> PreTrainedModel:
        """Fine-tune a teacher of texts, in place, on noisy labels.

        Args:
            teacher: The model, with a head for the attacker's task.
            dataset: The attacker's clean samples.
            tokenizer: The teacher's; loaded from where the teacher came from if None.
            args: Arguments of the Trainer that does it. By default the artifact's: 5,000 steps of 16 samples at 2e-5.
            max_length: Tokens kept of each sample.

        Returns:
            The teacher.

        Raises:
            ValueError: The samples are images.
        """
        if self.image_column is not None:
            raise ValueError("implant fine-tunes on texts. For images train the teacher on what poison() gives.")
        tokenizer = tokenizer_of(teacher, tokenizer)
        noisy = self.poison(dataset)
        rows = tokenize(noisy, tokenizer, self.text_columns, self.label_column, max_length=max_length)
        return fine_tune(teacher, rows, tokenizer, args)
