"""`remos explain`: what a model says of one input, drawn back through its layers to the pixels or tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from remos_hf.adapters.class_names import num_classes
from remos_hf.adapters.guarded_loading import TIMM, load_teacher, teacher_folder
from remos_hf.adapters.images import ImageInput, decoded, image_input_of
from remos_hf.auditing.data_files import TEXT_COLUMNS, drawn, holds_images, read_data
from remos_hf.auditing.labels import LABEL_COLUMN
from remos_hf.auditing.student_files import LoadedStudent, load_student
from remos_hf.cli.answer import NOTHING_SAID, in_lines
from remos_hf.cli.command_line import command_line, shown_name
from remos_hf.cli.explain_options import ExplainOptions
from remos_hf.cli.output import EXPLANATION, check_output, written
from remos_hf.cli.teacher import check_reading, device_for
from remos_hf.errors import nearest
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.judging.explained import explained
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.showing.explanation_page import write_explanation_page
from remos_hf.slicing.explanation import Explanation, explain

_LONGEST = 40  # characters of a text, in a title


def run(asked: ExplainOptions, progress: bool) -> tuple[Any, ...]:
    """Explain an input; give what is told, as JSON values and as text, and the exit status if it is not 0."""
    check_output(asked.output, EXPLANATION, asked.overwrite)
    model = _loaded(asked.model)
    check_reading(asked, model.reads_images)
    model.model.float().to(device_for(asked.cpu))
    labels = list(model.class_names or map(str, range(num_classes(model.model) or 0)))
    label = None if asked.label is None else _label(asked.label, labels)
    batch, image = _read(asked, model)
    with _in_options():
        reference, of = _reference(asked, model)
        found = explain(model.model, batch, reference, outputs=label, theta=asked.theta, labels=labels)
    tokens = [] if model.reads_images else _tokens(model, batch, found)
    said = explained(found, tokens=tokens, source="" if asked.data is None else shown_name(asked.data))
    with written(asked.output, EXPLANATION) as folder:
        found.save(folder / "explanation.json")
        write_explanation_page(
            found,
            said,
            folder / "explanation.html",
            image=image,
            tokens=tokens,
            title=f"What {shown_name(asked.model)} says of {_shown(asked.given, model)}",
            command=command_line("explain", asked),
        )
    files = {name: str(asked.output / f"explanation.{name}") for name in ("json", "html")}
    whole = None if model.reads_images else _count_tokens(model, _texts(asked))
    told = {
        "answer": said.answer,
        "limits": said.limits,
        "can_be_said": said.can_be_said,
        "label": found.label,
        "class": labels[found.label] if found.label < len(labels) else None,
        "relative_logit": found.relative_logit,
        "tokens": [{"token": token, "contribution": value} for token, value in tokens],
        "tokens_given": whole,
        "reference": found.reference,
        "reference_samples": found.reference_samples,
        "explanation": files,
    }
    lines = [in_lines([said.answer, *said.limits], said.glance)]
    if whole is not None and whole > len(tokens):
        lines.append(f"Not the whole text is explained: {len(tokens):,} of {whole:,} tokens (--max-length).")
    if of is not None and of > reference.num_samples:
        lines.append(f"Not all samples are compared with: {reference.num_samples:,} of {of:,} (--max-samples).")
    return (
        told,
        "\n".join([*lines, f"Saved {', '.join(files.values())}"]),
        *([] if said.can_be_said else [NOTHING_SAID]),
    )


def _loaded(name: str) -> LoadedStudent:
    """Load a classifier and what reads its inputs."""
    if name.startswith(TIMM):
        model = load_teacher(name)
        return LoadedStudent(Path(name), model, image_input_of(model), None, None)
    return load_student(name if Path(name).is_dir() else teacher_folder(name).path)


def _label(text: str, labels: list[str]) -> int:
    if text in labels:
        return labels.index(text)
    numbers = [str(one) for one in range(len(labels))]
    if text in numbers:
        return numbers.index(text)
    some = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
    raise ValueError(
        f"--label is one of {some}, or its number, 0 to {len(labels) - 1}, but got {text}.{nearest([text], labels)}"
    )


def _read(asked: ExplainOptions, model: LoadedStudent) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Read the input as the model does; of an image give its pixels, too."""
    is_file = _is_file(asked.given)
    if isinstance(model.reader, ImageInput):
        if asked.text_pair is not None:
            raise ValueError(f"--text-pair is of texts, and {asked.model} reads images. Leave it out.")
        if not is_file:
            raise FileNotFoundError(f"{asked.model} reads images, and there is no image file {asked.given}.")
        pixels = model.reader.pixels(decoded(asked.given))
        return {"pixel_values": model.reader.normalised(pixels)[None]}, pixels
    if is_file:
        raise ValueError(
            f"{asked.model} reads texts, and {asked.given} is a file. Give the text itself, in quotes; the whole of a "
            'file is "$(cat FILE)".'
        )
    if not asked.given.strip():
        raise ValueError("INPUT is an empty text. Give one with a word in it, in quotes.")
    sample = Dataset.from_list([{**dict(zip(TEXT_COLUMNS, _texts(asked), strict=False)), LABEL_COLUMN: 0}])
    ((_, batch),) = model.task(sample, max_length=_max_length(asked, model)).batches(sample)
    return batch, None


def _texts(asked: ExplainOptions) -> list[str]:
    return [asked.given] if asked.text_pair is None else [asked.given, asked.text_pair]


def _max_length(asked: ExplainOptions, model: LoadedStudent) -> int:
    """Give how many tokens of a text are kept: no more than the model has positions for."""
    if model.reads_images:
        return asked.max_length
    positions = getattr(model.model.config, "max_position_embeddings", None) or asked.max_length
    return min(asked.max_length, positions, model.reader.model_max_length)


def _count_tokens(model: LoadedStudent, texts: list[str]) -> int:
    return len(model.reader(*texts, verbose=False)["input_ids"])


@contextmanager
def _in_options() -> Iterator[None]:
    """Have an error that names an argument name the option instead."""
    try:
        yield
    except ValueError as error:
        if "kind='global'" not in str(error):
            raise
        raise ValueError(str(error).replace("kind='global'", "--reference global")) from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False


def _reference(asked: ExplainOptions, model: LoadedStudent) -> tuple[Reference, int | None]:
    """Take the mean over the data; zero without. Beside it, how many samples there are."""
    if asked.data is None:
        return Reference(), None
    pool = read_data(asked.data, asked.text_columns, label_column=None)
    if holds_images(pool) != model.reads_images:
        reads, holds = ("images", "texts")[:: 1 if model.reads_images else -1]
        raise ValueError(f"{asked.model} reads {reads}, but {asked.data} holds {holds}.")
    if LABEL_COLUMN not in pool.column_names:  # reading wants labels, though means do not look at them
        pool = pool.add_column(LABEL_COLUMN, [0] * len(pool))
    samples = pool if len(pool) <= asked.max_samples else drawn(pool, asked.max_samples, asked.seed)
    task = model.task(samples, batch_size=asked.batch_size, max_length=_max_length(asked, model))

    def batches() -> Iterator[Mapping[str, Tensor]]:
        return (batch for _, batch in task.batches(samples))

    with without_map_bars():
        found = profile_reference(model.model, batches(), kind=asked.reference, max_samples="all", progress=True)
    return found, len(pool)


def _tokens(model: LoadedStudent, batch: Mapping[str, Tensor], found: Explanation) -> list[tuple[str, int]]:
    """Give each token with what its embedding contributed."""
    weight = model.model.get_input_embeddings().weight
    name = next(name for name, one in model.model.named_parameters() if one is weight)
    contributions = found.inputs.get(name, torch.zeros(batch["input_ids"].shape[1:]))
    tokens = model.reader.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    return list(zip(tokens, map(int, contributions.flatten()), strict=True))


def _shown(given: str, model: LoadedStudent) -> str:
    if model.reads_images:
        return Path(given).name
    return f"“{given}”" if len(given) <= _LONGEST else f"“{given[:_LONGEST]}…”"
