"""`remos audit --student`: show a student, whoever made it, known triggers and what is found on its teacher."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from remos_hf.adapters.guarded_loading import TIMM, teacher_config
from remos_hf.adapters.timm_models import ImageClassifier, labels_of
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.auditing.data_files import drawn, holds_images, read_data
from remos_hf.auditing.fingerprint import fingerprint
from remos_hf.auditing.given import evaluate_transfer
from remos_hf.auditing.labels import are_numbers, by_name, some_of
from remos_hf.auditing.student_files import LoadedStudent, load_student
from remos_hf.cli.answer import answered
from remos_hf.cli.command_line import command_line, shown_name
from remos_hf.cli.defects_asked import (
    SHOWN_IMAGE_DEFECTS,
    SHOWN_TEXT_DEFECTS,
    chosen_defects,
    defects_of_images,
    defects_of_texts,
    described_defects,
    target_of,
)
from remos_hf.cli.options import ALL, AuditOptions
from remos_hf.cli.report import report_files
from remos_hf.cli.teacher import Teacher, device_for, identity
from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import Defect
from remos_hf.errors import LayerMismatchError, TeacherMismatchError
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.tasks import TextTask

logger = logging.getLogger(__name__)

_MAX_LENGTH = 128  # of `remos train`
_SAMPLES = 4000
_WRITTEN = {"report.json", "report.md", "report.html", "report_pictures", "exposed"}


@dataclass(frozen=True)
class _OnTeacher:
    """The teacher of a student, as far as it is at hand.

    Attributes:
        model: The teacher; None if it was not named.
        name: What it is called, fit to be shown.
        unmeasured: Why it is not measured itself; None if it has a head for the task.
    """

    model: nn.Module | None
    name: str | None
    unmeasured: str | None


def measure_student(asked: AuditOptions, progress: bool) -> tuple[Any, ...]:
    """Measure a student; give what is told, as JSON values and as text, and the exit status if it is not 0."""
    _check_folder(asked.output)
    student = load_student(asked.student, reader=asked.teacher)
    samples, classes, held = _samples(asked, student)
    left_out = {"left_out": samples.info.description} if samples.info.description else {}
    max_length, device = asked.max_length or _MAX_LENGTH, device_for(asked.cpu)
    task = student.task(samples, batch_size=asked.batch_size, max_length=max_length, bf16=asked.bf16)
    defects = _defects(asked, task, classes, max_length)
    on = _teacher(asked, student, samples, classes, defects)
    if on.model is not None:
        on.model.to(device)
    mine, *others = _named(asked)
    report = evaluate_transfer(
        {mine: student, **dict.fromkeys(others, asked.plain_student)},
        dataset=samples,
        defects=defects,
        teacher=on.model,
        task=task,
        floor_students=None if asked.floor_student is None else {mine: asked.floor_student},
        reference=others[0] if others else "finetune",
        name=asked.name or shown_name(asked.data),
        told={
            "command": command_line("audit", asked),
            "teacher": on.name,
            "max_samples": asked.max_samples or _SAMPLES,
            "samples": {"test": {"from": shown_name(asked.data), "samples": len(samples), "of": held, **left_out}},
        },
        teacher_unmeasured=on.unmeasured,
        device=device,
        cache=asked.output / "exposed",
        progress=progress,
    )
    path = report.save(asked.output / "report.json")
    files = report_files(report, path)
    said, text, status = answered(report)
    told = {**said, "report": {name: str(file) for name, file in {"json": path, **files}.items()}, "missing": 0}
    lines = [text]
    if len(samples) < held:
        lines.append(f"Not all samples are used: {len(samples):,} of {held:,} of {asked.data} (--max-samples).")
    if on.unmeasured is not None:
        lines.append(f"The teacher itself was not measured: {on.unmeasured}.")
    return told, "\n".join([*lines, f"Saved {', '.join(told['report'].values())}"]), *status


def _check_folder(output: Path) -> None:
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if held - _WRITTEN:
        raise FileExistsError(
            f"{output} holds something else than the report of a student ({', '.join(sorted(held - _WRITTEN)[:3])}). "
            "Name a new folder."
        )


def _samples(asked: AuditOptions, student: LoadedStudent) -> tuple[Dataset, list[str], int]:
    """Read the test samples, with the student's classes; give these too, and how many samples there are."""
    pool = read_data(asked.data, text_columns=asked.text_columns, label_column=asked.label_column)
    if holds_images(pool) != student.reads_images:
        reads, holds = ("images", "texts")[:: 1 if student.reads_images else -1]
        raise ValueError(f"{asked.student} reads {reads}, but {asked.data} holds {holds}.")
    trained_on = {} if student.record is None else student.record.config.get("data") or {}
    if trained_on.get("sha256") == fingerprint(pool):
        warnings.warn(
            f"{asked.data} is what the student was trained on, by its record: it was seen, so accuracy is too high and "
            "what is said of defects is no test. Give --data that it never saw. (remos_hf)",
            stacklevel=2,
        )
    classes = list(student.class_names or map(str, range(_outputs_of(student.model))))
    most = asked.max_samples or _SAMPLES
    pool = by_name(pool, asked.data, classes, asked.student)
    samples = pool if most == ALL or len(pool) <= most else drawn(pool, most, seed=0)
    return samples, classes, len(pool)


def _outputs_of(model: nn.Module) -> int:
    return labels_of(model) if isinstance(model, ImageClassifier) else int(model.config.num_labels)


def _defects(
    asked: AuditOptions, task: TextTask | ImageTask, classes: Sequence[str], max_length: int
) -> dict[str, Defect]:
    images = isinstance(task, ImageTask)
    names = asked.defects or described_defects(asked)
    known = SHOWN_IMAGE_DEFECTS if images else SHOWN_TEXT_DEFECTS
    if not names:
        trigger = "" if images else "a known trigger (--words, --sentence), or "
        raise ValueError(f"Say what the student is to be shown: {trigger}--defects ({', '.join(known)}).")
    target = target_of(asked, classes, images=images)
    if isinstance(task, TextTask):
        makers = defects_of_texts(asked, target, task.text_columns, max_length)
    else:
        makers = defects_of_images(asked, target)
    return chosen_defects(asked, names, known, makers, images=images)


def _named(asked: AuditOptions) -> list[str]:
    """Name the students by their folders; those of one name by the folders above, too."""
    folders = [asked.student, *([asked.plain_student] if asked.plain_student is not None else [])]
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError("--student and --plain-student are the same folder.")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [f"{place.parent.name} {place.name}" for place in places]
    return names


def _teacher(
    asked: AuditOptions,
    student: LoadedStudent,
    samples: Dataset,
    classes: Sequence[str],
    defects: Mapping[str, Defect],
) -> _OnTeacher:
    """Load the teacher that was named, or if something is to be searched for, the one that the record names."""
    name, revision = asked.teacher, asked.revision
    sought = [one for one, defect in defects.items() if not isinstance(defect, Backdoor)]
    if name is None:
        recorded = {} if student.record is None else student.record.config["teacher"]
        known = recorded.get("id")
        if not sought:
            return _OnTeacher(None, known, "it was not named (remos audit TEACHER --student ...)")
        # A folder is recorded without its path: only what has an owner is the same model everywhere.
        if not known or "/" not in known.strip("./~") or Path(known).exists():
            told = f"its record names {known!r}, which may be any folder" if known else "no record names it"
            raise ValueError(
                f"{sought[0]} is searched for on the student's teacher, but {told}. Name it: remos audit TEACHER "
                f"--student {asked.student}."
            )
        name, revision = known, recorded.get("revision")
    unmeasured = _why_headless(name, revision, classes)
    if unmeasured is not None and any(isinstance(defect, AdversarialText) for defect in defects.values()):
        raise ValueError(f"textfooler changes texts until the teacher's answer changes, but of {name} {unmeasured}.")
    model = Teacher.named(name, samples, revision).load(len(classes), names=student.class_names)
    _check_teacher(student, model, name)
    return _OnTeacher(model.eval(), identity(name, revision)["id"], unmeasured)


def _why_headless(name: str, revision: str | None, classes: Sequence[str]) -> str | None:
    """Say why a teacher's own head does not answer for the student's task; None if it does."""
    if name.startswith(TIMM):
        return "the head is that of its own task"
    config = teacher_config(name, revision=revision)
    if not (config.architectures or [""])[0].endswith(("ForSequenceClassification", "ForImageClassification")):
        return "the checkpoint has no head for any task"
    if config.num_labels != len(classes):
        return f"the head tells {config.num_labels} classes apart, and the student {len(classes)}"
    own = [str(config.id2label.get(number, number)) for number in range(config.num_labels)]
    numbered = are_numbers(classes) or are_numbers([one.removeprefix("LABEL_") for one in own])
    if numbered or sorted(map(str.casefold, own)) == sorted(map(str.casefold, classes)):
        return None  # in another order, they are put into the student's when it is loaded
    return f"the head's classes are {some_of(own)}, and the student's {some_of(classes)}"


def _check_teacher(student: LoadedStudent, model: nn.Module, name: str) -> None:
    """Warn if a student was sliced from another teacher than the one that was named."""
    relevant = None if student.record is None else student.record.relevant_slice
    if relevant is None or not relevant.teacher_hash:
        return
    try:
        relevant.check_matches(adapter_for(model).layers(embeddings=True))
    except (LayerMismatchError, TeacherMismatchError):
        warnings.warn(
            f"{name} is not the teacher that the student was sliced from, or it was held in another number type then: "
            "its weights have another hash than the record says. What is found on it may say nothing of the student. "
            "(remos_hf)",
            stacklevel=2,
        )
