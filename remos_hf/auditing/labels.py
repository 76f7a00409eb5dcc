"""What labels mean. A class is its name: it has the same number in all data of a task, the one of the students' data.

A label that is a whole number has its digits for a name. So a class that one file lacks, another order of the names,
and numbers that are codes are the same case: names are looked up in the names of the task.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, concatenate_datasets

LABEL_COLUMN = "label"
# More names than this, and more than half as many as samples, are no classes but a column of something else.
_MOST_NAMES = 50

_LARGEST = 10**6
_LONGEST = 1000  # digits: int() reads no more than 4,300


def labels_of(source: object, values: Sequence[Any], column: str) -> tuple[list[int], list[str]]:
    """Read a column of labels.

    Args:
        source: For messages.
        values: Whole numbers, also written as text; or names, none of which is a number.
        column: For messages.

    Returns:
        The number of each sample's class, and the names of the classes in the order of their numbers. Names are
        sorted, whole numbers by their value: of labels 0, 1 and 2 each is its own number, of 1 and 2 the first is 0.

    Raises:
        ValueError: A label is missing, negative, a fraction, or a number among names; or two names differ in nothing
            but capitals or spaces.
    """
    if all(isinstance(value, str) and value.strip() and not _is_number(value) for value in values):
        names = sorted(set(values))
        _check_spelling(source, names, column)
        read: Sequence[Any] = values
    else:
        read = _whole_numbers(source, values, column)
        names = sorted(set(read), key=int)
    if len(names) > max(_MOST_NAMES, len(values) // 2) and not are_numbers(names):
        raise ValueError(
            f"{source}: column {column!r} holds {len(names):,} different values in {len(values):,} samples, such as "
            f"{values[0]!r}: these are no labels."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[value] for value in read], names


def check_class_numbers(source: object, values: Sequence[Any], column: str) -> list[int]:
    """Give the labels of a column that names its classes, or refuse those that no class belongs to.

    Raises:
        ValueError: A label is missing or negative, as in unlabelled test data.
    """
    wrong = next((place for place, value in enumerate(values) if value is None or value < 0), None)
    if wrong is not None:
        told = "no label" if values[wrong] is None else f"the label {values[wrong]}, which no class has,"
        raise ValueError(
            f"{source}: sample {wrong} has {told} in column {column!r} (unlabelled test data?). Leave such samples out."
        )
    return list(values)


def classes_of(dataset: Dataset, column: str = LABEL_COLUMN) -> list[str]:
    """Give the names of the classes in the order of their numbers; the numbers themselves if they have no names.

    Args:
        dataset: The samples.
        column: Their labels.

    Raises:
        ValueError: A label without a name is so large that it is a code.
    """
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    largest = max(dataset[column])
    if largest > _LARGEST:
        raise ValueError(f"Column {column!r} holds the label {largest:,}: a code, not the number of a class.")
    return _digits(1 + largest)


def count_labels(dataset: Dataset, source: object = "The data") -> int:
    """Count the classes of a task, and tell where their names are numbers other than 0, 1, 2, ...

    Args:
        dataset: The samples that decide which classes there are.
        source: For messages.

    Raises:
        ValueError: Labels without names leave numbers out: a head has an output for each number below.
    """
    if not isinstance(dataset.features[LABEL_COLUMN], ClassLabel):
        held = set(dataset[LABEL_COLUMN])
        if len(held) <= max(held):
            raise ValueError(
                f"{source} has {len(held)} different labels, but they go up to {max(held):,}: they are codes, not "
                f"numbers from 0 to {len(held) - 1}. Number them so, or name them by a ClassLabel."
            )
        return len(held)
    names = classes_of(dataset)
    if all(map(_is_whole, names)) and not are_numbers(names):
        warnings.warn(
            f"The labels of {source} are {some_of(names)}, not 0 to {len(names) - 1}: they are taken for the names of "
            f"{len(names)} classes, and {names[0]!r} has the number 0. (remos_hf)",
            stacklevel=2,
        )
    return len(names)


def label_names(dataset: Dataset) -> list[str] | None:
    """Give the names of the classes; None if they are the numbers from 0 on, which name nothing."""
    names = classes_of(dataset)
    return None if are_numbers(names) else names


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names of classes are their numbers, which name nothing."""
    return list(names) == _digits(len(names))


def by_name(
    dataset: Dataset,
    source: object,
    like: Dataset | Sequence[str],
    named: object,
    *,
    other_task: bool = False,
    column: str = LABEL_COLUMN,
) -> Dataset:
    """Give a data set's classes the numbers that they have in another one. A class that it lacks keeps its number.

    Args:
        dataset: The samples.
        source: For messages.
        like: The samples that students learn from, which decide the numbers; or the names of the classes in their
            order, such as a model's.
        named: For messages.
        other_task: Whether the samples may know more classes (an attacker's): those come after the others.
        column: The labels.

    Raises:
        ValueError: It has a class that the other one has not, or they have none in common.
    """
    own = classes_of(dataset, column)
    wanted = classes_of(like, column) if isinstance(like, Dataset) else list(like)
    labels = list(dataset[column])
    if all(map(_is_whole, own)) != all(map(_is_whole, wanted)):
        return _by_number(dataset, source, wanted, named, other_task, column)
    held = [own[number] for number in sorted(set(labels))]
    unknown = [name for name in held if name not in wanted]
    if unknown and not (other_task and len(unknown) < len(held)):
        raise ValueError(_unknown(source, unknown[0], wanted, named, other_task))
    names = wanted + unknown
    unnamed = not isinstance(dataset.features[column], ClassLabel)
    if own == names or (unnamed and isinstance(like, Dataset) and not isinstance(like.features[column], ClassLabel)):
        return dataset
    numbers = {number: names.index(name) for number, name in enumerate(own) if name in names}
    return _with_labels(dataset, [numbers[label] for label in labels], names, column)


def _by_number(
    dataset: Dataset, source: object, wanted: list[str], named: object, other_task: bool, column: str
) -> Dataset:
    """Match the names of one with the numbers of the other, which is the best that can be done, and is told."""
    own = classes_of(dataset, column)
    digits = all(map(_is_whole, own))
    # A number is what the file says, not its place among the numbers of the file.
    numbers = [int(own[label]) if digits else label for label in dataset[column]]
    count = len(wanted) if digits else 1 + max(int(name) for name in wanted)
    if max(numbers) >= count or (not digits and not are_numbers(wanted)):
        if other_task:
            return dataset
        raise ValueError(
            f"{source} has the label {own[max(dataset[column])]!r}, but the classes of {named} are {some_of(wanted)}. "
            "Write the same names in both."
        )
    warnings.warn(
        f"Of {source} and {named}, one names its labels ({some_of(wanted if digits else own)}) and the other numbers "
        "them: they are matched by number. (remos_hf)",
        stacklevel=3,
    )
    return _with_labels(dataset, numbers, wanted, column)


def _with_labels(dataset: Dataset, labels: Sequence[int], names: list[str], column: str) -> Dataset:
    """Give a copy with other labels; nothing else of it is read."""
    labelled = Dataset.from_dict({column: labels}, Features({column: ClassLabel(names=names)}))
    settled = concatenate_datasets([dataset.remove_columns(column), labelled], axis=1)
    settled.info.description = dataset.info.description  # what was left out of it
    return settled


def _whole_numbers(source: object, values: Sequence[Any], column: str) -> list[str]:
    for place, value in enumerate(values):
        if isinstance(value, bool) or not _is_whole(str(value)):  # int() would take 0.7 for 0, "1_0" for 10
            raise ValueError(
                f"{source}: labels are whole numbers, or all of them names, but sample {place} has {value!r} in column "
                f"{column!r}."
            )
        if int(value) < 0:
            raise ValueError(
                f"{source}: labels are 0 or more, but one is {value} (unlabelled test data?): sample {place}, column "
                f"{column!r}."
            )
    return [str(int(value)) for value in values]


def _check_spelling(source: object, names: Sequence[str], column: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            raise ValueError(
                f"{source}: the labels {other!r} and {name!r} in column {column!r} differ in nothing but capitals or "
                "spaces. Are they one class? Then write it in one way."
            )


def _unknown(source: object, name: str, wanted: Sequence[str], named: object, other_task: bool) -> str:
    close = next((one for one in wanted if one.strip().casefold() == name.strip().casefold()), None)
    why = "so they have no class in common" if other_task else "so no student could learn it"
    hint = f" Is it {close!r}?" if close else ""
    return (
        f"{source} has the class {name!r}, which {named} has not (it has {some_of(wanted)}), {why}.{hint} The same "
        "class has the same name everywhere."
    )


def _digits(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _is_whole(text: str) -> bool:
    text = text.strip()
    return len(text) < _LONGEST and text.isascii() and text.removeprefix("-").removeprefix("+").isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def some_of(names: Sequence[str]) -> str:
    """Give the first names of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
