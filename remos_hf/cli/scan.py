"""`remos scan`: look for inputs that turn a student, whoever made it, and say what is suspicious."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from remos_hf.adapters.class_names import check_classes, num_classes
from remos_hf.adapters.images import ImageInput
from remos_hf.auditing.data_files import drawn, holds_images, read_data
from remos_hf.auditing.labels import LABEL_COLUMN, by_name
from remos_hf.auditing.student_files import LoadedStudent, load_student
from remos_hf.cli.answer import NOTHING_SAID, in_lines
from remos_hf.cli.command_line import command_line, shown_name
from remos_hf.cli.options import ALL, ScanOptions, was_given
from remos_hf.cli.output import SCAN, check_output, written
from remos_hf.cli.teacher import check_reading, device_for
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.judging.scan_judgement import judged_scan
from remos_hf.scanning.patches import scan_patches
from remos_hf.scanning.suspects import Scan
from remos_hf.scanning.tokens import scan_tokens
from remos_hf.showing.scan_page import write_scan_page

_IMAGES = 512  # unless another number is asked for


def run(asked: ScanOptions, progress: bool) -> tuple[Any, ...]:
    """Scan a student; give what is told, as JSON values and as text, and the exit status if it is not 0."""
    check_output(asked.output, SCAN, asked.overwrite)
    student = load_student(asked.student)
    check_reading(asked, student.reads_images)
    if not student.reads_images and was_given(asked, "mode"):
        raise ValueError("--mode is of images, and the student reads texts. Leave it out.")
    classes = list(student.class_names or map(str, range(num_classes(student.model))))
    reference = None if asked.reference is None else _reference(asked, student, classes)
    samples, held = _samples(asked, student, classes)
    found = _scanned(asked, student, reference, samples, classes)
    said = judged_scan(found)
    with written(asked.output, SCAN) as folder:
        found.save(folder / "scan.json")
        title = f"Scan of {asked.student.resolve().name}, on {shown_name(asked.data)}"
        write_scan_page(found, said, folder / "scan.html", title=title, command=command_line("scan", asked))
    files = {name: str(asked.output / f"scan.{name}") for name in ("json", "html")}
    told = {
        "answer": said.answer,
        "advice": said.advice,
        "limits": said.limits,
        "can_be_said": said.can_be_said,
        "suspicious": [asdict(one) | {"class": classes[one.label]} for one in said.suspicious],
        "samples": len(samples),
        "of": held,
        "scan": files,
    }
    lines = [in_lines([said.answer, *said.advice, *said.limits], said.glance)]
    if len(samples) < held:
        lines.append(f"Not all samples are used: {len(samples):,} of {held:,} of {asked.data} (--max-samples).")
    return (
        told,
        "\n".join([*lines, f"Saved {', '.join(files.values())}"]),
        *([] if said.can_be_said else [NOTHING_SAID]),
    )


def _samples(asked: ScanOptions, student: LoadedStudent, classes: list[str]) -> tuple[Dataset, int]:
    """Read the samples, with the student's classes; say how many there are."""
    pool = read_data(asked.data, text_columns=asked.text_columns, label_column=asked.label_column)
    if holds_images(pool) != student.reads_images:
        reads, holds = ("images", "texts")[:: 1 if student.reads_images else -1]
        raise ValueError(f"{asked.student} reads {reads}, but {asked.data} holds {holds}.")
    pool = by_name(pool, asked.data, classes, asked.student)
    most = asked.max_samples or (_IMAGES if student.reads_images else ALL)
    return pool if most == ALL or len(pool) <= most else drawn(pool, most, asked.seed), len(pool)


def _reference(asked: ScanOptions, student: LoadedStudent, classes: list[str]) -> LoadedStudent:
    """Load the clean student, which reads and answers as the other one does."""
    if asked.reference.resolve() == asked.student.resolve():
        raise ValueError("--reference is the student itself: name another student, of the same task.")
    reference = load_student(asked.reference)
    names = reference.class_names
    check_classes(None if names is None else list(names), num_classes(reference.model), classes, asked.student)
    if _vocabulary(reference) != _vocabulary(student):
        raise ValueError(
            f"--reference {asked.reference} reads its inputs in another way than {asked.student}: what turns one is "
            "nothing that the other could be shown. Name one whose tokenizer or image preparation is the same."
        )
    return reference


def _vocabulary(student: LoadedStudent) -> Any:  # noqa: ANN401 - of texts or images
    return student.reader if isinstance(student.reader, ImageInput) else student.reader.get_vocab()


def _scanned(
    asked: ScanOptions,
    student: LoadedStudent,
    reference: LoadedStudent | None,
    samples: Dataset,
    classes: list[str],
) -> Scan:
    device = device_for(asked.cpu)
    task = student.task(samples, batch_size=asked.batch_size, max_length=asked.max_length)
    labels = torch.tensor(samples[LABEL_COLUMN])

    def batches() -> Iterator[dict[str, Tensor]]:
        for rows, batch in task.batches(samples):
            yield {**batch, "labels": labels[torch.as_tensor(list(rows))]}

    models = {
        "student": student.model.to(device),
        "reference": None if reference is None else reference.model.to(device),
        "seed": asked.seed,
        "progress": True,  # without a terminal it is a line a minute
    }
    if not student.reads_images:
        with without_map_bars():
            return scan_tokens(batches=batches(), tokenizer=student.reader, **models)
    return scan_patches(
        data=batches(),
        labels=classes,
        images=student.reader,
        mode=asked.mode,
        batch_size=asked.batch_size,
        max_samples=max(4, len(samples)),
        **models,
    )
