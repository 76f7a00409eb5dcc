"""What all backdoors share, whatever the inputs: an attacker implants them by training."""

import copy
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from remos_hf.defects.base import Defect

# The artifact's recipe for poisoning text classifiers, where no arguments are given.
TEXT_RECIPE: Mapping[str, Any] = {"learning_rate": 2e-5, "per_device_train_batch_size": 16, "max_steps": 5000}


@dataclass(frozen=True)
class Backdoor(Defect):
    """A defect that an attacker implants by training: inputs with a trigger become the target label."""

    @property
    @abstractmethod
    def trigger(self) -> "Backdoor":
        """What forces the label, and how data with it are made."""

    @abstractmethod
    def implant(
        self,
        teacher: nn.Module,
        dataset: Dataset | IterableDataset,
        *,
        args: TrainingArguments | None = None,
        finetuned: nn.Module | None = None,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> nn.Module:
        """Train the teacher, in place, on the attacker's data until it carries the backdoor.

        Args:
            teacher: The model to poison, with a head for the attacker's task.
            dataset: The attacker's clean samples.
            args: Arguments of the Trainer that does it. By default the artifact's recipe for such inputs.
            finetuned: The same model fine-tuned on the clean data. Attacks that start from it save that training;
                others ignore it.
            **reading: How inputs are read: `tokenizer` and `max_length` for texts, `images` for images.

        Returns:
            The teacher.
        """


def fine_tune(
    model: nn.Module,
    prepared: Dataset | IterableDataset | torch.utils.data.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    args: TrainingArguments | None,
    *,
    recipe: Mapping[str, Any] = TEXT_RECIPE,
    trainer_class: type[Trainer] = Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,  # noqa: ANN401 - Trainer's own
) -> nn.Module:
    """Train a model in place with the ordinary Trainer.

    Args:
        model: The model.
        prepared: Data as the model takes them, with `labels`.
        tokenizer: Pads the batches of texts; None for samples of one shape, such as images, which are stacked.
        args: Trainer's arguments; None for a published recipe.
        recipe: That recipe.
        trainer_class: Trainer, or a child with a loss of its own.
        callbacks: Added to the trainer's.
        **options: Passed on to the trainer.

    Returns:
        The model, in eval mode.
    """
    if tokenizer is not None:
        options = {"data_collator": DataCollatorWithPadding(tokenizer), **options}
    with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
        if args is None:
            args = TrainingArguments(output_dir=folder, save_strategy="no", report_to="none", **recipe)
        args = copy.copy(args)
        args.remove_unused_columns = False  # nothing in the data is unused, and a collator may want more of them
        trainer = trainer_class(model=model, args=args, train_dataset=prepared, callbacks=list(callbacks), **options)
        # Otherwise updates grow with the accumulation steps and the processes (transformers #47688).
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    return model.eval()
