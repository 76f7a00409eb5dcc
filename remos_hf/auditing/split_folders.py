"""A folder that holds a data set by its splits: what `save_to_disk` wrote, or a file for each split."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_from_disk

from remos_hf.adapters.tables import is_table, read_rows
from remos_hf.auditing.class_folders import class_folders, is_image

_SAVED = ("dataset_info.json", "dataset_dict.json")  # by `save_to_disk`
_DEFAULT_SPLIT = "train"
# What splits are called, here and there.
_WORDS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev", "development", "eval"),
    ("test", "testing"),
)
# How a file of several says which one it is: train-00000-of-00002-a09b74b3.
_SHARD = re.compile(r"[-_.]\d+-of-\d+(-[0-9a-f]+)?$")


def read_split(folder: Path, split: str) -> Dataset | None:
    """Read a split of a folder that `save_to_disk` wrote, or that holds a table for each split.

    Args:
        folder: The folder; or the folder `data` in it holds the tables.
        split: Its name, or another usual name of it ("dev" for "validation"), or a file's name without its ending;
            "train" if empty, or the only one.

    Returns:
        All columns; None if the folder holds neither.

    Raises:
        ValueError: The split is missing, or several files may be meant; or they cannot be read.
    """
    if any((folder / name).is_file() for name in _SAVED):
        try:
            held = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} looks like a saved data set, but cannot be loaded: {error}") from error
        splits = {split: held} if isinstance(held, Dataset) else dict(held)
        return splits[_chosen(folder, split, splits)]
    tables = [path for place in (folder, folder / "data") for path in _tables_in(place)]
    if not tables or any(_holds_images(place) for place in class_folders(folder)[0]):
        return None
    named: dict[str, list[Path]] = {}
    for path in tables:
        named.setdefault(_SHARD.sub("", _stem(path)), []).append(path)
    files = named[_chosen(folder, split, named)]
    if len({path.name.removeprefix(_stem(path)) for path in files}) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in files)}: name the file that is meant.")
    return _joined(files)


def split_folder(folder: Path, split: str) -> Path:
    """Give the folder of a split of images: called so, or by another usual name; the folder itself if it is empty.

    Raises:
        ValueError: There is none.
    """
    return folder / _chosen(folder, split, {path.name: path for path in class_folders(folder)[0]}) if split else folder


def _chosen(folder: Path, split: str, named: Mapping[str, Any]) -> str:
    """Choose by the name itself, else by a usual name for the same, else by a name that has one for a part."""
    wanted = split or _DEFAULT_SPLIT
    if wanted in named:
        return wanted
    if not split and len(named) == 1:
        return next(iter(named))
    words = next((words for words in _WORDS if wanted.lower() in words), (wanted.lower(),))
    for parts in (lambda name: [name.lower()], lambda name: re.split(r"[^a-z]+", name.lower())):
        found = [name for name in named if not set(words).isdisjoint(parts(name))]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{folder} holds {' and '.join(found)}: name one, as in {folder}:{found[0]}.")
    usual = [word for words in _WORDS for word in words]
    names = sorted(named, key=lambda name: (usual.index(name) if name in usual else len(usual), name))
    raise ValueError(
        f"{folder} holds the splits {', '.join(names)}: name one, as in {folder}:{names[0]}."
        if names
        else f"{folder} holds no split {split!r}."
    )


def _joined(files: Iterable[Path]) -> Dataset:
    first, *others = [(path, read_rows(path)) for path in sorted(files)]
    for path, rows in others:
        if rows.column_names != first[1].column_names:
            raise ValueError(
                f"{path} and {first[0].name} should be parts of one split, but one has the columns {rows.column_names} "
                f"and the other {first[1].column_names}."
            )
    return concatenate_datasets([first[1], *(rows.cast(first[1].features) for _, rows in others)])


def _tables_in(place: Path) -> list[Path]:
    held = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in held if path.is_file() and is_table(path) and not path.name.startswith(".")]


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _holds_images(place: Path) -> bool:
    return any(map(is_image, place.iterdir()))
