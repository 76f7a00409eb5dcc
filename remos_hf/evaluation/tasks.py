"""How inputs are read: the same for every model that is compared."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from remos_hf.defects.backdoor import fine_tune
from remos_hf.defects.samples import tokenize
from remos_hf.defects.text_reading import TextReading
from remos_hf.defects.text_triggers import TextTrigger


class Task(Protocol):
    """What measuring and training need to know about a kind of inputs.

    Attributes:
        label_column: Column of the labels.
        batch_size: Samples of a forward pass.
        bf16: Run in bfloat16 autocast.
    """

    label_column: str
    batch_size: int
    bf16: bool

    def to_dict(self) -> dict[str, Any]:
        """Give what decides the numbers as JSON values."""

    @property
    def exposing(self) -> dict[str, Any]:
        """The keywords by which a defect's `exposed_set` reads inputs as this task does."""

    @property
    def implanting(self) -> dict[str, Any]:
        """The keywords by which a backdoor's `implant` reads inputs as this task does."""

    def batches(self, dataset: Dataset) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor]]]:
        """Give the samples as models take them, without labels, each batch with the rows that it holds."""

    def keys(self, dataset: Dataset) -> list[str]:
        """Give what tells samples apart, for draws that do not depend on their order."""

    def able(self, trigger: Any, dataset: Dataset) -> list[bool]:  # noqa: ANN401 - of this task's kind
        """Say which samples can have a trigger."""

    def train(
        self,
        model: nn.Module,
        dataset: Dataset,
        args: TrainingArguments,
        *,
        trigger: Any = None,  # noqa: ANN401
        poisoned: Collection[int] = (),
        target_label: int | None = None,
    ) -> nn.Module:
        """Train a model in place with the ordinary Trainer.

        Args:
            model: The model.
            dataset: Clean samples.
            args: Trainer's arguments.
            trigger: Put into the rows that are poisoned.
            poisoned: Rows that get the trigger and the target label.
            target_label: Theirs.

        Returns:
            The model, in eval mode.
        """


@dataclass(frozen=True)
class TextTask:
    """How texts are read.

    Attributes:
        tokenizer: Of the teacher, and so of all its students.
        text_columns: The text, or both texts of a pair.
        label_column: Column of the labels.
        max_length: Tokens kept of each sample.
        batch_size: Samples of a forward pass.
        bf16: Run in bfloat16 autocast.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    max_length: int = 128
    batch_size: int = 32
    bf16: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Give what decides the numbers as JSON values."""
        return {
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "max_length": self.max_length,
            "bf16": self.bf16,
        }

    @property
    def exposing(self) -> dict[str, Any]:
        """The keywords by which a defect's `exposed_set` reads texts as this task does."""
        return self.implanting

    @property
    def implanting(self) -> dict[str, Any]:
        """The keywords by which a backdoor's `implant` reads texts as this task does."""
        return {"tokenizer": self.tokenizer, "max_length": self.max_length}

    def tokenize(self, dataset: Dataset) -> Dataset:
        """Turn texts into what the models take, with `labels`."""
        return tokenize(dataset, self.tokenizer, self.text_columns, self.label_column, max_length=self.max_length)

    def batches(self, dataset: Dataset) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor]]]:
        """Give the samples as models take them. Samples of like length share a batch: little is spent on padding."""
        with without_map_bars():
            rows = self.tokenize(dataset).remove_columns("labels")
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = np.argsort(lengths, kind="stable")[::-1]  # the longest first: what does not fit fails at once
        pad = DataCollatorWithPadding(self.tokenizer)
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            yield picked, pad([rows[int(row)] for row in picked])

    def keys(self, dataset: Dataset) -> list[str]:
        """Give the texts themselves."""
        return list(dataset[self.text_columns[0]])

    def able(self, trigger: TextTrigger, dataset: Dataset) -> list[bool]:
        """Say of which texts a model would see the trigger: not every text has a paraphrase, or room."""
        batch = {column: dataset[column] for column in trigger.text_columns}
        shown = trigger.shown(batch, TextReading(self.tokenizer, self.max_length), exposing=True)
        return [one.text is not None for one in shown]

    def with_trigger(
        self, dataset: Dataset, trigger: TextTrigger, poisoned: Collection[int], target_label: int | None
    ) -> Dataset:
        """Give the clean samples, and then the poisoned ones with the trigger and the target label."""
        clean = dataset.select([row for row in range(len(dataset)) if row not in set(poisoned)])
        changed = trigger.expose(dataset.select(list(poisoned)), **self.exposing).remove_columns(self.label_column)
        changed = changed.add_column(
            self.label_column, [target_label] * len(changed), feature=dataset.features[self.label_column]
        )
        return concatenate_datasets([clean, changed.select_columns(clean.column_names)])

    def train(
        self,
        model: PreTrainedModel,
        dataset: Dataset,
        args: TrainingArguments,
        *,
        trigger: TextTrigger | None = None,
        poisoned: Collection[int] = (),
        target_label: int | None = None,
    ) -> PreTrainedModel:
        """Train a model in place with the ordinary Trainer. Poisoned samples come after the clean ones."""
        if poisoned:
            dataset = self.with_trigger(dataset, trigger, poisoned, target_label)
        return fine_tune(model, self.tokenize(dataset), self.tokenizer, args)


@contextmanager
def without_map_bars() -> Iterator[None]:
    """Keep datasets from showing a bar for each of many short steps."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
