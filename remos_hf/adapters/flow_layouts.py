"""Where samples, positions and neurons lie in a tensor, and where they lie after an operation.

A layout has one entry for each axis: the factors that its size is made of, outermost first, each a role and a size. The
roles are "n" for samples, "p" for positions and "f" for neurons; factors of size 1 are left out. (4, 12, 5, 5) as a
convolution makes it is ((n 4), (f 12), (p 5), (p 5)), and flattened for a Linear ((n 4), (f 12, p 5, p 5)).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Factor = tuple[str, int]
Layout = tuple[tuple[Factor, ...], ...]


def axis(role: str, size: int) -> tuple[Factor, ...]:
    """Give the entry of an axis of one role."""
    return ((role, size),) if size != 1 else ()


def factors_of(layout: Layout) -> list[Factor]:
    """Give all factors in the order of the axes."""
    return [factor for entry in layout for factor in entry]


def layout_of_input(shape: Sequence[int]) -> Layout:
    """Give the layout of what a model is given: (samples, channels, ...) or (samples, positions, features)."""
    samples, *others = shape
    roles = {0: "", 1: "f", 2: "pf"}.get(len(others), "f" + "p" * (len(others) - 1))
    return (axis("n", samples), *(axis(role, size) for role, size in zip(roles, others, strict=True)))


def resized(entry: tuple[Factor, ...], size: int) -> tuple[Factor, ...]:
    """Give the entry of an axis that was cut, padded or joined to another size."""
    if math.prod(one for _, one in entry) == size:
        return entry
    roles = {role for role, _ in entry}
    return axis(roles.pop() if len(roles) == 1 else "f", size)


def broadcast(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Give the layout of tensors that were broadcast together to this shape."""
    padded = [((),) * (len(shape) - len(one)) + tuple(one) for one in layouts]
    made = []
    for place, size in enumerate(shape):
        entries = [one[place] for one in padded if math.prod(part for _, part in one[place]) == size]
        made.append(entries[0] if entries else axis("f", size))
    return tuple(made)


def layout_of_view(layout: Layout, shape: Sequence[int], view: Callable[[Tensor], Tensor]) -> Layout | None:
    """Give the layout of a view, told by the strides that it has into its input; None if it is no view."""
    given = torch.empty(tuple(shape), device="meta")
    made = view(given)
    if made is not given and made._base is None:
        return None
    placed, stride = [], 1
    for role, size in reversed(factors_of(layout)):
        placed.append((role, size, stride))
        stride *= size
    entries = [_entry(placed, size, step) for size, step in zip(made.shape, made.stride(), strict=True)]
    if entries and made.stride(0) == 0:  # one value for all samples
        entries[0] = axis("n", made.shape[0])
    return tuple(entries)


def _entry(placed: Sequence[tuple[str, int, int]], size: int, step: int) -> tuple[Factor, ...]:
    """Give the factors that an axis of this size and stride runs over; `placed` has the innermost first."""
    if size == 1 or step == 0:
        return axis("f", size)
    made: list[Factor] = []
    need, at = size, step
    for role, whole, stride in placed:
        if need == 1 or at >= stride * whole:
            continue
        left = whole // max(1, at // stride)
        taken = left if need % left == 0 else need
        made.insert(0, (role, taken))
        need //= taken
        at *= taken
    return tuple(made) if need == 1 else axis("f", size)
