"""What labels mean: numbers from 0 on, or names; and the same class under the same number in all data of a task."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

LABEL_COLUMN = "label"
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
# More names than this, and more than half as many as samples, are no classes but a column of something else.
_MOST_NAMES = 50
_LARGEST = 2**31 - 1


def labels_of(source: object, values: Sequence[Any], column: str) -> tuple[list[int], list[str] | None]:
    """Read a column of labels.

    Args:
        source: For messages.
        values: Whole numbers from 0 on, also written as text; or names, none of which is a number.
        column: For messages.

    Returns:
        A number for each sample, and the names in the order of the numbers: sorted, or None if labels are numbers.

    Raises:
        ValueError: A label is missing, negative, a fraction, or a number among names.
    """
    if all(isinstance(value, str) and value.strip() and not _is_number(value) for value in values):
        names = sorted(set(values))
        if len(names) > max(_MOST_NAMES, len(values) // 2):
            raise ValueError(
                f"{source}: column {column!r} holds {len(names):,} different texts in {len(values):,} samples, such as "
                f"{values[0]!r}: these are no labels."
            )
        numbers = {name: number for number, name in enumerate(names)}
        return [numbers[value] for value in values], names
    labels = []
    for place, value in enumerate(values):
        if isinstance(value, bool) or not _INTEGER.fullmatch(str(value)):  # int() would take 0.7 for 0, "1_0" for 10
            raise ValueError(
                f"{source}: labels are whole numbers, or all of them names, but sample {place} has {value!r} in column "
                f"{column!r}."
            )
        labels.append(int(str(value)))
    lowest, largest = min(labels), max(labels)
    if largest > _LARGEST:
        raise ValueError(f"{source}: labels are numbers from 0 on, but one is {largest}, in column {column!r}: a code?")
    if lowest < 0:
        raise ValueError(
            f"{source}: labels are 0 or more, but one is {lowest} (unlabelled test data?): sample "
            f"{labels.index(lowest)}, column {column!r}."
        )
    return labels, None


def count_labels(dataset: Dataset, source: object = "The data") -> int:
    """Count the labels: the named classes, or all numbers up to the largest label.

    Args:
        dataset: The samples that decide which labels there are.
        source: For messages.

    Raises:
        ValueError: Less than half of the numbers up to the largest occur: they are codes, and a head has an output for
            each number below.
    """
    names = label_names(dataset)
    if names is not None:
        return len(names)
    held = set(dataset[LABEL_COLUMN])
    count = 1 + max(held)
    if 2 * len(held) < count:
        raise ValueError(
            f"{source} has {len(held)} different labels, but they go up to {max(held):,}: they are codes, not numbers "
            f"from 0 to {len(held) - 1}. Number them so, or write names that are no numbers, such as 'c{max(held)}'."
        )
    if len(held) < count:
        absent = next(number for number in range(count) if number not in held)
        warnings.warn(
            f"{source} has labels up to {max(held)}, so students tell {count} labels apart, but no sample has label "
            f"{absent}. (remos_hf)",
            stacklevel=2,
        )
    return count


def label_names(dataset: Dataset) -> list[str] | None:
    """Give the names of the classes; None if labels are numbers."""
    feature = dataset.features[LABEL_COLUMN]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def by_name(dataset: Dataset, source: object, like: Dataset, named: object, *, other_task: bool = False) -> Dataset:
    """Give a data set's classes the numbers that they have in another one. A class that it lacks keeps its number.

    Args:
        dataset: The samples.
        source: For messages.
        like: The samples that students learn from, which decide the numbers.
        named: For messages.
        other_task: Whether the samples may be of another task (an attacker's): numbers without names then stay.

    Raises:
        ValueError: It has a class, or a number, that the other one has not.
    """
    own, wanted = label_names(dataset), label_names(like)
    if own is None or wanted is None:
        if other_task:
            return dataset
        return _by_number(dataset, source, like, named)
    if own == wanted:
        return dataset
    held = [own[number] for number in sorted(set(dataset[LABEL_COLUMN]))]
    unknown = [name for name in held if name not in wanted]
    if unknown:
        raise ValueError(
            f"{source} has the class {unknown[0]!r}, which {named} has not (it has {_some(wanted)}): no student could "
            "learn it. The same class has the same name everywhere."
        )
    numbers = {number: wanted.index(name) for number, name in enumerate(own) if name in wanted}
    return _with_labels(dataset, [numbers[label] for label in dataset[LABEL_COLUMN]], wanted)


def _by_number(dataset: Dataset, source: object, like: Dataset, named: object) -> Dataset:
    count, largest = count_labels(like, named), max(dataset[LABEL_COLUMN])
    if largest >= count:
        raise ValueError(f"{source} has the label {largest}, but {named} ends at {count - 1}.")
    own, wanted = label_names(dataset), label_names(like)
    if own is None and wanted is None:
        return dataset
    warnings.warn(
        f"Of {source} and {named}, one names its labels ({_some(own or wanted or [])}) and the other numbers them: "
        "they are matched by number. (remos_hf)",
        stacklevel=3,
    )
    return _with_labels(dataset, list(dataset[LABEL_COLUMN]), wanted)


def _with_labels(dataset: Dataset, labels: Sequence[int], names: list[str] | None) -> Dataset:
    """Give a copy with other labels; nothing else of it is read."""
    feature = Value("int64") if names is None else ClassLabel(names=names)
    column = Dataset.from_dict({LABEL_COLUMN: labels}, Features({LABEL_COLUMN: feature}))
    return concatenate_datasets([dataset.remove_columns(LABEL_COLUMN), column], axis=1)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
