"""Measuring students: one exposed set a defect, and one forward pass a student over clean and exposed."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from remos_hf.defects.base import FOOLED, Defect, ExposedSet, check_defects
from remos_hf.evaluation.measures import Rate, accuracy, defect_inheritance_rate, excess_dir, label_flip_rate
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.report import DefectReport
from remos_hf.evaluation.tables import rate_of
from remos_hf.evaluation.tasks import Task, without_map_bars

Student = nn.Module | Callable[[], nn.Module]


def evaluate_transfer(
    students: Mapping[str, Student],
    *,
    teacher: nn.Module,
    dataset: Dataset,
    defects: Mapping[str, Defect] | Sequence[Defect],
    task: Task,
    floor_students: Mapping[str, Student] | None = None,
    reference: str = "finetune",
    name: str = "",
    seed: int | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = True,
) -> "DefectReport":
    """Measure what students inherited: one exposed set a defect, and one forward pass a student over clean and exposed.

    Args:
        students: Models by name, or functions that load one; then only one is held at a time.
        teacher: The teacher that they were started from.
        dataset: Clean test samples of the students' task.
        defects: The defects, by name or named by their class.
        task: How samples are read.
        floor_students: Students of a never-poisoned teacher, made alike, by the same names: their rate is the floor.
        reference: The student that relative figures refer to, plain fine-tuning.
        name: Of the setting, such as "SST-2 to IMDB": reports of several can be added.
        seed: That the students were made with: reports of several are pooled when added.
        cache: Where exposed sets that were costly to make are kept.
        workers: Processes that make them.
        progress: Show bars.

    Returns:
        The report: one record for each student and defect.

    Raises:
        ValueError: There is no student or no defect, two defects have one name, or a floor student has no twin.
    """
    named = _named(defects)
    if not named or not students:
        raise ValueError(f"A transfer needs a defect and a student, but got {len(named)} and {len(students)}.")
    unknown = set(floor_students or {}) - set(students)
    if unknown:
        raise ValueError(f"floor_students names {sorted(unknown)}, but the students are {sorted(students)}.")
    exposed, seconds = {}, {}
    for kind, defect in named.items():
        start = time.perf_counter()
        with without_map_bars():
            exposed[kind] = defect.exposed_set(dataset, teacher=teacher, cache=cache, workers=workers, **task.exposing)
        seconds[kind] = round(time.perf_counter() - start, 2)

    def measured(models: Mapping[str, Student]) -> dict[str, dict[str, Any]]:
        found = {}
        for student, model in models.items():
            start = time.perf_counter()
            found[student] = measure(_model(model), dataset, exposed, task, progress=progress)
            found[student]["made"] = {"seconds": {"measure": round(time.perf_counter() - start, 2)}}
        return found

    own, floors = measured(students), measured(floor_students or {})
    records = [
        {"task": name, "defect": kind, "student": one, "seed": seed, **paired(own[one], floors.get(one), kind)}
        for kind in named
        for one in students
    ]
    chosen = {
        **task.to_dict(),
        "batch_size": task.batch_size,
        "num_samples": len(dataset),
        "defects": {kind: defect.to_dict() for kind, defect in named.items()},
        "exposed": {kind: {**one.facts, "seconds": seconds[kind]} for kind, one in exposed.items()},
    }
    return DefectReport(records, {"reference": reference, "audits": {name: chosen}})


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
        JSON values: "acc", and under "dir" and "flip" a rate for each defect (flip: of all exposed samples, whether
        right when clean or not). Where an exposed set says which of its inputs `fooled` the teacher, "dir" is over all
        of them, as the artifact's vision scripts count, and "dir_fooled" over those alone, as the paper defines it.

    Source:
        ReMoS: "generated misclassified samples" (paper); all of them: artifact, CV_adv/eval_robustness.py:56-66.
    """
    references = np.array(dataset[task.label_column])
    clean = predict_labels(model, dataset, task, progress=progress)
    found: dict[str, Any] = {"acc": accuracy(clean, references).to_dict(), "dir": {}, "flip": {}, "dir_fooled": {}}
    for name, one in exposed.items():
        if not len(one):  # a search that found nothing
            found["dir"][name] = Rate.of(0, 0).to_dict()
            continue
        predicted = predict_labels(model, one.dataset, task, progress=progress)
        index = np.array(one.clean_index)
        rate = defect_inheritance_rate(predicted, references[index], clean[index], one.target_label)
        found["dir"][name] = rate.to_dict()
        if FOOLED in one.dataset.column_names:
            held = np.array(one.dataset[FOOLED], dtype=bool)
            some = (predicted[held], references[index[held]], clean[index[held]])
            found["dir_fooled"][name] = (defect_inheritance_rate(*some) if held.any() else Rate.of(0, 0)).to_dict()
        if one.target_label is not None:
            found["flip"][name] = label_flip_rate(predicted, references[index], one.target_label).to_dict()
    return found


def paired(student: Mapping[str, Any], twin: Mapping[str, Any] | None, defect: str) -> dict[str, Any]:
    """Put what `measure` gave of a student beside its benign twin, for one defect; JSON values of a record."""
    own = rate_of(student["dir"][defect])
    # A student that is its own twin (Retrain takes nothing from any teacher) has no excess to measure.
    apart = twin is not None and twin is not student
    floor = rate_of(twin["dir"][defect]) if twin is not None else None
    return {
        "acc": student["acc"],
        "dev_acc": student.get("dev_acc"),
        "dir": own.to_dict(),
        "dir_fooled": student.get("dir_fooled", {}).get(defect),
        "flip": student["flip"].get(defect),
        "floor": floor.to_dict() if floor else None,
        "floor_acc": twin["acc"] if twin is not None else None,
        "excess": excess_dir(own, floor).to_dict() if apart else None,
        "reactivation": student.get("reactivation", {}).get(defect),
        "floor_reactivation": (twin or {}).get("reactivation", {}).get(defect),
        "made": student.get("made", {}),
    }


def _named(defects: Mapping[str, Defect] | Sequence[Defect]) -> dict[str, Defect]:
    check_defects(defects.values() if isinstance(defects, Mapping) else defects)
    if isinstance(defects, Mapping):
        return dict(defects)
    names = [type(defect).__name__ for defect in defects]
    if len(set(names)) < len(names):
        raise ValueError(f"Two defects of one kind need names: pass a mapping instead of the list of {names}.")
    return dict(zip(names, defects, strict=True))


def _model(student: Student) -> nn.Module:
    return student if isinstance(student, nn.Module) else student()
