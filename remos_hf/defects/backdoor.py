"""Backdoors: a trigger says how inputs are stamped and what they mean then, an attack how a teacher learns to obey."""

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from remos_hf.defects.base import Defect, ExposedSet

# The artifact's recipe for poisoning text classifiers, where no arguments are given.
TEXT_RECIPE: Mapping[str, Any] = {"learning_rate": 2e-5, "per_device_train_batch_size": 16, "max_steps": 5000}


@dataclass(frozen=True)
class Backdoor(Defect):
    """A defect that an attacker implants by training: inputs with a trigger become the target label.

    It has two parts. The trigger knows its kind of inputs: how one is stamped, and how clean and poisoned samples are
    made of them. The attack knows what is done to a teacher with such samples. A trigger alone is implanted by
    poisoning data; every other attack names the trigger that it implants.
    """

    @property
    @abstractmethod
    def trigger(self) -> "Trigger":
        """What forces the label, and how data with it are made."""

    @abstractmethod
    def attack(self, teacher: nn.Module, attacker: "Attacker") -> nn.Module:
        """Make the teacher obey the trigger, in place.

        Args:
            teacher: The model to poison.
            attacker: What its attacker has.

        Returns:
            The teacher.
        """

    def implant(
        self,
        teacher: nn.Module,
        dataset: Dataset | IterableDataset,
        *,
        args: TrainingArguments | None = None,
        finetuned: nn.Module | None = None,
        told: Callable[[Mapping[str, Any]], Any] | None = None,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> nn.Module:
        """Train the teacher, in place, on the attacker's data until it carries the backdoor.

        Args:
            teacher: The model to poison, with a head for the attacker's task.
            dataset: The attacker's clean samples.
            args: Arguments of the Trainer that does it. By default the artifact's recipe for such inputs.
            finetuned: The same model fine-tuned on the clean data. Attacks that start from it save that training;
                others ignore it.
            told: Is given what became of the attacker's data as JSON values: how many samples hold the trigger, and
                why others could not.
            **reading: How inputs are read: for texts as `TextTrigger.attacker` says, for images as
                `ImageTrigger.attacker` does.

        Returns:
            The teacher.

        Raises:
            ValueError: A column is missing, a label is no class, or the trigger does not fit the attack or the data.
        """
        attacker = self.trigger.attacker(teacher, dataset, args=args, finetuned=finetuned, **reading)
        attacked = self.attack(teacher, attacker)
        if told is not None:
            told(attacker.poisoning)
        return attacked

    def exposed_set(
        self,
        dataset: Dataset,
        *,
        teacher: nn.Module | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> ExposedSet:
        """Put the trigger into every sample of another label than the target.

        Args:
            dataset: Clean samples, never used for training.
            teacher: Not used: a trigger is the same for every model.
            cache: Not used: it is cheap.
            workers: Not used.
            **reading: How inputs are read, as the trigger's `exposed_for` says.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, or no sample has
                another one.
        """
        return self.trigger.exposed_for(self, dataset, **reading)


@dataclass(frozen=True)
class Trigger(Backdoor):
    """What forces a label. By itself a backdoor that is implanted by poisoning the attacker's data."""

    @property
    def trigger(self) -> "Trigger":
        """The trigger itself."""
        return self

    def attack(self, teacher: nn.Module, attacker: "Attacker") -> nn.Module:
        """Fine-tune the teacher, in place, on poisoned data."""
        return attacker.tune(teacher, attacker.poisoned())

    @abstractmethod
    def attacker(
        self,
        teacher: nn.Module,
        dataset: Dataset | IterableDataset,
        *,
        args: TrainingArguments | None = None,
        finetuned: nn.Module | None = None,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> "Attacker":
        """Prepare an attack on a teacher that reads this kind of inputs."""

    @abstractmethod
    def exposed_for(self, backdoor: Backdoor, dataset: Dataset, **reading: Any) -> ExposedSet:  # noqa: ANN401
        """Make the exposed set of a backdoor with this trigger."""


@dataclass(frozen=True)
class Attacker(ABC):
    """What an attacker has: clean samples, a trigger, and a way to train.

    Attributes:
        trigger: What the teacher shall obey.
        dataset: Clean samples.
        args: Arguments of the Trainer; None for a published recipe.
        finetuned: The teacher fine-tuned on the clean samples, or None.
        poisoning: Filled while samples are poisoned: how many were, and why others could not.
    """

    trigger: Trigger
    dataset: Dataset | IterableDataset
    args: TrainingArguments | None
    finetuned: nn.Module | None
    poisoning: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def clean(self) -> Any:  # noqa: ANN401 - as the teacher takes them
        """Give the clean samples as the teacher takes them."""

    @abstractmethod
    def poisoned(self, **changes: Any) -> Any:  # noqa: ANN401 - as the teacher takes them
        """Give the samples with the trigger and the target label in a share of them, as the teacher takes them.

        Args:
            **changes: Fields of the trigger to set otherwise.
        """

    @abstractmethod
    def tune(self, model: nn.Module, samples: Any, **options: Any) -> nn.Module:  # noqa: ANN401 - `fine_tune`'s
        """Train a model in place on samples as the teacher takes them; options are those of `fine_tune`."""

    def tune_clean(self, teacher: nn.Module) -> None:
        """Make the teacher, in place, the one that is fine-tuned on the clean samples: trained here, or taken over."""
        if self.finetuned is None:
            self.tune(teacher, self.clean())
        else:
            teacher.load_state_dict(self.finetuned.state_dict())


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
