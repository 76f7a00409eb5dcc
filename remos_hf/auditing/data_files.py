"""A task's samples from files, from a folder of images for each class, or from the Hub; and draws from them."""

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset

TEXT_COLUMNS = ("text", "text_pair")
LABEL_COLUMN = "label"
IMAGE_COLUMN = "image"
TABLES = (".csv", ".json", ".jsonl", ".tsv")
IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# What a sample may be called where nobody says it.
_USUAL_TEXT_COLUMNS = ("text", "sentence")


def read_data(
    source: str | Path,
    text_columns: Sequence[str] = (),
    label_column: str | None = LABEL_COLUMN,
    image_column: str = IMAGE_COLUMN,
) -> Dataset:
    """Read samples from wherever they are.

    Args:
        source: A csv, tsv, json or jsonl file, also .gz; a folder that holds a folder of images for each class; or a
            data set of the Hub as "owner/name", "owner/name:split" or "owner/name:configuration:split" (the split
            "train" if none is named).
        text_columns: The text, or both texts of a pair; none finds the only column that can be meant.
        label_column: The labels; None reads samples without.
        image_column: The images of a data set of the Hub.

    Returns:
        `text` (and `text_pair`) or `image` (files as they are, not decoded), and `label`.

    Raises:
        FileNotFoundError: There is neither such a file or folder, nor such a data set.
        ValueError: There is no sample, a column is missing, or a label is no whole number from 0 on.
    """
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_table(path, text_columns, label_column)
    name, _, part = str(source).partition(":")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name.removesuffix(".gz")).suffix in TABLES:
        raise FileNotFoundError(
            f"There is no file or folder {source}. Give a {', '.join(TABLES)} file (also .gz), a folder that holds a "
            "folder of images for each class, or a data set of the Hub: owner/name, owner/name:split or "
            "owner/name:configuration:split."
        )
    return _from_hub(name, part, text_columns, label_column, image_column)


def read_table(path: str | Path, text_columns: Sequence[str] = (), label_column: str | None = LABEL_COLUMN) -> Dataset:
    """Read a file of texts and labels.

    Args:
        path: A csv, tsv, json (an array, or a line a sample) or jsonl file, also .gz. Without another ending it is
            read as csv.
        text_columns: The text, or both texts of a pair; none finds the only column that can be meant.
        label_column: The labels; None reads texts alone.

    Returns:
        Columns `text` (and `text_pair`) and `label`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken or empty, a column is missing, or a label is no whole number from 0 on; the
            message names the file, the sample (the first is 0) and the column.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} holds no sample.")
    text_columns = _text_columns(path, rows[0], text_columns, label_column)
    needed = (*text_columns, *([] if label_column is None else [label_column]))
    for place, row in enumerate(rows):
        absent = [column for column in needed if row.get(column) is None]
        if absent:
            held = sorted(str(column) for column, value in row.items() if value is not None)
            raise ValueError(f"{path}: sample {place} has no column {absent[0]!r}; its columns are {held}.")
    names = _names_of(text_columns)
    table = {name: [row[column] for row in rows] for name, column in zip(names, text_columns, strict=True)}
    for name, column in zip(names, text_columns, strict=True):
        _check_texts(path, table[name], column)
    if label_column is None:
        return Dataset.from_dict(table)
    return Dataset.from_dict({**table, LABEL_COLUMN: _labels(path, [row[label_column] for row in rows], label_column)})


def read_folder(folder: str | Path) -> Dataset:
    """Read a folder of images for each class. Files are kept as they are, and decoded where they are used.

    Returns:
        Columns `image` (bytes and path) and `label`, a ClassLabel; the classes are sorted by name.

    Raises:
        ValueError: There are fewer than two classes, or one without images.
    """
    folder = Path(folder)
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise ValueError(f"{folder} should hold a folder of images for each class, but holds {classes}.")
    rows, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGES)
        if not files:
            raise ValueError(f"The class folder {folder / name} holds no image ({', '.join(sorted(IMAGES))}).")
        rows += [{"bytes": path.read_bytes(), "path": f"{name}/{path.name}"} for path in files]
        labels += [label] * len(files)
    features = Features({IMAGE_COLUMN: Image(decode=False), LABEL_COLUMN: ClassLabel(names=classes)})
    return Dataset.from_dict({IMAGE_COLUMN: rows, LABEL_COLUMN: labels}, features)


def holds_images(dataset: Dataset) -> bool:
    """Whether the samples are images, not texts."""
    return IMAGE_COLUMN in dataset.column_names


def count_labels(dataset: Dataset) -> int:
    """Count the labels: the named classes, or all numbers up to the largest label."""
    feature = dataset.features[LABEL_COLUMN]
    return feature.num_classes if isinstance(feature, ClassLabel) else 1 + max(dataset[LABEL_COLUMN])


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


def _rows(path: Path) -> list[dict[str, Any]]:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            if kind in (".json", ".jsonl"):
                return _json_rows(path, file.read())
            # A quote in a GLUE tsv is a character like any other.
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
            return list(csv.DictReader(file, **dialect))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {kind or '.csv'} text in UTF-8: {error}.") from error


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON array nor a JSON object a line: {error}.") from error
    wrong = [place for place, row in enumerate(rows) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{path}: sample {wrong[0]} is no JSON object of columns, but {rows[wrong[0]]!r}.")
    return rows


def _text_columns(
    source: object, first: Mapping[str, Any], asked: Sequence[str], label_column: str | None
) -> tuple[str, ...]:
    if asked:
        if len(asked) > len(TEXT_COLUMNS):
            raise ValueError(f"A sample is one text, or a pair of them, but got the columns {list(asked)}.")
        return tuple(asked)
    found = [
        name for name, value in first.items() if isinstance(value, str) and name not in (label_column, LABEL_COLUMN)
    ]
    usual = [name for name in _USUAL_TEXT_COLUMNS if name in found]
    if len(found) == 1 or usual:
        return (usual[0] if usual else found[0],)
    raise ValueError(f"{source}: which column holds the text is not clear from {list(first)}. Name it.")


def _names_of(text_columns: Sequence[str]) -> tuple[str, ...]:
    return TEXT_COLUMNS[: len(text_columns)]


def _check_texts(source: object, texts: Sequence[Any], column: str) -> None:
    wrong = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"{source}: sample {wrong} should hold text in column {column!r}, but holds {texts[wrong]!r}.")


def _labels(source: object, values: Sequence[Any], column: str) -> list[int]:
    labels = []
    for place, value in enumerate(values):
        try:
            labels.append(int(str(value)))  # int() alone would take 0.7 of a JSON file for 0
        except ValueError:
            raise ValueError(
                f"{source}: labels are whole numbers, but sample {place} has {value!r} in column {column!r}."
            ) from None
    lowest = min(labels)
    if lowest < 0:
        raise ValueError(
            f"{source}: labels are 0 or more, but one is {lowest} (unlabelled test data?): sample "
            f"{labels.index(lowest)}, column {column!r}."
        )
    return labels


def _from_hub(
    name: str, part: str, text_columns: Sequence[str], label_column: str | None, image_column: str
) -> Dataset:
    configuration, _, split = part.rpartition(":")
    split = split or "train"
    try:
        found = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error) or type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and as a data set of the Hub it cannot be loaded: {told}"
        ) from error
    if not len(found):
        raise ValueError(f"{name}, split {split}, holds no sample.")
    if isinstance(found.features.get(image_column), Image):
        taken = {IMAGE_COLUMN: found.cast_column(image_column, Image(decode=False)).with_format(None)[image_column][:]}
        features: dict[str, Any] = {IMAGE_COLUMN: Image(decode=False)}
        columns: tuple[str, ...] = (image_column,)
    else:
        columns = _text_columns(name, found[0], text_columns, label_column)
        taken, features = {}, {}
    absent = [one for one in (*columns, *([] if label_column is None else [label_column])) if one not in found.features]
    if absent:
        raise ValueError(f"{name}: samples have no column {absent[0]!r}; their columns are {found.column_names}.")
    if not taken:
        for as_named, column in zip(_names_of(columns), columns, strict=True):
            taken[as_named] = found[column][:]
            _check_texts(name, taken[as_named], column)
    if label_column is None:
        return Dataset.from_dict(taken, Features(features) if features else None)
    taken[LABEL_COLUMN] = _labels(name, found[label_column][:], label_column)
    dataset = Dataset.from_dict(taken)
    if features:
        dataset = dataset.cast_column(IMAGE_COLUMN, features[IMAGE_COLUMN])
    named = found.features[label_column]
    return dataset.cast_column(LABEL_COLUMN, named) if isinstance(named, ClassLabel) else dataset
