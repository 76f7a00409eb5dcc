"""The mean input of every layer, neuron by neuron: what the layer reads on average on the student's data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from remos_hf.errors import NonFiniteError
from remos_hf.layers import Layer
from remos_hf.profiling.observers import Activation, Observer, Slot


class InputMeans(Observer):
    """Adds up what every layer reads, over samples and real positions, in float64.

    A module that runs several times reads several times; of routed experts only what reaches them counts.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (in + 1,): sums, and as the last number how many vectors they are of
        self.drop_batch()

    def wants(self, layer: Layer, end: str) -> bool:
        """Look at what is read, tokens apart."""
        return end == "input" and not layer.is_embedding

    def see(self, slot: Slot, activation: Activation) -> None:
        """Reduce an activation, once."""
        _ = activation.mean
        self._seen.append((slot.name, activation))

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._seen: list[tuple[str, Activation]] = []

    def close_batch(self) -> None:
        """Add up the batch; what several layers read, once."""
        added: dict[int, Tensor] = {}
        for name, activation in self._seen:
            if id(activation) not in added:
                added[id(activation)] = _summed(activation)
            known = self._sums.get(name)
            self._sums[name] = added[id(activation)] if known is None else known + added[id(activation)]
        self.drop_batch()

    def state(self) -> dict[str, Tensor]:
        """Give the sums by layer."""
        return self._sums

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of all processes."""
        self._sums = dict(state)

    def means(self) -> dict[str, Tensor]:
        """Give the means by `Layer.name`. Float64, shape (in,), on the CPU.

        Raises:
            NonFiniteError: A layer read NaN or infinity at a real position.
        """
        found = {name: (sums[:-1] / sums[-1].clamp(min=1)).cpu() for name, sums in self._sums.items()}
        for name, mean in found.items():
            if not bool(mean.isfinite().all()):
                raise NonFiniteError(
                    f"The input of '{name}' held NaN or infinity on this data, so it has no mean. Check the data, or "
                    "run the teacher in float32."
                )
        return found


def _summed(activation: Activation) -> Tensor:
    sums = activation.mean.double()
    if activation.padding is None:
        sums = sums * activation.positions
        count = sums.new_tensor([len(sums) * activation.positions])
    else:
        count = activation.padding.real.sum().double()[None]
    return torch.cat([sums.sum(0), count])
