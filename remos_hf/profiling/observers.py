"""What an observer of the pass is shown: one activation, sample by sample, with its padding."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from remos_hf.adapters.sequences import Sequence
from remos_hf.layers import Layer
from remos_hf.profiling.layouts import Layout, Unproved, moved_axis


class Slot(NamedTuple):
    """One end of a layer; of a fused layer's output, one of the tensors it stacks."""

    name: str
    end: str
    part: int = 0


class Padding:
    """Which positions of an activation are real."""

    def __init__(self, real: Tensor) -> None:
        self.real = real  # (samples, positions)
        self.weights = real.float()[:, None]
        self.lengths = self.weights.sum(-1).clamp(min=1)  # (samples, 1)


class Activation:
    """One tensor of a batch. What is not asked for is not computed; asked for once, it stays for all who share it.

    Attributes:
        values: Float32 while `see` runs, else None. Shape (samples, positions, neurons), or (samples, neurons,
            positions) if `channels_first`. What stands at padding is not the data's.
        channels_first: Which of the two.
        padding: None if every position is real.
        careful: Values at padding may be NaN or infinite, so sums must not touch them.
    """

    def __init__(self, values: Tensor, channels_first: bool, padding: Padding | None, careful: bool) -> None:
        self.values: Tensor | None = values
        self.channels_first, self.padding, self.careful = channels_first, padding, careful
        self.shape = values.shape

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.shape[0]

    @property
    def positions(self) -> int:
        """Positions of each sample, padding included."""
        return self.shape[2 if self.channels_first else 1]

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value. Shape (samples, positions) if there is padding or neurons lie last, else 1."""
        if not self.channels_first:
            return self.values.amin(-1), self.values.amax(-1)
        over = (1, 2) if self.padding is None else (1,)
        low, high = self.values.amin(over), self.values.amax(over)
        return (low[:, None], high[:, None]) if self.padding is None else (low, high)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of each neuron over positions; the sum over real ones if there is padding. Shape (samples, neurons)."""
        if self.padding is None:
            return self.values.mean(2 if self.channels_first else 1)
        values = self.values
        if self.careful:
            values = values.masked_fill(~self.padding.real[:, None if self.channels_first else slice(None), None]
                                        if False else ~self._real_like_values(), 0)
        if self.channels_first:
            return torch.bmm(values, self.padding.weights.transpose(1, 2))[..., 0]
        return torch.bmm(self.padding.weights, values)[:, 0]
