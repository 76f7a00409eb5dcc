"""How an audit's teachers and students are trained: what `Audit` wants as `teacher_args` and `fine_tune`."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PrinterCallback, TrainingArguments

from remos_hf.evaluation.anatomy import anatomy
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.tasks import TextTask
from remos_hf.strategies.base import Strategy
from remos_hf.training.trainer import RemosTrainer

# Trainer's arguments from (seed, folder, factor of the learning rate).
Arguments = Callable[[int, str, float], TrainingArguments]

# A point of the learning curve each 5 percent of the steps.
_LOGGING_STEPS = 0.05


@dataclass(frozen=True)
class Recipe:
    """How models of an audit are trained.

    Attributes:
        learning_rate: Of AdamW, decaying linearly.
        epochs: Passes over the samples.
        batch_size: Samples a step.
        eval_batch_size: Samples of a forward pass without gradients.
        bf16: Train in bfloat16 autocast.
        use_cpu: Leave a GPU alone.
        texts: The samples are texts: those of like length share a batch, so that little is spent on padding.
        curve: Keep points of the learning curve.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    eval_batch_size: int = 32
    bf16: bool = False
    use_cpu: bool = False
    texts: bool = True
    curve: bool = False

    def arguments(self, seed: int, folder: str, lr_factor: float = 1.0) -> TrainingArguments:
        """Give Trainer's arguments: nothing is saved, shown or reported.

        Args:
            seed: Of the order of the samples, dropout and augmentation.
            folder: Where Trainer would write.
            lr_factor: Of the learning rate.
        """
        curve = {"logging_strategy": "steps", "logging_steps": _LOGGING_STEPS} if self.curve else {}
        return TrainingArguments(
            output_dir=folder,
            learning_rate=lr_factor * self.learning_rate,
            num_train_epochs=self.epochs,
            seed=seed,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.eval_batch_size,
            bf16=self.bf16,
            use_cpu=self.use_cpu,
            remove_unused_columns=self.texts,  # an image is read from a column that no model takes
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"logging_strategy": "no", **curve},
            **(_length_grouping() if self.texts else {}),
        )


class StudentTuner:
    """Trains an audit's students by RemosTrainer: what `Audit` takes as `fine_tune`.

    Args:
        task: How samples are read. Coverage is taken without its augmentation.
        arguments: Gives Trainer's arguments from a seed, a folder and a factor of the learning rate, as
            `Recipe.arguments` does.
        max_samples: Samples that decide the coverage, drawn by the student's seed; the trainer's own number if None.
    """

    def __init__(self, task: TextTask | ImageTask, arguments: Arguments, max_samples: int | None = None) -> None:
        self.task, self.arguments, self.max_samples = task, arguments, max_samples

    def __call__(
        self, student: nn.Module, strategy: Strategy, samples: Dataset, lr_factor: float, seed: int
    ) -> dict[str, Any]:
        """Train a student in place.

        Args:
            student: The teacher's body under a new head.
            strategy: How it starts.
            samples: Its data, as the task reads them.
            lr_factor: Of the learning rate.
            seed: Of the training.

        Returns:
            JSON values: "share_kept" and "squares_reset" (None if nothing was sliced), "rows_reset",
            "share_never_covered" (None without coverage), "competing" (what competes), "start" and "finish" (what the
            strategy says of both), "seconds" of "profile", "choose" and "reset", and "anatomy", what happened to the
            weights of each layer.
        """
        before = copied_weights(student)
        with tempfile.TemporaryDirectory(prefix="audit_") as folder:
            trainer = RemosTrainer(
                student,
                self.arguments(seed, folder, lr_factor),
                strategy=strategy,
                max_samples=self.max_samples,
                **trainer_inputs(self.task, samples),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        config = trainer.sidecars.config
        held = config.get("slice", {})
        return {
            "share_kept": held.get("share_kept"),
            "squares_reset": held.get("squares_reset"),
            "rows_reset": config.get("embedding_rows_reset", 0),
            "share_never_covered": config.get("coverage", {}).get("share_never_covered"),
            "competing": config.get("competing"),
            "start": config.get("start", {}),
            "finish": config.get("finish", {}),
            "seconds": dict(config["seconds"]),
            "anatomy": anatomy(
                before,
                student,
                relevant=trainer.relevant_slice,
                profile=trainer.profile,
                history=trainer.state.log_history,
            ),
        }


def trainer_inputs(task: TextTask | ImageTask, samples: Dataset) -> dict[str, Any]:
    """Give the keywords by which a RemosTrainer reads samples as a task does.

    Args:
        task: How samples are read.
        samples: The samples, with labels.
    """
    if isinstance(task, TextTask):
        return {"train_dataset": task.tokenize(samples), "data_collator": DataCollatorWithPadding(task.tokenizer)}
    plain = replace(task, augment="none")
    return {"train_dataset": task.prepare(samples), "profile_dataset": plain.prepare(samples)}


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters to the CPU, by name."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


def _length_grouping() -> dict[str, Any]:
    # Transformers 5 has another name for it.
    known = {field.name for field in fields(TrainingArguments)}
    if "train_sampling_strategy" in known:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}
