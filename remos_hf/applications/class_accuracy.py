"""How well a model tells some classes, and how well the others."""

import numbers
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.adapters.flow_recording import on_device_of
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
        TypeError: Classes or labels are no whole numbers, or labels not one a sample.
        UnsupportedModelError: The model gives no logits.
        ValueError: There are no classes, one does not exist, or a batch has no labels or one that does not exist.
        NonFiniteError: A logit is NaN or infinite.
    """
    if not all(isinstance(one, numbers.Integral) and not isinstance(one, bool) for one in classes):
        raise TypeError(f"classes names the target classes by their whole numbers, but got {list(classes)}.")
    targets = torch.tensor(sorted(set(map(int, classes))))
    if not len(targets):
        raise ValueError("classes names the target classes, at least one, but got none.")
    adapter = adapter_for(model, ())
    logits, labels = [], []
    with evaluating(model):
        for batch in unpacked(batches):
            labels.append(labels_in(batch))
            logits.append(logits_in(adapter.forward(on_device_of(model, batch)), model).float().cpu())
            if labels[-1] is None or len(labels[-1]) != len(logits[-1]):
                held = "no" if labels[-1] is None else len(labels[-1])
                raise ValueError(
                    f"Accuracy needs a label of every sample, but a batch of {len(logits[-1])} has {held} labels: give "
                    "(inputs, labels) tuples, or mappings with 'labels'."
                )
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
