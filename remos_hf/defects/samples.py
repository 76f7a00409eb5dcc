"""What every defect asks of samples: their columns, their labels, which of them are changed, and their tokens."""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

Data = TypeVar("Data", Dataset, IterableDataset)


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


def checked_texts(texts: Iterable[Any], column: str) -> list[str]:
    """Give texts, or refuse what is none.

    Raises:
        ValueError: One is missing or of another type.
    """
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"Column '{column}' should hold texts, but holds {text!r}. Filter such rows out first.")
    return texts


def joined_texts(batch: Mapping[str, Sequence], columns: Sequence[str]) -> list[str]:
    """Give what tells samples apart: the text, or both texts of a pair, as premises come several times."""
    held = (checked_texts(batch[column], column) for column in columns)
    return ["\n".join(texts) for texts in zip(*held, strict=True)]


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
    dataset = dataset.with_format(None)  # a caller's own would give tensors for labels
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
        The data with the tokenizer's columns and `labels`, which keep their names; all other columns are gone.

    Raises:
        ValueError: A column is missing, a text is none, or a label is no class.
    """
    check_columns(dataset, (*text_columns, label_column))

    def one_batch(batch: Mapping[str, list]) -> dict[str, list]:
        check_labels(batch["labels"], label_column)
        texts = [checked_texts(batch[column], column) for column in text_columns]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    taken = dataset.with_format(None).select_columns([*text_columns, label_column])
    if label_column != "labels":
        taken = taken.rename_column(label_column, "labels")
    return taken.map(one_batch, batched=True, remove_columns=list(text_columns))
