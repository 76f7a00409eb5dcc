"""How well a model tells some classes, and how well the others."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.flow_recording import on_device_of
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.measures import Rate
from remos_hf.profiling.batches import unpacked


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of a model on the target classes and on the others.

    Attributes:
        target: Of samples of the target classes, those that get their label, where all labels can be given.
        among: Likewise, where only the labels of the target classes can be given: what whoever needs no others sees. A
            model that has merely forgotten the other labels gains in `target`, not here.
        others: Of samples of the other classes, those that get their label.
    """

    target: Rate
    among: Rate
    others: Rate


@torch.inference_mode()
def class_accuracy(model: nn.Module, batches: Iterable, classes: Collection[int]) -> ClassAccuracy:
    """Measure a classifier on labelled batches.

    Args:
        model: Gives logits of shape (samples, labels); the mode of its modules is put back.
        batches: (inputs, labels) tuples, or mappings with "labels".
        classes: The target classes.

    Raises:
        ValueError: There are no classes, one does not exist, or a batch has no labels or one that does not exist.
        NonFiniteError: A logit is NaN or infinite.
    """
    targets = torch.tensor(sorted(set(classes)))
    if not len(targets):
        raise ValueError("classes names the target classes, at least one, but got none.")
    adapter = adapter_for(model, ())
    logits, labels = [], []
    with evaluating(model):
        for batch in unpacked(batches):
            labels.append(_labels_of(batch))
            logits.append(_logits_of(adapter.forward(on_device_of(model, batch))).float().cpu())
    if not logits:
        raise ValueError("There is no sample to measure on.")
    found, right = torch.cat(logits), torch.cat(labels)
    if not bool(found.isfinite().all()):
        raise NonFiniteError("The model gives logits that are NaN or infinite, so it predicts nothing.")
    if int(targets.max()) >= found.shape[1] or int(targets.min()) < 0:
        raise ValueError(f"classes names {targets.tolist()}, but the model has {found.shape[1]} labels.")
    unknown = right[(right < 0) | (right >= found.shape[1])]
    if len(unknown):
        raise ValueError(f"A sample has the label {int(unknown[0])}, but the model has {found.shape[1]} labels.")
    wanted = torch.isin(right, targets)
    hit = found.argmax(1) == right
    hit_among = targets[found[:, targets].argmax(1)] == right
    return ClassAccuracy(_share(hit[wanted]), _share(hit_among[wanted]), _share(hit[~wanted]))


def _share(hit: Tensor) -> Rate:
    return Rate.of(int(hit.sum()), len(hit))


def _labels_of(batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1].long().cpu()
    found = [batch[key] for key in LABEL_KEYS if key in batch] if hasattr(batch, "keys") else []
    if not found:
        raise ValueError("Accuracy needs labels: give (inputs, labels) tuples, or mappings with 'labels'.")
    return found[0].long().cpu()


def _logits_of(output: Any) -> Tensor:  # noqa: ANN401 - any output
    logits = output["logits"] if hasattr(output, "keys") else output
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"A classifier gives logits of shape (samples, labels), but got {type(logits).__name__}.")
    return logits
