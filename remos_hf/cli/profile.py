"""`remos profile`: count which neurons of a teacher a task's data uses."""

import logging
import time
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from remos_hf.auditing.data_files import drawn, read_data
from remos_hf.auditing.labels import LABEL_COLUMN
from remos_hf.cli.options import ALL, ProfileOptions, SliceOptions
from remos_hf.cli.output import PROFILE, check_output, written
from remos_hf.cli.teacher import Teacher, check_reading, device_for
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.profiling.data_pass import DEFAULT_MAX_SAMPLES, profile_coverage
from remos_hf.strategies.slice_and_reset import CRITERIA

logger = logging.getLogger(__name__)


def run(asked: ProfileOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Take a profile and save it; give what is told, as JSON values and as text."""
    output = asked.output
    check_output(output, PROFILE, asked.overwrite)
    start = time.perf_counter()
    profile = profiled(asked, asked.data)
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


def profiled(asked: ProfileOptions | SliceOptions, data: str) -> CoverageProfile:
    """Load a teacher whole, as it was saved, and profile it."""
    samples = _samples(data, asked.text_columns)
    number = number_to_profile(asked.max_samples, samples, "--max-samples")
    samples = drawn(samples, number, asked.seed) if number < len(samples) else samples
    named = Teacher.named(asked.teacher, samples, asked.revision)
    check_reading(asked, named.reads_images)
    model = named.load_as_saved().to(device_for(asked.cpu))
    task = named.task(model, samples, batch_size=asked.batch_size, max_length=asked.max_length)
    with without_map_bars():
        return profile_coverage(model, _Batches(task, samples), criterion=CRITERIA[asked.criterion](), progress=True)


def number_to_profile(asked: int | str | None, samples: Dataset, option: str) -> int:
    """Give the number of samples that decide a profile: as asked for, or our cap, which is told.

    Args:
        asked: A number, "all", or None for the cap.
        samples: What there is.
        option: Where it was asked, for the message.
    """
    if asked is None and len(samples) > DEFAULT_MAX_SAMPLES:
        logger.warning(
            "%d of %d samples are profiled, drawn by the seed. %s all takes all of them.",
            DEFAULT_MAX_SAMPLES,
            len(samples),
            option,
        )
    return len(samples) if asked == ALL else min(asked or DEFAULT_MAX_SAMPLES, len(samples))


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
