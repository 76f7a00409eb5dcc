"""How the absolute weights of a model are spread: a histogram fine enough to rank by, made in one pass."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remos_hf.layers import Layer, largest_magnitude

# Octaves below the largest magnitude that get bins of their own; what is smaller shares the lowest bin.
_OCTAVES = 16
_MANTISSA_BITS = 23
# Trailing zero bits of a 16-bit weight when it is written as float32: one bin for each value.
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13}


def magnitudes_of(weights: Tensor) -> Tensor:
    """Give absolute values as float32, in memory of their own. Any shape."""
    return weights.abs() if weights.dtype == torch.float32 else weights.float().abs_()


class MagnitudeTable:
    """Histogram over the ordered bits of |w|: for positive floats, order of bits is order of values.

    A table that is filled from one shard adds to another's: `counts += other.counts` before `close`.
    """

    def __init__(self, base: int, shift: int, largest: float, device: torch.device, *, one_value: bool = False) -> None:
        self.base, self.shift, self.one_value = base, shift, one_value  # one_value: all weights of a bin are equal
        top = int(torch.tensor(largest, dtype=torch.float32).view(torch.int32))
        self.counts = torch.zeros((top - base >> shift) + 1, dtype=torch.int64, device=device)
        # Counting clears a table first, so that enough must be counted at once to make that a small part of the work.
        self._waiting = torch.empty(max(2**18, 4 * len(self.counts)), dtype=torch.int32, device=device)
        self._num_waiting = 0

    @classmethod
    def sized_for(cls, layers: Sequence[Layer]) -> "MagnitudeTable":
        """Make an empty table for the weights of some layers.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        largest = largest_magnitude({layer.name: layer for layer in layers})
        device, total = layers[0].device, sum(layer.numel for layer in layers)
        zero_bits = [_ZERO_BITS.get(layer.dtype, 0) for layer in layers]
        if min(zero_bits):
            return cls(0, min(zero_bits), largest, device, one_value=True)
        # Bins of weights straddling the threshold fall as 1 / bins, and so do the weights in them: this many bits an
        # octave leaves about one weight in a hundred to look at twice.
        bits = min(max(int(np.log2(33 * total) / 2), 8), 18)
        shift = _MANTISSA_BITS - bits
        top = int(torch.tensor(largest, dtype=torch.float32).view(torch.int32))
        base = max(0, top - (_OCTAVES << _MANTISSA_BITS)) >> shift << shift
        return cls(base, shift, largest, device)

    def bin_of(self, magnitudes: Tensor) -> Tensor:
        """Bin of each magnitude. Int32."""
        return (magnitudes.view(torch.int32) - self.base).clamp_(min=0).bitwise_right_shift_(self.shift)

    def add(self, magnitudes: Tensor) -> None:
        """Count magnitudes."""
        for some in magnitudes.split(len(self._waiting)):
            if self._num_waiting + len(some) > len(self._waiting):
                self._count_waiting()
            above = (some.view(torch.int32) - self.base).clamp_(min=0)
            waiting = self._waiting[self._num_waiting : self._num_waiting + len(some)]
            torch.bitwise_right_shift(above, self.shift, out=waiting)
            self._num_waiting += len(some)

    def _count_waiting(self) -> None:
        self.counts += torch.bincount(self._waiting[: self._num_waiting], minlength=len(self.counts))
        self._num_waiting = 0

    def close(self, *, ties_share: bool = True) -> None:
        """Turn counts into the doubled ranks that a weight of each bin may have, lowest and highest."""
        self._count_waiting()
        del self._waiting
        self.below = self.counts.cumsum(0) - self.counts
        if ties_share and self.one_value:  # all of a bin ties
            self.lowest = self.highest = 2 * self.below + self.counts - 1
            return
        self.lowest = 2 * self.below
        self.highest = 2 * (self.below + self.counts - 1)

    def cuts(self, coverage: Tensor, low: int | None, high: int | None) -> tuple[Tensor, Tensor]:
        """For each coverage rank, the magnitudes below which a score is surely above `high`, and maybe not below `low`.

        A weight scores surely above `high` if coverage - highest[bin] > high, and surely below `low` if
        coverage - lowest[bin] < low; both ends rise with the bin, so each is a cut. Float32, shape of `coverage`.
        """
        none, every = torch.zeros_like(coverage), torch.full_like(coverage, len(self.counts))
        keep = none if high is None else torch.searchsorted(self.highest, coverage - high)
        still_open = every if low is None else torch.searchsorted(self.lowest, coverage - low, right=True)
        return self._edge(keep), self._edge(still_open)

    def _edge(self, bins: Tensor) -> Tensor:
        keys = (bins << self.shift) + self.base
        keys = torch.where(bins <= 0, 0, keys)  # the lowest bin reaches down to zero
        infinity = 0xFF << _MANTISSA_BITS
        keys = torch.where(bins >= len(self.counts), infinity, keys.clamp(max=infinity))
        return keys.to(torch.int32).view(torch.float32)
