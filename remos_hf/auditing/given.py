"""Measuring students that somebody made: one exposed set a defect, and one forward pass a student over all of it."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from remos_hf.defects.base import Defect, check_defects
from remos_hf.evaluation.tasks import Task, without_map_bars
from remos_hf.evaluation.transfer import measure, paired
from remos_hf.judging.report import DefectReport

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
) -> DefectReport:
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
