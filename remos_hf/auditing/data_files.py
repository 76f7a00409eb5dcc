"""A task's samples from files, folders or the Hub; and draws from them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset

from remos_hf.adapters.tables import TABLES, is_table, read_rows
from remos_hf.auditing.class_folders import IMAGE_COLUMN, read_folder
from remos_hf.auditing.labels import LABEL_COLUMN, check_class_numbers, labels_of
from remos_hf.auditing.split_folders import read_split, split_folder

TEXT_COLUMNS = ("text", "text_pair")
# What the two halves of a pair are called where nobody says it; "text" and "sentence" may each be half of one.
_USUAL_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("text", "text_pair"),
    ("sentence", "sentence_pair"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("text_a", "text_b"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("sentence_A", "sentence_B"),
    ("claim", "evidence"),
)
_USUAL_TEXT_COLUMNS = ("text", "sentence")
_LOOKED_AT = 100  # samples, to tell texts from other strings
_DEFAULT_SPLIT = "train"


def read_data(
    source: str | Path,
    text_columns: Sequence[str] = (),
    label_column: str | None = LABEL_COLUMN,
    image_column: str = IMAGE_COLUMN,
) -> Dataset:
    """Read samples from wherever they are.

    Args:
        source: A csv, tsv, json, jsonl (also .gz) or parquet file; a folder that holds a folder of images for each
            class, files named after their splits, or what `save_to_disk` wrote; or a data set of the Hub as
            "owner/name" or "owner/name:configuration:split". A folder's or a Hub data set's split is named after a
            colon, "folder:test"; "train" if none is.
        text_columns: The text, or both texts of a pair; none finds the only one that can be meant.
        label_column: The labels; None reads samples without.
        image_column: The images of a data set of `datasets`.

    Returns:
        `text` (and `text_pair`) or `image` (files as they are, not decoded), and `label`, a ClassLabel: whole numbers
        are the names of their classes.

    Raises:
        FileNotFoundError: There is neither such a file or folder, nor such a data set.
        ValueError: There is no sample, a column is missing, or labels are neither names nor whole numbers from 0 on.
    """
    path, split = Path(source), ""
    if not path.exists() and ":" in path.name:
        head, _, split = str(source).rpartition(":")
        path = Path(head)
    if path.is_dir():
        found = read_split(path, split)
        if found is None:
            return read_folder(split_folder(path, split))
        return _samples(source, found, text_columns, label_column, image_column)
    if path.is_file():
        if split:
            raise ValueError(f"{source}: a file has no splits. Name {path} alone, or a folder or a data set.")
        return read_table(path, text_columns, label_column)
    name, _, part = str(source).partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or is_table(Path(name)):
        raise FileNotFoundError(
            f"There is no file or folder {source}. Give a {', '.join(TABLES)} file (also .gz), a folder that holds a "
            "folder of images for each class or files named after splits, or a data set of the Hub: owner/name, "
            "owner/name:split or owner/name:configuration:split."
        )
    return _samples(name, _from_hub(name, part), text_columns, label_column, image_column)


def read_table(path: str | Path, text_columns: Sequence[str] = (), label_column: str | None = LABEL_COLUMN) -> Dataset:
    """Read a file of texts and labels.

    Args:
        path: As `read_rows` takes it.
        text_columns: The text, or both texts of a pair; none finds the only one that can be meant.
        label_column: The labels; None reads texts alone.

    Returns:
        Columns `text` (and `text_pair`) and `label`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken or empty, a column is missing, or labels are neither names nor whole numbers from
            0 on; the message names the file, the sample (the first is 0) and the column.
    """
    return _samples(path, read_rows(path), text_columns, label_column, IMAGE_COLUMN)


def holds_images(dataset: Dataset) -> bool:
    """Whether the samples are images, not texts."""
    return IMAGE_COLUMN in dataset.column_names


def drawn(dataset: Dataset, number: int | None, seed: int, skip: int = 0) -> Dataset:
    """Draw samples at random.

    Args:
        dataset: The samples.
        number: How many; None for all that are left.
        seed: Of the order.
        skip: Samples of that order that another part took.

    Raises:
        ValueError: There are not as many.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = len(dataset) - skip if number is None else number
    if wanted < 1 or skip + wanted > len(dataset):
        raise ValueError(
            f"{wanted} samples are wanted after {skip} that other parts took, but there are {len(dataset)}. Parts that "
            "come from the same samples need numbers that fit."
        )
    return dataset.select(order[skip : skip + wanted])


def _from_hub(name: str, part: str) -> Dataset:
    configuration, _, split = part.rpartition(":")
    try:
        return load_dataset(name, configuration or None, split=split or _DEFAULT_SPLIT)
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error) or type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and as a data set of the Hub it cannot be loaded: {told}"
        ) from error


def _samples(
    source: object, held: Dataset, text_columns: Sequence[str], label_column: str | None, image_column: str
) -> Dataset:
    """Take the columns that are meant, under our names."""
    held = held.with_format(None)
    if not len(held):
        raise ValueError(f"{source} holds no sample.")
    shows = isinstance(held.features.get(image_column), Image)
    columns = (image_column,) if shows else text_columns_of(source, held, text_columns, label_column)
    absent = [name for name in (*columns, *([label_column] if label_column else [])) if name not in held.features]
    if absent:
        option = "label_column (--label-column)" if absent[0] == label_column else "text_columns (--text-column)"
        raise ValueError(
            f"{source}: samples have no column {absent[0]!r}; their columns are {held.column_names}. Name one by "
            f"{option}.{_without_header(held)}"
        )
    names = (IMAGE_COLUMN,) if shows else TEXT_COLUMNS[: len(columns)]
    taken = held.cast_column(image_column, Image(decode=False)) if shows else held
    found = {name: taken[column][:] for name, column in zip(names, columns, strict=True)}
    for name, column in zip(names, columns, strict=True):
        _check_values(source, found[name], column, dict if shows else str)
    if not shows:
        _tell_unread(source, held, columns, label_column)
    features = Features({name: Image(decode=False) if shows else Value("string") for name in names})
    if label_column is not None:
        found[LABEL_COLUMN], features[LABEL_COLUMN] = _labels(source, held, label_column)
    return Dataset.from_dict(found, features)


def _labels(source: object, held: Dataset, column: str) -> tuple[list[int], ClassLabel]:
    own, values = held.features[column], held[column][:]
    if isinstance(own, ClassLabel):
        return check_class_numbers(source, values, column), own
    numbers, names = labels_of(source, values, column)
    return numbers, ClassLabel(names=names)


def text_columns_of(
    source: object, held: Dataset, asked: Sequence[str] = (), label_column: str | None = LABEL_COLUMN
) -> tuple[str, ...]:
    """Find the column of the texts, or both of a pair.

    Args:
        source: For messages.
        held: The samples, under their own columns.
        asked: Columns that were named; they are taken as they are.
        label_column: The labels, which are no texts.

    Raises:
        ValueError: More than two were named, or none was and which ones are meant is not clear.
    """
    if asked:
        if len(asked) > len(TEXT_COLUMNS):
            raise ValueError(f"A sample is one text, or a pair of them, but got the columns {list(asked)}.")
        return tuple(asked)
    texts = [name for name in _string_columns(held) if name not in (label_column, LABEL_COLUMN)]
    pairs = [pair for pair in _USUAL_PAIRS if set(pair) <= set(texts)]
    if len(pairs) == 1:
        return pairs[0]
    usual = [name for name in _USUAL_TEXT_COLUMNS if name in texts]
    if not pairs and (len(texts) == 1 or usual):
        return (usual[0] if usual else texts[0],)
    raise ValueError(
        f"{source}: which column holds the text is not clear from {held.column_names}. Name it, or both of a pair, by "
        f"text_columns (--text-column).{_without_header(held)}"
    )


def _string_columns(held: Dataset) -> list[str]:
    kinds = ("string", "large_string")
    return [name for name, feature in held.features.items() if getattr(feature, "dtype", None) in kinds]


def _without_header(held: Dataset) -> str:
    """Say so where a file's first line is a sample: few columns are called by a number."""
    if not any(name.strip().replace(".", "", 1).isdecimal() for name in held.column_names):
        return ""
    return " Is the first line a sample? A file starts with a line that names its columns, such as text and label."


def _tell_unread(source: object, held: Dataset, read: Sequence[str], label_column: str | None) -> None:
    """Tell texts that no student will see, and texts without a word."""
    for column in read:
        empty = [place for place, text in enumerate(held[column]) if not text.strip()]
        if empty:
            warnings.warn(
                f"{source}: {len(empty):,} of {len(held):,} samples hold an empty text in column {column!r}, the "
                f"first is sample {empty[0]}. They are kept. (remos_hf)",
                stacklevel=4,
            )
    some = held.select(range(min(len(held), _LOOKED_AT)))
    others = [column for column in _string_columns(held) if column not in (*read, label_column)]
    unread = [name for name in others if 2 * sum(" " in str(text).strip() for text in some[name]) > len(some)]
    if unread:
        warnings.warn(
            f"{source}: {unread} hold texts, too, but of the columns only {list(read)} are read. (remos_hf)",
            stacklevel=4,
        )


def _check_values(source: object, values: Sequence[Any], column: str, kind: type) -> None:
    wrong = next((place for place, value in enumerate(values) if not isinstance(value, kind)), None)
    if wrong is not None:
        what = "text" if kind is str else "an image"
        raise ValueError(
            f"{source}: sample {wrong} should hold {what} in column {column!r}, but holds {values[wrong]!r}."
        )
