"""`remos profile`: count which neurons of a teacher a task's data uses."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from remos_hf.auditing.data_files import drawn, read_data
from remos_hf.auditing.labels import LABEL_COLUMN
from remos_hf.cli.output import PROFILE, check_output, written
from remos_hf.cli.teacher import Teacher, device_for
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.strategies.slice_and_reset import CRITERIA


def run(
    *,
    teacher: str,
    data: str,
    output: Path,
    revision: str | None,
    text_columns: list[str],
    max_samples: int | None,
    criterion: str,
    batch_size: int,
    max_length: int,
    seed: int,
    cpu: bool,
    overwrite: bool,
    progress: bool,
) -> tuple[dict[str, Any], str]:
    """Take a profile and save it; give what is told, as JSON values and as text."""
    check_output(output, PROFILE, overwrite)
    options = {"max_samples": max_samples, "criterion": criterion, "batch_size": batch_size, "max_length": max_length}
    start = time.perf_counter()
    profile = profiled(teacher, data, text_columns, revision=revision, seed=seed, cpu=cpu, progress=progress, **options)
    seconds = time.perf_counter() - start
    with written(output, PROFILE) as folder:
        profile.save(folder)
    counts = [*profile.input_counts.values(), *profile.output_counts.values()]
    told = {
        "coverage": str(output / COVERAGE_FILE),
        "num_samples": profile.num_samples,
        "criterion": dict(profile.criterion),
        "layers": len(profile.input_counts),
        "neurons": sum(one.numel() for one in counts),
        "never_covered": sum(int((one == 0).sum()) for one in counts),
        "share_never_covered": profile.share_never_covered,
        "teacher_hash": profile.teacher_hash,
        "data_fingerprint": profile.data_fingerprint,
        "seconds": round(seconds, 2),
    }
    text = (
        f"{told['num_samples']:,} samples, {told['layers']} layers: {told['never_covered']:,} of {told['neurons']:,} "
        f"neurons ({told['share_never_covered']:.1%}) were never covered.\nSaved {told['coverage']}"
    )
    return told, text


def profiled(
    teacher: str,
    data: str,
    text_columns: list[str],
    *,
    revision: str | None,
    max_samples: int | None,
    criterion: str,
    batch_size: int,
    max_length: int,
    seed: int,
    cpu: bool,
    progress: bool,
) -> CoverageProfile:
    """Load a teacher whole, as it was saved, and profile it."""
    samples = _samples(data, text_columns)
    if max_samples is not None:
        samples = drawn(samples, min(max_samples, len(samples)), seed)
    named = Teacher.named(teacher, samples, revision)
    model = named.load_as_saved().to(device_for(cpu))
    task = named.task(model, samples, batch_size=batch_size, max_length=max_length)
    with without_map_bars():
        return profile_coverage(model, _Batches(task, samples), criterion=CRITERIA[criterion](), progress=progress)


def _samples(data: str, text_columns: list[str]) -> Dataset:
    samples = read_data(data, text_columns, label_column=None)
    # Reading wants labels, though coverage does not look at them.
    return samples if LABEL_COLUMN in samples.column_names else samples.add_column(LABEL_COLUMN, [0] * len(samples))


class _Batches:
    """A task's batches, with their number for the progress bar."""

    def __init__(self, task: Any, samples: Dataset) -> None:  # noqa: ANN401 - a Task of texts or images
        self.task, self.samples = task, samples

    def __len__(self) -> int:
        return -(-len(self.samples) // self.task.batch_size)

    def __iter__(self) -> Iterator:
        return (batch for _, batch in self.task.batches(self.samples))
