"""What an observer of the pass is shown, one activation at a time, and what it has to answer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remos_hf.adapters.base import Adapter
from remos_hf.layers import Layer


class Slot(NamedTuple):
    """One end of a layer; of a fused layer's output, one of the tensors it stacks."""

    name: str
    end: str
    part: int = 0


class Padding:
    """Which positions of an activation are real.

    Attributes:
        real: Bool, shape (samples, positions).
        weights: The same in float32. Shape (samples, 1, positions).
        lengths: Real positions of each sample, at least 1. Shape (samples, 1).
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self.weights = real.float()[:, None]
        self.lengths = self.weights.sum(-1).clamp(min=1)


class Activation:
    """One tensor of a batch, sample by sample. Nothing is computed unless an observer asks; all who ask share it.

    Attributes:
        channels_first: Whether neurons lie before positions, as convolutions have them.
        padding: None if every position is real.
        careful: What stands at padding may be NaN or infinite, so that no sum may touch it.
        positions: Positions of each sample, padding included.
        given: The tensor as the layer read or made it; only there while observers see it.
    """

    def __init__(self, channels_first: bool, padding: Padding | None, careful: bool, positions: int) -> None:
        self.channels_first, self.padding, self.careful, self.positions = channels_first, padding, careful, positions
        self.given: Tensor | None = None
        self._view: Tensor | None = None
        self._values: Tensor | None = None

    def hold(self, given: Tensor | None, view: Tensor | None) -> None:
        """Take the tensor, as the layer was given it and sample by sample, while observers look; None lets go of it."""
        self.given, self._view, self._values = given, view, None

    @property
    def values(self) -> Tensor:
        """Shape (samples, positions, neurons), or (samples, neurons, positions) if `channels_first`. Float32.

        Only there while observers see it. What stands at padding is not the data's.
        """
        if self._values is None:  # means of many half-precision values need the longer mantissa
            self._values = self._view if self._view.dtype == torch.float32 else self._view.float()
        return self._values

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, at each position or over all. Each of shape (samples, positions or 1)."""
        if not self.channels_first:
            return self.values.amin(-1), self.values.amax(-1)
        if self.padding is not None:
            return self.values.amin(1), self.values.amax(1)
        return self.values.amin((1, 2))[:, None], self.values.amax((1, 2))[:, None]

    @cached_property
    def mean(self) -> Tensor:
        """Mean of each neuron over positions; if there is padding, its sum over the real ones. (samples, neurons)."""
        if self.padding is None:
            return self.values.mean(2 if self.channels_first else 1)
        values = self.values
        if self.careful:
            padded = ~self.padding.real
            values = values.masked_fill(padded[:, None] if self.channels_first else padded[..., None], 0)
        if self.channels_first:
            return torch.bmm(values, self.padding.weights.transpose(1, 2))[..., 0]
        return torch.bmm(self.padding.weights, values)[:, 0]

    def rows(self) -> Tensor:
        """Give the values at the real positions of all samples. Shape (real positions, neurons)."""
        values = self.values.transpose(1, 2) if self.channels_first else self.values
        return values.flatten(0, 1) if self.padding is None else values[self.padding.real]


class Observer:
    """What is counted or added up in a pass. Whatever it keeps adds, over batches and over processes.

    By itself it looks at everything and keeps nothing.
    """

    def start(self, layers: Mapping[str, Layer]) -> None:
        """Get to know the layers, before any batch runs."""

    def around(self, adapter: Adapter, batch: Any) -> AbstractContextManager[None]:  # noqa: ANN401 - any batch
        """Give what is laid around the model while it runs a batch."""
        return nullcontext()

    def wants(self, layer: Layer, end: str) -> bool:
        """Whether it looks at this end of a layer at all."""
        return True

    def see(self, slot: Slot, activation: Activation) -> None:
        """Look at an activation while it has its values. One that several slots share comes once for each."""
        raise NotImplementedError(f"{type(self).__name__} must say what it sees in an activation.")

    def see_tokens(self, slot: Slot, tokens: Tensor, real: Tensor) -> None:
        """Look at the ids that an embedding was given and which are real, each (samples, positions)."""

    def close_batch(self) -> None:
        """Add up what was seen since the last batch."""

    def drop_batch(self) -> None:
        """Forget what was seen since the last batch: it is run again, or it failed."""

    def state(self) -> dict[str, Tensor]:
        """Give what was added up, by name. Names that another process lacks are zeros there."""
        return {}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of all processes' states."""
