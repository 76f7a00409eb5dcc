"""What the inputs of every layer have to do with each other: sums of x x^T over the student's data.

Enough to fit the kept weights of a layer to the outputs of all of them by least squares. One matrix is held for every
distinct input: query, key and value read one tensor and share it.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.observers import Activation, Observer, Slot

logger = logging.getLogger(__name__)

# Bytes that the matrices of one model may take if the caller says nothing.
DEFAULT_MAX_BYTES = 16 * 2**30
# Images whose patches are laid out at once: each is as often there as the kernel has places.
_IMAGES = 4


class SecondMoments(Observer):
    """Adds up x x^T of what every layer multiplies its weight with, over samples and real positions, in float64.

    For a Linear, Conv1D or expert x is its input; for a convolution it is the patch under its kernel, channel by
    channel, of each group by itself. So a row of `Layer.as_matrix` (of its transpose where inputs come first) goes
    with x.

    Args:
        max_bytes: Refuse to hold more than this; the memory needed is logged before the first batch.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.layers: Mapping[str, Layer] = {}
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by the layers that read the same; (groups, d, d)
        self._counts: dict[tuple[str, ...], Tensor] = {}
        self._bytes = 0
        self.drop_batch()

    def start(self, layers: Mapping[str, Layer]) -> None:
        """Tell how much memory the matrices will take."""
        self.layers = {name: layer for name, layer in layers.items() if not layer.is_embedding}
        most = sum(8 * layer.groups * _width(layer) ** 2 for layer in self.layers.values())
        logger.info(
            "Second moments of %d layers take at most %.2f GiB, less where layers read the same input.",
            len(self.layers),
            most / 2**30,
        )

    def wants(self, layer: Layer, end: str) -> bool:
        """Look at what is read, tokens apart."""
        return end == "input" and not layer.is_embedding

    def see(self, slot: Slot, activation: Activation) -> None:
        """Multiply an input with itself, once for all layers that read it in the same way."""
        layer = self.layers[slot.name]
        key = id(activation), way_of_reading(layer)
        if key not in self._seen:
            self._seen[key] = [activation, *_moment(layer, activation), []]
        self._seen[key][-1].append(slot.name)

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._seen: dict[tuple, list] = {}

    def close_batch(self) -> None:
        """Add up the batch."""
        for _, moment, count, names in self._seen.values():
            key = tuple(names)
            if key not in self._sums:
                self._take(moment)
                self._sums[key], self._counts[key] = torch.zeros_like(moment), torch.zeros((), dtype=torch.int64)
            self._sums[key] += moment
            self._counts[key] += count
        self.drop_batch()

    def _take(self, moment: Tensor) -> None:
        self._bytes += moment.numel() * 8
        if self._bytes > self.max_bytes:
            raise UnsupportedModelError(
                f"Second moments of this teacher take more than {self.max_bytes / 2**30:.1f} GiB, one d x d matrix for "
                "every distinct input of width d. Allow more with max_bytes=, or refill with 'mean', which needs one "
                "number a neuron."
            )

    def state(self) -> dict[str, Tensor]:
        """Give sums and counts by the layers they are of."""
        sums = {"sum:" + "\n".join(key): moment for key, moment in self._sums.items()}
        return sums | {"count:" + "\n".join(key): count for key, count in self._counts.items()}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of all processes."""
        for kind, mine in (("sum:", self._sums), ("count:", self._counts)):
            mine.clear()
            mine |= {
                tuple(name.removeprefix(kind).split("\n")): one for name, one in state.items() if name.startswith(kind)
            }

    def moments(self) -> dict[str, Tensor]:
        """Give the mean of x x^T by `Layer.name`. Float64, shape (d, d), of grouped convolutions (groups, d, d).

        Layers that read the same share one tensor. It lies where it was added up.

        Raises:
            NonFiniteError: A layer read NaN or infinity at a real position.
        """
        parts: dict[str, list[tuple[str, ...]]] = {}
        for key in self._sums:
            for name in key:
                parts.setdefault(name, []).append(key)
        made: dict[tuple, Tensor] = {}
        for name, keys in parts.items():
            if tuple(keys) not in made:
                made[tuple(keys)] = self._mean(name, keys)
        return {name: made[tuple(keys)] for name, keys in parts.items()}

    def _mean(self, name: str, keys: list[tuple[str, ...]]) -> Tensor:
        mean = sum(self._sums[key] for key in keys) / max(1, sum(int(self._counts[key]) for key in keys))
        if not bool(mean.isfinite().all()):
            raise NonFiniteError(
                f"The input of '{name}' held NaN or infinity on this data, so it has no second moments. Check the "
                "data, or run the teacher in float32."
            )
        return mean[0] if len(mean) == 1 else mean


def _width(layer: Layer) -> int:
    return layer.in_neurons // layer.groups * (1 if layer.inputs_first else layer.shape[2:].numel())


def way_of_reading(layer: Layer) -> tuple:
    """Say how a layer reads its input: alike for all that multiply it as it is."""
    module = layer.module
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode


def _moment(layer: Layer, activation: Activation) -> tuple[Tensor, int]:
    """Add up x x^T of one activation. Float64, shape (groups, width, width); and how many vectors x there are."""
    if not isinstance(layer.module, (nn.Conv1d, nn.Conv2d)):
        rows = activation.rows().double()
        return (rows.T @ rows)[None], len(rows)
    moment: Tensor | None = None
    count = 0
    for start in range(0, len(activation.given), _IMAGES):
        patches = _patches(layer, activation, slice(start, start + _IMAGES))
        part = patches.transpose(1, 2) @ patches
        moment, count = part if moment is None else moment + part, count + patches.shape[1]
    return moment, count


def _patches(layer: Layer, activation: Activation, some: slice) -> Tensor:
    """Give what lies under a kernel at every real place where it is laid. Float64, shape (groups, places, width)."""
    patches = patches_under(layer, activation.given[some].double())
    if activation.padding is None:
        return patches.transpose(0, 1).flatten(1, 2)
    real = activation.padding.real[some]
    if real.shape[1] != patches.shape[2]:
        raise UnsupportedModelError(
            f"'{layer.name}' makes {patches.shape[2]} positions of {real.shape[1]}, so which of them are padding is "
            "not known. Give batches without padding."
        )
    return patches.transpose(1, 2)[real].transpose(0, 1)


def patches_under(layer: Layer, images: Tensor) -> Tensor:
    """Give what lies under a convolution's kernel at every place where it is laid, channel by channel.

    Args:
        layer: A convolution.
        images: What it reads. Shape (images, channels, *sizes), one or two sizes.

    Returns:
        Shape (images, groups, places, width), of the images' dtype.
    """
    module = layer.module
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = nn.functional.pad(images, around, mode=mode)
    if images.dim() == 3:
        images = images.unsqueeze(2)
    spans = module.kernel_size, module.dilation, module.stride
    kernel, dilation, stride = ((1,) * (2 - len(one)) + tuple(one) for one in spans)
    patches = nn.functional.unfold(images, kernel, dilation=dilation, stride=stride)
    return patches.unflatten(1, (module.groups, -1)).movedim(2, -1)
