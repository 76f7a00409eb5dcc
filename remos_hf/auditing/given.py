"""Measuring students that somebody made: one exposed set a defect, and one forward pass a student over all of it."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.class_names import check_classes, class_names, num_classes, same_names
from remos_hf.adapters.weights_hash import hash_of_folder, hash_of_model
from remos_hf.auditing.data_files import TEXT_COLUMNS, text_columns_of
from remos_hf.auditing.labels import are_numbers, classes_of
from remos_hf.auditing.made import made_by, made_by_record
from remos_hf.auditing.student_files import LoadedStudent, load_student
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import Defect, ExposedSet, check_defects
from remos_hf.evaluation.tasks import Task, without_map_bars
from remos_hf.evaluation.transfer import measure, paired
from remos_hf.judging.report import DefectReport
from remos_hf.strategies.base import Strategy

Student = nn.Module | Callable[[], nn.Module] | LoadedStudent | str | os.PathLike


def evaluate_transfer(
    students: Mapping[str, Student],
    *,
    dataset: Dataset,
    defects: Mapping[str, Defect] | Sequence[Defect],
    teacher: nn.Module | None = None,
    task: Task | None = None,
    floor_students: Mapping[str, Student] | None = None,
    made: Mapping[str, Strategy | Mapping[str, Any]] | None = None,
    reference: str = "finetune",
    name: str = "",
    seed: int | None = None,
    told: Mapping[str, Any] | None = None,
    teacher_unmeasured: str | None = None,
    device: str | torch.device | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = True,
) -> DefectReport:
    """Measure what students inherited: one exposed set a defect, and one forward pass a student over clean and exposed.

    Args:
        students: By name: models, functions that load one, or folders that a student was saved in; of functions and
            folders only one is held at a time. A folder's record says how its student was made.
        dataset: Clean test samples of the students' task. Without a task, texts are found under their usual names, as
            the commands find them.
        defects: The defects, by name or named by their class. Known triggers are put into the samples; others are
            searched for on the teacher.
        teacher: The teacher that they were started from. Measured too, if it tells as many labels apart. None if the
            defects are known triggers.
        task: How samples are read; None for what reads the first student, which then is a folder.
        floor_students: Students of a never-poisoned teacher, made alike, by the same names: their rate is the floor.
        made: How students were made, by name: a strategy; or a mapping as records of audits hold it, such as
            {"strategy": Finetune().to_dict(), "lr_factor": 3.0}. Of a model that nothing is said of, nothing is known.
        reference: The student that relative figures refer to, plain fine-tuning.
        name: Of the setting, such as "SST-2 to IMDB": reports of several can be added.
        seed: That the students were made with: reports of several are pooled when added.
        told: What the report's settings say besides, as JSON values.
        teacher_unmeasured: Why the teacher itself is not to be measured, such as that its head is fresh.
        device: Where students from folders run; the teacher's, or the CPU, if None.
        cache: Where exposed sets that were costly to make are kept.
        workers: Processes that make them.
        progress: Show bars.

    Returns:
        The report: one record for each student and defect. Its "given" ties it to the weights that were measured.

    Raises:
        ValueError: There is no student, no defect or no sample, two defects have one name, a floor student has no
            twin, `made` names no student, nothing says how samples are read, a defect needs the teacher, or a student
            tells other classes apart than the samples name, or names them in another order.
    """
    named = _named(defects)
    _check(students, named, floor_students or {}, made or {}, teacher)
    if not len(dataset):
        raise ValueError("dataset holds no sample. Give clean test samples of the students' task, with labels.")
    if task is None:
        dataset = _with_columns_of(named, dataset)
        task = _task_of(next(iter(students.values())), dataset)
    exposed, facts = {}, {}
    for kind, defect in named.items():
        start = time.perf_counter()
        with without_map_bars():
            one = defect.exposed_set(dataset, teacher=teacher, cache=cache, workers=workers, **task.exposing)
        exposed[kind] = one
        facts[kind] = {"num_exposed": len(one), **one.facts, "seconds": round(time.perf_counter() - start, 2)}
    measuring = _Measuring(dataset, exposed, task, device or _device_of(teacher), _reader_of(teacher), progress)
    own = {one: measuring.student(model, (made or {}).get(one), seed) for one, model in students.items()}
    floors = {one: measuring.student(model, None, seed) for one, model in (floor_students or {}).items()}
    _compare_learning_rates(own, reference)
    records = [
        {"task": name, "defect": kind, "student": one, "seed": seed, **paired(own[one], floors.get(one), kind)}
        | {"given": own[one]["given"]}
        for kind in named
        for one in students
    ]
    chosen = {
        **task.to_dict(),
        "batch_size": task.batch_size,
        "num_samples": len(dataset),
        "defects": {kind: defect.to_dict() for kind, defect in named.items()},
        "exposed": facts,
        **({"floor_students": {one: found["given"] for one, found in floors.items()}} if floors else {}),
        **(told or {}),
    }
    teachers = {}
    why = teacher_unmeasured or _why_unmeasured(teacher, dataset, task)
    if why is None:
        teachers["given" if seed is None else f"given-{seed}"] = measuring.teacher(teacher)
    else:
        chosen["teacher_unmeasured"] = why
    return DefectReport(records, {"reference": reference, "audits": {name: chosen}, "teachers": {name: teachers}})


@dataclass(frozen=True)
class _Measuring:
    """What all models are measured on, in one way."""

    dataset: Dataset
    exposed: Mapping[str, ExposedSet]
    task: Task
    device: str | torch.device
    reader: str | None
    progress: bool

    def student(self, student: Student, said: Strategy | Mapping[str, Any] | None, seed: int | None) -> dict[str, Any]:
        """Measure a student; say what ties the figures to its weights, and what is known of how it was made."""
        start = time.perf_counter()
        if isinstance(student, (str, os.PathLike)):
            student = load_student(student, reader=self.reader)
        facts: dict[str, Any] = {}
        if isinstance(student, LoadedStudent):
            given = {"weights": hash_of_folder(student.folder), "from": student.folder.resolve().name}
            facts = made_by_record(student.record.config) if student.record else {}
            model, names = student.model.to(self.device), student.class_names
        else:
            model = student if isinstance(student, nn.Module) else student()
            names = class_names(model)
            given = {"weights": _hash_of(model), "from": None}
        _check_classes(model, names, self.dataset, self.task)
        if said is not None:
            facts = made_by(said.to_dict(), 1.0, seed) if isinstance(said, Strategy) else dict(said)
        found = measure(model, self.dataset, self.exposed, self.task, progress=self.progress)
        seconds = {"measure": round(time.perf_counter() - start, 2)}
        return {**found, "given": given, "made": {**facts, "seconds": seconds}}

    def teacher(self, teacher: nn.Module) -> dict[str, Any]:
        """Measure the teacher, which is its own student before any training."""
        return measure(teacher, self.dataset, self.exposed, self.task, progress=self.progress)


def _check(
    students: Mapping[str, Student],
    defects: Mapping[str, Defect],
    floors: Mapping[str, Student],
    made: Mapping[str, Any],
    teacher: nn.Module | None,
) -> None:
    if not defects or not students:
        raise ValueError(f"A transfer needs a defect and a student, but got {len(defects)} and {len(students)}.")
    for what, names in (("floor_students", floors), ("made", made)):
        unknown = set(names) - set(students)
        if unknown:
            raise ValueError(f"{what} names {sorted(unknown)}, but the students are {sorted(students)}.")
    sought = [name for name, defect in defects.items() if not isinstance(defect, Backdoor)]
    if sought and teacher is None:
        raise ValueError(f"The defect {sought[0]!r} is searched for on the students' teacher: give teacher=.")


def _named(defects: Mapping[str, Defect] | Sequence[Defect]) -> dict[str, Defect]:
    check_defects(defects.values() if isinstance(defects, Mapping) else defects)
    if isinstance(defects, Mapping):
        return dict(defects)
    names = [type(defect).__name__ for defect in defects]
    if len(set(names)) < len(names):
        raise ValueError(f"Two defects of one kind need names: pass a mapping instead of the list of {names}.")
    return dict(zip(names, defects, strict=True))


def _with_columns_of(defects: Mapping[str, Defect], dataset: Dataset) -> Dataset:
    """Name texts as the defects read them, where none of them names the columns that the data has."""
    readers = [defect.trigger if isinstance(defect, Backdoor) else defect for defect in defects.values()]
    wanted = {column for one in readers for column in getattr(one, "text_columns", ())}
    held = set(dataset.column_names)
    if not wanted or wanted <= held or not wanted <= set(TEXT_COLUMNS) or held & set(TEXT_COLUMNS):
        return dataset
    return dataset.rename_columns(
        dict(zip(text_columns_of("The data set", dataset), TEXT_COLUMNS, strict=False)),
    )


def _task_of(student: Student, dataset: Dataset) -> Task:
    if isinstance(student, (str, os.PathLike)):
        student = load_student(student)
    if not isinstance(student, LoadedStudent):
        raise ValueError("Nothing says how samples are read: give task=, or as the first student the folder of one.")
    return student.task(dataset)


def _check_classes(model: nn.Module, names: Sequence[str] | None, dataset: Dataset, task: Task) -> None:
    """Refuse a student whose outputs are other classes than the samples' labels."""
    wanted = classes_of(dataset, task.label_column)
    if isinstance(dataset.features[task.label_column], ClassLabel) and not are_numbers(wanted):
        check_classes(names, num_classes(model), wanted, "The data")


def _compare_learning_rates(own: Mapping[str, dict[str, Any]], reference: str) -> None:
    """Put each student's learning rate over that of plain fine-tuning, where records tell both."""
    plain = own.get(reference, {}).get("made", {}).get("learning_rate")
    for found in own.values():
        rate = found["made"].get("learning_rate")
        if plain and rate:
            found["made"] = {**found["made"], "lr_factor": round(rate / plain, 6)}


def _hash_of(model: nn.Module) -> str | None:
    return hash_of_model(model) if all(isinstance(one, Tensor) for one in model.state_dict().values()) else None


def _device_of(teacher: nn.Module | None) -> torch.device:
    held = [] if teacher is None else teacher.parameters()
    return next((one.device for one in held), torch.device("cpu"))


def _reader_of(teacher: nn.Module | None) -> str | None:
    return getattr(teacher, "name_or_path", None) or None


def _why_unmeasured(teacher: nn.Module | None, dataset: Dataset, task: Task) -> str | None:
    """Say why a teacher cannot be measured on the students' task; None if it can."""
    if teacher is None:
        return "no teacher was given"
    feature = dataset.features[task.label_column]
    count = len(feature.names) if isinstance(feature, ClassLabel) else 1 + max(dataset[task.label_column])
    outputs = _outputs_of(teacher, dataset.select([0]), task)
    if outputs is None:
        return "the teacher has no head that tells labels apart"
    if outputs != count:
        return f"the teacher tells {outputs} labels apart, and the task has {count}"
    own, names = class_names(teacher), classes_of(dataset, task.label_column)
    if own is None or are_numbers(names) or same_names(own, names):
        return None
    return f"the teacher's classes are {', '.join(own)}, in this order, and the task's {', '.join(names)}"


@torch.inference_mode()
def _outputs_of(model: nn.Module, sample: Dataset, task: Task) -> int | None:
    _, batch = next(iter(task.batches(sample)))
    device = _device_of(model)
    with evaluating(model):
        logits = getattr(model(**{key: one.to(device) for key, one in batch.items()}), "logits", None)
    return logits.shape[1] if logits is not None and logits.ndim == 2 else None
