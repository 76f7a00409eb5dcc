"""How good a trial of a ratio search is on the held-out data, and how many samples can tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer

from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.measures import CONFIDENCE, Rate, accuracy

_NO_LABEL, _NOT_FINITE = -2, -1  # instead of a predicted label, so that all processes see it and stop together


@dataclass(frozen=True)
class Measured:
    """How good a model is on the held-out data."""

    accuracy: float
    rate: Rate | None = None  # of the accuracy; None for a metric of the caller's
    commonest: float | None = None  # share of the commonest label


def measured_by(trainer: Trainer, held_out: Dataset, metric: str | None) -> Measured:
    """Measure a trainer's model on held-out data: by its `compute_metrics`, or by the largest logit.

    Args:
        trainer: A trial's; it computes no other metrics afterwards.
        held_out: The data.
        metric: Name of a share that `compute_metrics` gives; None for the accuracy.

    Raises:
        ValueError: The data has no labels of classes, the model no such logits, or there is no such share.
        NonFiniteError: Logits or the metric are NaN or infinite.
    """
    if metric is not None:
        return Measured(_metric_of(trainer, trainer.predict(held_out).metrics, metric))
    predictions, labels = predicted_labels(trainer, held_out)
    rate = accuracy(predictions, labels)
    return Measured(rate.value, rate, float(np.unique(labels, return_counts=True)[1].max() / len(labels)))


def predicted_labels(trainer: Trainer, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Predict the labels of some data by the largest logit.

    Args:
        trainer: A trial's; it computes no metrics of its own afterwards.
        data: The data.

    Returns:
        Predicted and true labels, in the order in which the trainer reads the data.

    Raises:
        ValueError: The data has no labels of classes, or the model no such logits.
        NonFiniteError: Logits are NaN or infinite.
    """
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, _labels_of
    output = trainer.predict(data)
    labels = output.label_ids
    check_classes(trainer, [] if labels is None else list(labels) if isinstance(labels, tuple) else [labels])
    predictions = np.asarray(output.predictions)
    if predictions.shape != labels.shape or (predictions == _NO_LABEL).any():
        raise ValueError(
            f"'auto' compares the largest of several logits with the label, but {_class_of(trainer)} gives "
            "no logits of shape (samples, labels). Name a share that compute_metrics gives: metric= of the search."
        )
    if (predictions == _NOT_FINITE).any():
        raise NonFiniteError(
            f"{int((predictions == _NOT_FINITE).sum())} of {len(labels)} held-out samples get NaN or infinite logits, "
            "so there is no accuracy. Lower the learning rate, or look for NaN in the data."
        )
    return predictions, labels


def _labels_of(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits  # some models give hidden states after them
    if logits.dim() != 2 or logits.shape[1] < 2:
        return torch.full((len(logits),), _NO_LABEL, device=logits.device)
    return logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), _NOT_FINITE)


def check_classes(trainer: Trainer, labels: Sequence[Tensor | np.ndarray]) -> None:
    """Refuse labels that are not one class a sample."""
    if not labels:
        raise ValueError(
            f"The held-out data has no labels that {_class_of(trainer)} takes as {trainer.label_names}, so there is no "
            "accuracy. Name its column in TrainingArguments(label_names=...)."
        )
    found = np.asarray(labels[0].cpu() if isinstance(labels[0], Tensor) else labels[0])
    whole = len(labels) == 1 and found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    if not whole or (found < 0).any():
        what = f"the label {found.min()}" if whole else f"{len(labels)} x {found.dtype} of shape {found.shape}"
        raise ValueError(
            "'auto' counts right labels, one class a sample, from 0 on, but the held-out data has "
            f"{what}. For another task, name a share that compute_metrics gives: metric= of the search."
        )


def _metric_of(trainer: Trainer, metrics: dict[str, float], name: str) -> float:
    found = metrics.get(f"test_{name}", metrics.get(name))
    if not isinstance(found, (int, float)):
        given = sorted(key.removeprefix("test_") for key in metrics)
        raise ValueError(
            f"metric={name!r} is none of the numbers that {_class_of(trainer)} gives: {', '.join(given)}. "
            "Pass compute_metrics=, or name one of them."
        )
    if not math.isfinite(found):
        raise NonFiniteError(f"The metric {name!r} of a trial is {found}, so ratios cannot be compared by it.")
    if not 0 <= found <= 1:
        raise ValueError(
            f"accuracy_budget is a share, so the metric must be one, in [0, 1], but {name!r} is {found}. A loss or a "
            "percentage will not do."
        )
    return float(found)


def _class_of(trainer: Trainer) -> str:
    return type(trainer.model).__name__


def samples_to_tell(rate: Rate, difference: float) -> int:
    """Count the samples with which two accuracies near a rate differ by no more than this by chance, 95 times in 100.

    It takes the two as independent. They are measured on the same samples and rise and fall together, so somewhat fewer
    can be enough.

    Args:
        rate: One of the two accuracies.
        difference: To be told from 0, as a share above 0.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = (rate.count + 2) / (rate.num_samples + 4)  # a rate of 1 is not known to be without variance
    return math.ceil(2 * share * (1 - share) * (z / difference) ** 2)
