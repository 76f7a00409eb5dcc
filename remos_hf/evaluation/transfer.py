"""Measuring one model: a forward pass over the clean samples and one over each exposed set."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from remos_hf.defects.base import FOOLED, ExposedSet
from remos_hf.evaluation.measures import Rate, accuracy, defect_inheritance_rate, excess_dir, label_flip_rate, rate_of
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.tasks import Task


def measure(
    model: nn.Module, dataset: Dataset, exposed: Mapping[str, ExposedSet], task: Task, *, progress: bool = True
) -> dict[str, Any]:
    """Measure one model: its accuracy, and the rate at which it shows each defect.

    Args:
        model: The model.
        dataset: Clean samples.
        exposed: Exposed sets made from them, by the defect's name.
        task: How samples are read.
        progress: Show bars.

    Returns:
        JSON values: "acc"; "commonest", the share of the samples with the commonest label, which a model that always
        answers it gets right; under "dir" and "flip" a rate for each defect (flip: of all exposed samples, whether
        right when clean or not; "flip_clean": the same of the clean samples that they were made from); under "outcomes"
        what each exposed sample did (`Outcomes`). Where an exposed set says which of its inputs `fooled` the teacher,
        "dir" is over all of them, as the artifact's vision scripts count, and "dir_fooled" over those alone, as the
        paper defines it.

    Source:
        ReMoS: "generated misclassified samples" (paper); all of them: artifact, CV_adv/eval_robustness.py:56-66.
    """
    references = np.array(dataset[task.label_column])
    clean = predict_labels(model, dataset, task, progress=progress)
    found: dict[str, Any] = {"acc": accuracy(clean, references).to_dict(), "commonest": commonest_share(references)}
    found |= {"dir": {}, "flip": {}, "flip_clean": {}, "dir_fooled": {}, "outcomes": {}}
    for name, one in exposed.items():
        if not len(one):  # a search that found nothing
            found["dir"][name] = Rate.of(0, 0).to_dict()
            continue
        predicted = predict_labels(model, one.dataset, task, progress=progress)
        index = np.array(one.clean_index)
        rate = defect_inheritance_rate(predicted, references[index], clean[index], one.target_label)
        found["dir"][name] = rate.to_dict()
        found["outcomes"][name] = Outcomes.of(predicted, references[index], clean[index], one.target_label).to_dict()
        if FOOLED in one.dataset.column_names:
            held = np.array(one.dataset[FOOLED], dtype=bool)
            some = (predicted[held], references[index[held]], clean[index[held]])
            found["dir_fooled"][name] = (defect_inheritance_rate(*some) if held.any() else Rate.of(0, 0)).to_dict()
        if one.target_label is not None:
            for key, given in (("flip", predicted), ("flip_clean", clean[index])):
                found[key][name] = label_flip_rate(given, references[index], one.target_label).to_dict()
    return found


def commonest_share(references: np.ndarray) -> float:
    """Give the share of samples with the commonest label: the accuracy of a model that always answers it."""
    return float(np.unique(references, return_counts=True)[1].max() / len(references))


def paired(student: Mapping[str, Any], twin: Mapping[str, Any] | None, defect: str) -> dict[str, Any]:
    """Put what `measure` gave of a student beside its benign twin, for one defect; JSON values of a record."""
    own = rate_of(student["dir"][defect])
    # A student that is its own twin (Retrain takes nothing from any teacher) has no excess to measure.
    apart = twin is not None and twin is not student
    floor = rate_of(twin["dir"][defect]) if twin is not None else None
    return {
        "acc": student["acc"],
        "commonest": student.get("commonest"),
        "dev_acc": student.get("dev_acc"),
        "dir": own.to_dict(),
        "dir_fooled": student.get("dir_fooled", {}).get(defect),
        "flip": student["flip"].get(defect),
        "floor": floor.to_dict() if floor else None,
        "floor_acc": twin["acc"] if twin is not None else None,
        "excess": excess_dir(own, floor).to_dict() if apart else None,
        "reactivation": student.get("reactivation", {}).get(defect),
        "floor_reactivation": (twin or {}).get("reactivation", {}).get(defect),
        "outcomes": student.get("outcomes", {}).get(defect),
        "floor_outcomes": (twin or {}).get("outcomes", {}).get(defect) if apart else None,
        "made": student.get("made", {}),
    }
