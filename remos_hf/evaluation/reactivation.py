"""Re-activation: how few poisoned samples bring a defect back that fine-tuning seems to have removed."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from remos_hf.defects.base import ExposedSet
from remos_hf.defects.samples import generator_for
from remos_hf.evaluation.measures import Rate, defect_inheritance_rate
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.tasks import Task


@dataclass(frozen=True)
class Reactivation:
    """How students are re-tuned.

    Attributes:
        counts: Numbers of poisoned samples to try. 0 shows what re-tuning alone does.
        num_clean: Clean samples beside them, the same for each count.
        epochs: Passes over both.
        learning_rate: Of AdamW, decaying linearly.
        batch_size: Samples a step.
        num_exposed: Exposed samples to measure on, the first ones.
        seeds: Seeds whose students are re-tuned; None for all.
        balanced: Beside the poisoned samples stand as many more clean ones of other labels, so that the target label
            gets no more common with their number. Without it, students of few classes come to answer it to everything.

    Source:
        Min et al. 2024, "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense": re-tuning
        with a few poisoned samples.
        Differs: clean samples stand beside them, and benign students are re-tuned alike, which tells bringing back from
        implanting anew; `balanced`.
    """

    counts: tuple[int, ...] = (0, 5, 20, 50)
    num_clean: int = 64
    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 16
    num_exposed: int = 250
    seeds: tuple[int, ...] | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        """Refuse plans that would try nothing."""
        if not self.counts or min(self.counts) < 0 or len(set(self.counts)) < len(self.counts):
            raise ValueError(f"counts are different numbers of poisoned samples, 0 or more, but got {self.counts}.")
        for name in ("num_clean", "num_exposed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of samples, at least 1, but got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as JSON values; what is not balanced is told as before that could be asked for."""
        values = {**asdict(self), "counts": list(self.counts), "seeds": None if self.seeds is None else [*self.seeds]}
        return {name: one for name, one in values.items() if name != "balanced" or one}


def reactivate(
    student: nn.Module,
    trigger: Any,  # noqa: ANN401 - of the task's kind
    dataset: Dataset,
    *,
    test: Dataset,
    exposed: ExposedSet,
    task: Task,
    plan: Reactivation,
    seed: int = 0,
) -> dict[int, Rate]:
    """Re-tune copies of a student on a few poisoned samples and measure how much of the defect is back.

    Args:
        student: The student; it stays as it is.
        trigger: The defect's trigger.
        dataset: Clean training samples to draw from, of the target and of other labels.
        test: Clean test samples.
        exposed: The exposed set made from them.
        task: How they are read.
        plan: What to try.
        seed: Decides the samples and their order.

    Returns:
        The defect inheritance rate by number of poisoned samples.

    Raises:
        ValueError: Too few samples, or too few of other labels than the target: those that can have the trigger, and
            if the plan is balanced, as many more.
    """
    shown = exposed.dataset.select(range(min(plan.num_exposed, len(exposed))))
    index = np.array(shown["clean_index"])
    clean = test.select(index)
    references = np.array(clean[task.label_column])
    clean_rows, poisoned_rows, others = _drawn(trigger, dataset, exposed.target_label, task, plan, seed)
    rates = {}
    for count in plan.counts:
        model = copy.deepcopy(student)
        rows = [*clean_rows, *others[:count]]
        samples = dataset.select([*rows, *poisoned_rows[:count]])
        poisoned = range(len(rows), len(samples))
        with tempfile.TemporaryDirectory(prefix="remos_hf_") as folder:
            args = _arguments(model, task, plan, seed, folder)
            task.train(model, samples, args, trigger=trigger, poisoned=poisoned, target_label=exposed.target_label)
        predicted = predict_labels(model, shown, task, progress=False)
        right = predict_labels(model, clean, task, progress=False)
        rates[count] = defect_inheritance_rate(predicted, references, right, exposed.target_label)
    return rates


def samples_needed(rates: Mapping[int, Rate], threshold: float) -> int | None:
    """Give the smallest number of poisoned samples that brings the rate to a threshold; None if none of them does."""
    back = (count for count, rate in sorted(rates.items()) if rate.value is not None and rate.value >= threshold)
    return next(back, None)


def _drawn(
    trigger: Any,  # noqa: ANN401
    dataset: Dataset,
    target: int,
    task: Task,
    plan: Reactivation,
    seed: int,
) -> tuple[list[int], list[int], list[int]]:
    """Give rows of clean samples, of those to poison, and of more clean ones of other labels, if these are wanted."""
    if len(dataset) < plan.num_clean:
        raise ValueError(f"Re-activation needs {plan.num_clean} clean samples, but there are {len(dataset)}.")
    keys, labels = task.keys(dataset), dataset[task.label_column]
    order = sorted(range(len(dataset)), key=lambda row: generator_for(seed, "re-activation", keys[row]).random())
    # Poisoned ones are taken from the far end, so no count changes the clean ones.
    candidates, wanted = [row for row in reversed(order) if labels[row] != target], max(plan.counts)
    able: list[int] = []
    looked = 0
    while looked < len(candidates) and len(able) < wanted:  # a few at a time: reading all takes as long as training
        some = candidates[looked : looked + 2 * wanted]
        looked += len(some)
        can = task.able(trigger, dataset.select(some))
        able += [row for row, is_able in zip(some, can, strict=True) if is_able]
    if len(able) < wanted:
        raise ValueError(
            f"Re-activation needs {wanted} samples of another label than {target} that can have the trigger where a "
            f"model sees it, but there are {len(able)}."
        )
    clean, poisoned = order[: plan.num_clean], able[:wanted]
    taken = {*clean, *poisoned}
    others = [row for row in candidates if row not in taken][:wanted] if plan.balanced else []
    if plan.balanced and len(others) < wanted:
        raise ValueError(
            f"Balanced re-activation needs {wanted} more samples of another label than {target}, but beside "
            f"{plan.num_clean} clean and {wanted} poisoned ones there are {len(others)}."
        )
    return clean, poisoned, others


def _arguments(model: nn.Module, task: Task, plan: Reactivation, seed: int, folder: str) -> TrainingArguments:
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=plan.batch_size,
        bf16=task.bf16,
        use_cpu=device.type == "cpu",
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
