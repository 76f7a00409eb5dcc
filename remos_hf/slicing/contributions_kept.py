"""Which inputs of a weighted sum are kept, and what they add to CONTRIB, for millions of sums at once."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from remos_hf.fields import is_number, plain

# Effects that are looked at at once: what they need fits a core's cache. A device wants more of them.
_CHUNK, _CHUNK_ON_DEVICE = 2**17, 2**25
# Of rows longer than this, this share of the largest effects is sorted first; it mostly decides.
_LONG, _SHARE = 64, 0.3


def checked_theta(theta: float) -> float:
    """Give theta as Python's own number.

    Raises:
        ValueError: It is none in [0, 1).
    """
    if not is_number(theta) or not 0 <= theta < 1:
        raise ValueError(f"theta is a share of the relative output, in [0, 1), but got {theta!r}.")
    return plain(theta)


def kept_signs(effects: Tensor, theta: float) -> Tensor:
    """Give the sign of every effect that is kept times the sign of its row's sum, and 0 for the others.

    Dropped is the maximum number of the smallest |effects| whose sum stays under theta * |sum of the row|. Equal ones
    stay or go together, so the order of the inputs changes nothing. A row whose sum is 0 keeps none.

    Args:
        effects: Float32, shape (rows, inputs). Overwritten.
        theta: In [0, 1).

    Returns:
        Float32 of -1, 0 and 1, shape (rows, inputs).
    """
    totals = effects.sum(1, keepdim=True)
    largest_dropped = _largest_dropped(effects, totals, theta)
    signs = effects.sign().mul_(totals.sign())
    return signs.masked_fill_(effects.abs_() <= largest_dropped, 0)


def _largest_dropped(effects: Tensor, totals: Tensor, theta: float) -> Tensor:
    """Give the largest |effect| of each row that is dropped, 0 if none is. Shape (rows, 1)."""
    bound = theta * totals.abs()
    # Bits of |effect|, the sign behind them, all of it inverted: ascending keys are descending effects.
    bits = effects.view(torch.int32)
    keys = (bits << 1).sub_(bits >> 31).bitwise_not_()
    width = keys.shape[1]
    first = width if width <= _LONG else max(_LONG, int(width * _SHARE))
    dropped, known = _first_under(keys, totals, bound, first)
    if not bool(known.all()):
        dropped[~known] = _first_under(keys[~known], totals[~known], bound[~known], width)[0]
    return dropped


def _first_under(keys: Tensor, totals: Tensor, bound: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Look for the place from which on all may be dropped among the first keys, and tell whether it was found there."""
    keys = _smallest_sorted(keys, min(first + 1, keys.shape[1])).bitwise_not_()
    magnitude = (keys >> 1).bitwise_and_(0x7FFFFFFF)
    signed = (magnitude | (keys << 31)).view(torch.float32)
    left = signed.cumsum(1, dtype=torch.float64 if keys.is_cuda else None).neg_().add_(totals).abs_()
    under = left < bound
    under[:, :-1] &= magnitude[:, :-1] != magnitude[:, 1:]
    under[:, -1] = False
    place = _first_true(under)
    known = under.gather(1, place)
    dropped = magnitude.gather(1, (place + 1).clamp(max=keys.shape[1] - 1)).view(torch.float32)
    dropped.masked_fill_(~known, 0)
    return dropped, known[:, 0] | (first >= keys.shape[1])


def _smallest_sorted(keys: Tensor, count: int) -> Tensor:
    """Sort each row as unsigned numbers and give the smallest ones. `keys` may be overwritten."""
    if keys.is_cuda:
        turned = keys ^ -(2**31)
        found = turned.topk(count, 1, largest=False, sorted=True).values if count < keys.shape[1] else turned.sort(1)[0]
        return found ^ -(2**31)
    numbers = keys.numpy().view(np.uint32)  # sorts several times as fast as torch
    if count < numbers.shape[1]:
        numbers = np.partition(numbers, count - 1, axis=1)[:, :count].copy()
    numbers.sort(axis=1)
    return torch.from_numpy(numbers.view(np.int32))


def _first_true(flags: Tensor) -> Tensor:
    if flags.is_cuda:
        return flags.to(torch.uint8).argmax(1, keepdim=True)
    return torch.from_numpy(flags.numpy().argmax(1))[:, None]  # stops where it finds one


def spread(
    weights: Tensor,
    inputs: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    theta: float,
    to_weights: tuple[Tensor, Tensor] | None,
    keep: Callable[[Tensor, float], Tensor] = kept_signs,
) -> Tensor:
    """Hand CONTRIB of many sums over one weight row and one input row each down to what they read.

    Args:
        weights: Float32, shape (weight rows, inputs).
        inputs: Their deviations from the reference, float32, shape (input rows, inputs).
        sums: Which weight row and which input row each sum multiplies, and its CONTRIB. Each of shape (sums,).
        theta: In [0, 1).
        to_weights: Where CONTRIB of the weights is added up, float32, shape (any rows, inputs); and the row of each
            sum in it. None if the weights are no parameters.
        keep: Chooses the effects, as `kept_signs` does.

    Returns:
        CONTRIB of the inputs, float32 whole numbers, shape of `inputs`.
    """
    made = torch.zeros_like(inputs)
    step = max(1, (_CHUNK_ON_DEVICE if inputs.is_cuda else _CHUNK) // inputs.shape[1])
    for start in range(0, len(sums[0]), step):
        row, column, contrib = (one[start : start + step] for one in sums)
        effects = weights.index_select(0, row).mul_(inputs.index_select(0, column))
        signs = keep(effects, theta).mul_(contrib.sign()[:, None])
        _add_rows(made, column, signs)
        if to_weights is not None:
            _add_rows(to_weights[0], to_weights[1][start : start + step], signs)
    return made


def _add_rows(total: Tensor, place: Tensor, rows: Tensor) -> None:
    total.scatter_add_(0, place[:, None].expand_as(rows), rows)  # on a CPU much faster than index_add_
