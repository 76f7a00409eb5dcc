"""Weights that a selection has decided on, and those that it has not: what one pass hands to the next."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Decided:
    """Bits that are decided, and the weights that are not yet.

    Both go into arrays made beforehand: small pieces kept between large ones that come and go would leave the allocator
    with holes many times their size.

    Args:
        sizes: Number of weights of each entry of the competition.
        expected: Number of open weights that there is room for at first.
        device: Where the open weights are written down; bits lie on the CPU.
    """

    def __init__(self, sizes: Sequence[int], expected: int, device: torch.device) -> None:
        sizes = [-(-size // 8) for size in sizes]
        self.bits = list(torch.empty(sum(sizes), dtype=torch.uint8).split(sizes))
        self.num_kept = self.num_open = 0
        self._of_entry: dict[int, int] = {}
        self._arrays = [
            torch.empty(expected, dtype=kind, device=device) for kind in (torch.int64, torch.int64, torch.float32)
        ]

    @property
    def places(self) -> Tensor:
        """Place of the open weights in their entry's memory order."""
        return self._arrays[0][: self.num_open]

    @property
    def owners(self) -> Tensor:
        """Number of the open weights' entry."""
        numbers, sizes = (torch.tensor(list(part)) for part in (self._of_entry, self._of_entry.values()))
        return numbers.repeat_interleave(sizes).to(self.places.device)

    @property
    def coverage(self) -> Tensor:
        """Doubled coverage rank of the open weights."""
        return self._arrays[1][: self.num_open]

    @property
    def magnitudes(self) -> Tensor:
        """Magnitude of the open weights."""
        return self._arrays[2][: self.num_open]

    def note(self, entry: int, places: Tensor, coverage: Tensor, magnitudes: Tensor) -> None:
        """Write down open weights of an entry by their places in memory order."""
        start, stop = self.num_open, self.num_open + len(places)
        if stop > len(self._arrays[0]):
            self._arrays = [torch.cat([array, array.new_empty(stop)]) for array in self._arrays]
        for array, values in zip(self._arrays, (places, coverage, magnitudes), strict=True):
            array[start:stop] = values
        self._of_entry[entry] = self._of_entry.get(entry, 0) + len(places)
        self.num_open = stop

    def keep(self, kept: Tensor) -> None:
        """Set the bits of the open weights that are kept. Bool, shape (open,)."""
        sizes = list(self._of_entry.values())
        places = self.places.split(sizes)
        for entry, where, keep in zip(self._of_entry, places, kept.split(sizes), strict=True):
            chosen = where[keep].cpu().numpy()
            np.bitwise_or.at(self.bits[entry].numpy(), chosen >> 3, (1 << (chosen & 7)).astype(np.uint8))
