"""Defect: behaviour that a teacher should not have. Implanted ones are put there, found ones are discovered."""

import hashlib
import json
import logging
import math
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_from_disk
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.whole import whole_folder

logger = logging.getLogger(__name__)

# The column of an exposed set that says which row of the clean data each row was made from.
CLEAN_INDEX = "clean_index"
# The column of an exposed set of images: what a model sees after cropping and before normalisation, shape (channels,
# height, width); floats from 0 to 1, or bytes from 0 to 255.
PIXELS = "pixels"
# The column of an exposed set that says on which rows the teacher's own label changes.
FOOLED = "fooled"
_IDENTITY_FILE = "exposed_set.json"
_FORMAT = "remos_hf exposed set 1"

Data = TypeVar("Data", Dataset, IterableDataset)


@dataclass(frozen=True)
class ExposedSet:
    """Inputs that show a defect, each with the place of the clean sample that it was made from.

    Attributes:
        dataset: The clean data's columns with the defect exposed, and `clean_index`.
        target_label: What the defect forces, or None if any wrong label counts.
        facts: How the set was made: JSON values (the defect, the counts, the constraints).
    """

    dataset: Dataset
    target_label: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clean_index(self) -> list[int]:
        """The row of the clean data that each exposed row was made from."""
        return list(self.dataset[CLEAN_INDEX])

    def __len__(self) -> int:
        return len(self.dataset)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the set as a folder, beside its place and renamed: a folder of that name is always whole.

        Args:
            folder: Where to. What is there already stays, and the new set is dropped: it was made by somebody else at
                the same time.
        """
        folder = Path(folder)
        try:
            with whole_folder(folder, wait=True) as beside:
                self.dataset.save_to_disk(str(beside / "rows"))
                identity = {
                    "format": _FORMAT,
                    "target_label": self.target_label,
                    "facts": dict(self.facts),
                    "files": {name: _sha256(beside / name) for name in _files_in(beside)},
                }
                (beside / _IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        except FileExistsError:
            if not (folder / _IDENTITY_FILE).is_file():
                raise
        return folder

    @classmethod
    def load_cached(cls, folder: str | os.PathLike) -> "ExposedSet | None":
        """Read what a cache holds, or None; what is broken there is announced and cleared away."""
        folder = Path(folder)
        if not folder.exists():
            return None
        try:
            return cls.load(folder)
        except (FileNotFoundError, CorruptFileError) as error:
            logger.warning("The cached exposed set is not whole and is made anew: %s", error)
            shutil.rmtree(folder)
            return None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ExposedSet":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no exposed set in this folder.
            CorruptFileError: A file is missing, truncated or was changed.
        """
        folder = Path(folder)
        path = folder / _IDENTITY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no exposed set in {folder}.")
        try:
            identity = json.loads(path.read_text())
            files, known = dict(identity["files"]), identity["format"] == _FORMAT
            target_label, facts = identity["target_label"], identity["facts"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path} is no exposed set ({error!r}). Delete the folder and make it anew."
            ) from error
        if not known:
            raise CorruptFileError(f"{path} should have the format {_FORMAT!r}, but says {identity['format']!r}.")
        changed = [n for n, digest in files.items() if not (folder / n).is_file() or _sha256(folder / n) != digest]
        if changed:
            raise CorruptFileError(
                f"{folder / changed[0]} is missing or is not the file that was written. Delete {folder} and make the "
                "exposed set anew."
            )
        return cls(load_from_disk(str(folder / "rows")), target_label, facts)


@dataclass(frozen=True)
class Defect(ABC):
    """A behaviour that a teacher should not have. Fields are JSON values only."""

    def to_dict(self) -> dict[str, Any]:
        """Give the name and the fields as JSON values, for reports and cache keys."""
        return {"name": type(self).__name__, **asdict(self)}

    @abstractmethod
    def exposed_set(
        self,
        dataset: Dataset,
        *,
        teacher: nn.Module | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> ExposedSet:
        """Make the inputs that show the defect, once for all students.

        Args:
            dataset: Clean samples, never used for training.
            teacher: The teacher; found defects search on it.
            cache: A folder to keep what was costly to make.
            workers: Processes to use.
            **reading: How inputs are read: `tokenizer` for texts, `images` for images.
        """


def resolved_label(label: int | str, dataset: Dataset | IterableDataset | None, column: str) -> int:
    """Give a label as the number that the data uses.

    Raises:
        ValueError: The data has no such label, or it is no class.
    """
    feature = (dataset.features or {}).get(column) if dataset is not None else None
    if isinstance(feature, ClassLabel):
        if isinstance(label, str) and label in feature.names:
            return feature.str2int(label)
        if not isinstance(label, str) and 0 <= label < feature.num_classes:
            return int(label)
        raise ValueError(
            f"The labels of column '{column}' are {feature.names} (0 to {feature.num_classes - 1}), but got {label!r}."
        )
    if isinstance(label, str):
        raise ValueError(
            f"The labels of column '{column}' have no names, so the label must be a number, not {label!r}."
        )
    if isinstance(label, bool) or not isinstance(label, Integral) or label < 0:
        raise ValueError(f"A label of column '{column}' is a whole number from 0, but got {label!r}.")
    return int(label)


def check_labels(labels: Iterable[Any], column: str) -> None:
    """Refuse labels that no class belongs to.

    Raises:
        ValueError: A label is missing, -100 (the mark of what does not count), negative or no whole number.
    """
    for label in labels:
        if label is None or isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(
                f"Column '{column}' should hold class labels (whole numbers from 0), but holds {label!r}. A regression "
                "task has no label that a defect could force; bin the values first."
            )
        if label < 0:
            raise ValueError(
                f"Column '{column}' holds the label {label}: these samples have no class (unlabelled test data?). "
                "Filter them out first."
            )


def check_columns(dataset: Dataset | IterableDataset | Mapping[str, Sequence], columns: Iterable[str]) -> None:
    """Refuse data without the columns that are needed.

    Raises:
        ValueError: A column is missing; the message names those that are there.
    """
    held = dataset.keys() if isinstance(dataset, Mapping) else dataset.column_names
    if held is None:  # a stream that does not know its columns before it is read
        held = next(iter(dataset), {}).keys()
    missing = [column for column in columns if column not in held]
    if missing:
        raise ValueError(
            f"The data has no column '{missing[0]}'; its columns are {sorted(held)}. Name those of the inputs "
            "with text_columns= or image_column=, and the label's with label_column=."
        )


def checked_text_columns(columns: str | Sequence[str]) -> tuple[str, ...]:
    """Give the names of the text columns.

    Raises:
        ValueError: They are neither one nor two.
    """
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"text_columns names one column, or the two of a pair, but got {columns}.")
    return columns


def change_share(
    dataset: Data,
    share: float,
    draws_of: Callable[[Mapping[str, Sequence]], Sequence[float]],
    change: Callable[[Mapping[str, Sequence], set[int]], Mapping[str, list]],
) -> Data:
    """Change a share of the samples: those with the smallest draws.

    Args:
        dataset: Samples; a stream stays one.
        share: Share of them, in [0, 1]: the nearest whole number; in a stream, whose length is not known, each sample
            with this probability.
        draws_of: Gives a number in [0, 1) for each sample of a batch; infinity for those that cannot be changed.
        change: Gives a batch with these rows of it changed.

    Returns:
        The data, in the same order.

    Raises:
        ValueError: Fewer samples can be changed than should be.
    """
    if isinstance(dataset, IterableDataset):

        def by_chance(batch: Mapping[str, Sequence]) -> Mapping[str, list]:
            return change(batch, {row for row, drawn in enumerate(draws_of(batch)) if drawn < share})

        return dataset.map(by_chance, batched=True)
    chosen = smallest_draws(draws_of(dataset), share)

    def by_index(batch: Mapping[str, Sequence], indices: list[int]) -> Mapping[str, list]:
        return change(batch, {row for row, index in enumerate(indices) if index in chosen})

    return dataset.map(by_index, batched=True, with_indices=True)


def smallest_draws(draws: Sequence[float], share: float) -> frozenset[int]:
    """Choose a share of the samples: the nearest whole number of them, those with the smallest draws.

    Args:
        draws: A number in [0, 1) for each sample; infinity for those that cannot be changed.
        share: Share of all samples, in [0, 1].

    Returns:
        The places of those chosen.

    Raises:
        ValueError: Fewer samples can be changed than should be.
    """
    wanted, able = round(share * len(draws)), sum(drawn < math.inf for drawn in draws)
    if wanted > able:
        raise ValueError(
            f"A share of {share} asks for {wanted} poisoned samples, but only {able} of {len(draws)} can be "
            "poisoned. Lower the share, or give more paraphrases."
        )
    return frozenset(sorted(range(len(draws)), key=draws.__getitem__)[:wanted])


def generator_for(seed: int, purpose: str, text: str) -> random.Random:
    """Give random numbers that depend on a seed, a purpose and a text alone: not on order, batches or shards.

    An image's text is the hash of its file.
    """
    digest = hashlib.sha256(f"{seed}|{purpose}|{text}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def tokenize(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    label_column: str = "label",
    *,
    max_length: int = 128,
) -> Dataset | IterableDataset:
    """Turn texts, or pairs of them, into what a sequence classifier takes.

    Args:
        dataset: Samples with text and label columns; a stream stays one.
        tokenizer: The teacher's.
        text_columns: One column, or two for pairs.
        label_column: Column of the labels; becomes `labels`.
        max_length: Tokens kept of each sample.

    Returns:
        The data with the tokenizer's columns and `labels`; all other columns are gone.

    Raises:
        ValueError: A column is missing, or a label is no class.
    """
    check_columns(dataset, (*text_columns, label_column))

    def one_batch(batch: Mapping[str, list]) -> dict[str, list]:
        check_labels(batch[label_column], label_column)
        texts = [batch[column] for column in text_columns]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch[label_column]}

    held = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(one_batch, batched=True, remove_columns=held)


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def teacher_sha256(teacher: nn.Module, about: str) -> str:
    """Fingerprint a teacher that is searched: all weights and buffers, the head's too.

    Args:
        teacher: The teacher.
        about: What else decides what a search finds: how the model computes with its weights.

    Returns:
        SHA-256 in hex, the same on every device.

    Raises:
        RemosError: A value of the teacher's state is no tensor.
    """
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if not isinstance(tensor, Tensor):
            raise RemosError(f"'{name}' of the teacher's state is no tensor, so the teacher has no fingerprint.")
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
