"""Numbers in the fields of a recipe: refused where they mean nothing, and plain, as a record writes them."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any


def check_number(recipe: object, told: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Refuse fields that are no number, or none that fits; numbers of other libraries, such as NumPy's, become plain.

    Args:
        recipe: A dataclass, frozen or not.
        told: What such a field is, such as "a share, in [0, 1)".
        fits: Whether a number is in its range; not asked of anything else.
        *names: Of the fields.

    Raises:
        ValueError: Names the first field that is no number (a bool is none), or does not fit.
    """
    for name in names:
        value = getattr(recipe, name)
        if not is_number(value) or not fits(value):
            raise ValueError(f"{name} is {told}, but got {value!r}.")
        object.__setattr__(recipe, name, plain(value))


def check_whole(recipe: object, told: str, least: int, *names: str) -> None:
    """Refuse fields that are no whole number, or a smaller one than the least; they become plain.

    Args:
        recipe: As in `check_number`.
        told: What such a field is, such as "a number of pixels, 0 or more".
        least: The smallest.
        *names: Of the fields.

    Raises:
        ValueError: Names the first field that is no whole number (a bool is none), or too small.
    """
    check_number(recipe, told, lambda one: isinstance(one, Integral) and one >= least, *names)


def is_number(value: object) -> bool:
    """Whether a value is a real number; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:  # noqa: ANN401 - any value of a recipe
    """Give a value with Python's own numbers in the place of other libraries'; an int or a float is the very one."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value] if isinstance(value, list) else tuple(plain(one) for one in value)
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
