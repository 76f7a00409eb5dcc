"""A task's samples from files, folders or the Hub; and draws from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from remos_hf.adapters.tables import TABLES, is_table, read_rows
from remos_hf.auditing.class_folders import IMAGE_COLUMN, class_folders, read_folder
from remos_hf.auditing.labels import LABEL_COLUMN, labels_of

TEXT_COLUMNS = ("text", "text_pair")
# What a sample may be called where nobody says it; pairs first, since "sentence" may be half of one.
_USUAL_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_USUAL_TEXT_COLUMNS = ("text", "sentence")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by `save_to_disk`
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
        `text` (and `text_pair`) or `image` (files as they are, not decoded), and `label`: a ClassLabel if labels have
        names.

    Raises:
        FileNotFoundError: There is neither such a file or folder, nor such a data set.
        ValueError: There is no sample, a column is missing, or labels are neither names nor whole numbers from 0 on.
    """
    path, split = Path(source), ""
    if not path.exists() and ":" in path.name:
        head, _, split = str(source).rpartition(":")
        path = Path(head)
    if path.is_dir():
        found = _saved_in(path, split)
        return (
            read_folder(path / split)
            if found is None
            else _samples(source, found, text_columns, label_column, image_column)
        )
    if path.is_file() and not split:
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


def _saved_in(folder: Path, split: str) -> Dataset | None:
    """Read a folder that `save_to_disk` wrote or that holds a file for each split; None if it holds neither."""
    if any((folder / name).is_file() for name in _SAVED):
        try:
            held = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} looks like a saved data set, but cannot be loaded: {error}") from error
        splits = {split: held} if isinstance(held, Dataset) else dict(held)
        return splits[_split_of(folder, split, splits)]
    within = [folder, *([folder / "data"] if (folder / "data").is_dir() else [])]
    if not any(is_table(path) for place in within for path in place.iterdir() if path.is_file()):
        return None
    if {path.name for path in class_folders(folder)[0]} - {"data"}:
        return None  # class folders, beside a table of something else
    try:
        files = load_dataset_builder(str(folder)).config.data_files  # datasets knows how splits are called
    except (OSError, ValueError) as error:
        raise ValueError(f"The files in {folder} are no splits of one data set: {error}") from error
    named = files[_split_of(folder, split, files)]
    return concatenate_datasets([read_rows(path) for path in named])


def _split_of(folder: Path, split: str, splits: Mapping[Any, Any]) -> str:
    wanted = split or (_DEFAULT_SPLIT if _DEFAULT_SPLIT in splits else "")
    if wanted in splits:
        return wanted
    names = [str(name) for name in splits]
    raise ValueError(f"{folder} holds the splits {', '.join(names)}: name one, as in {folder}:{names[0]}.")


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
    columns = (image_column,) if shows else _text_columns(source, held, text_columns, label_column)
    absent = [name for name in (*columns, *([label_column] if label_column else [])) if name not in held.features]
    if absent:
        raise ValueError(f"{source}: samples have no column {absent[0]!r}; their columns are {held.column_names}.")
    names = (IMAGE_COLUMN,) if shows else TEXT_COLUMNS[: len(columns)]
    taken = held.cast_column(image_column, Image(decode=False)) if shows else held
    found = {name: taken[column][:] for name, column in zip(names, columns, strict=True)}
    for name, column in zip(names, columns, strict=True):
        _check_values(source, found[name], column, dict if shows else str)
    features = Features({name: Image(decode=False) if shows else Value("string") for name in names})
    if label_column is not None:
        found[LABEL_COLUMN], classes = labels_of(source, held[label_column][:], label_column)
        own = held.features[label_column]
        numbered = own if isinstance(own, ClassLabel) else Value("int64")
        features[LABEL_COLUMN] = numbered if classes is None else ClassLabel(names=classes)
    return Dataset.from_dict(found, features)


def _text_columns(source: object, held: Dataset, asked: Sequence[str], label_column: str | None) -> tuple[str, ...]:
    if asked:
        if len(asked) > len(TEXT_COLUMNS):
            raise ValueError(f"A sample is one text, or a pair of them, but got the columns {list(asked)}.")
        return tuple(asked)
    texts = [
        name
        for name, feature in held.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string") and name not in (label_column, LABEL_COLUMN)
    ]
    pair = next((pair for pair in _USUAL_PAIRS if set(pair) <= set(texts)), None)
    usual = [name for name in _USUAL_TEXT_COLUMNS if name in texts]
    if pair:
        return pair
    if len(texts) == 1 or usual:
        return (usual[0] if usual else texts[0],)
    raise ValueError(
        f"{source}: which column holds the text is not clear from {held.column_names}. Name it, or both of a pair, by "
        "text_columns."
    )


def _check_values(source: object, values: Sequence[Any], column: str, kind: type) -> None:
    wrong = next((place for place, value in enumerate(values) if not isinstance(value, kind)), None)
    if wrong is not None:
        what = "text" if kind is str else "an image"
        raise ValueError(
            f"{source}: sample {wrong} should hold {what} in column {column!r}, but holds {values[wrong]!r}."
        )
