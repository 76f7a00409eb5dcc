"""Running a part of a model again and again: from the block that matters to the layer that matters.

What a block made is kept for every batch. Blocks that are through then give what the last of them made instead of
running, and a run ends as soon as the layers that are looked at have run. That blocks may be left out is proved on a
batch, bit for bit; where it is not so, as in models that read the outputs of several blocks, runs start at the first.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from remos_hf.activations import standing_in, watch_calls
from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.taps import Read, SeeRead, Taps

logger = logging.getLogger(__name__)


class PartRuns:
    """Runs of one model over kept batches. Whoever asks holds it in eval mode, without gradients.

    Args:
        adapter: The model's.
        batches: Batches without padding, on the model's device.

    Attributes:
        blocks: Names of its blocks, first to last; none where they are not known.
        through: How many of them are through.
    """

    def __init__(self, adapter: Adapter, batches: list[Any]) -> None:
        self.adapter, self.batches, self.through = adapter, batches, 0
        try:
            self._blocks = dict(adapter.blocks())
        except UnsupportedModelError:
            self._blocks = {}
        self.blocks = tuple(self._blocks)
        self._made: list[Any] = []  # of every batch, what the last block that is through gave
        self._standing: list[nn.Module] = []

    def taps(self, layers: Mapping[str, Layer]) -> Taps:
        """Give what `read` looks at layers with; none of a block that is through."""
        return Taps(self.adapter, layers, "hooks")

    def read(self, place: int, taps: Taps, see: SeeRead, ends: Mapping[str, int] | None = None) -> None:
        """Run a batch and show what layers read and make.

        Args:
            place: Number of the batch.
            taps: Of the layers.
            see: Called with every activation.
            ends: How often each layer makes something in a run: when all have, the run ends. None: it runs to its end.
        """
        left = dict(ends or {})

        def look(read: Read) -> None:
            see(read)
            if read.end == "output" and left.get(read.layer.name):
                left[read.layer.name] -= 1
                if not any(left.values()):
                    raise _Enough

        with self._running(place), suppress(_Enough):
            taps.run(self.batches[place], look)

    def given_to(self, name: str, module: nn.Module, place: int, times: int) -> list[Tensor]:
        """Run a batch until a module has run so many times; give the first tensor of each of its calls."""
        given: list[Tensor] = []

        def keep(_: str, args: tuple, kwargs: dict, __: Any) -> None:  # noqa: ANN401 - whatever its forward returns
            given.extend(one for one in (*args, *kwargs.values())[:1] if isinstance(one, Tensor))
            if len(given) >= times:
                raise _Enough

        with self._running(place), suppress(_Enough), watch_calls({name: module}, keep):
            self.adapter.forward(self.batches[place])
        return given

    def pass_block(self) -> None:
        """Run the next block with the weights that it has now, and keep what it makes; it is not run again."""
        self.through += 1
        if not self._blocks:
            return
        name = self.blocks[self.through - 1]
        made = [self._made_by(name, place) for place in range(len(self.batches))]
        whole = self._outputs()
        self._made, self._standing = made, [self._blocks[name] for name in self.blocks[: self.through]]
        if not _same(whole, self._outputs()):
            logger.info("Blocks of %s cannot be left out: runs start at the first.", type(self.adapter.model).__name__)
            self._blocks, self._made = {}, []

    def _made_by(self, block: str, place: int) -> Any:  # noqa: ANN401 - whatever its forward returns
        made: list[Any] = []

        def keep(_: str, __: tuple, ___: dict, output: Any) -> None:  # noqa: ANN401 - likewise
            made.append(output)
            raise _Enough

        with self._running(place), suppress(_Enough), watch_calls({block: self._blocks[block]}, keep):
            self.adapter.forward(self.batches[place])
        return made[0] if made else None

    def _outputs(self) -> list[Tensor]:
        """What the model gives of the first batch."""
        with self._running(0):
            return _tensors(self.adapter.forward(self.batches[0]))

    @contextmanager
    def _running(self, place: int) -> Iterator[None]:
        if not self._made:
            yield
            return
        # A copy: some blocks write into what they are given.
        output = recursively_apply(torch.clone, self._made[place])
        with standing_in(dict.fromkeys(self._standing, output)):
            yield


class _Enough(Exception):  # noqa: N818 - ends a run, caught above
    """All that was to be seen has run."""


def _tensors(output: Any) -> list[Tensor]:  # noqa: ANN401 - whatever a model returns
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [one for part in parts for one in _tensors(part)]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))
