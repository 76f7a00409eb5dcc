"""Which layers read which input, in forward order: what is decided for an input is decided for all that read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from remos_hf.layers import Layer
from remos_hf.profiling.batches import count_samples, input_tensors, take
from remos_hf.profiling.part_runs import PartRuns
from remos_hf.profiling.second_moments import way_of_reading
from remos_hf.profiling.taps import Read


@dataclass(frozen=True)
class DistinctInput:
    """One input, and the layers that read it.

    Attributes:
        layers: Those that read it in the same way, in all of their calls.
        block: Blocks that are through when it is made.
        ends: How often each layer makes something in a run; None if that may differ between runs.
        tables: Calls that read no sample, such as a table of positions.
        outputs: Bytes that the layers make of a sample.
    """

    layers: tuple[Layer, ...]
    block: int
    ends: Mapping[str, int] | None
    tables: frozenset[int]
    outputs: int

    @property
    def columns(self) -> int:
        """What a row of a layer's weight is multiplied with: entries of an input, or of the patch under a kernel."""
        return self.layers[0].numel // self.layers[0].out_neurons


@dataclass
class _Seen:
    """What one run showed of a layer."""

    given: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    made: int = 0
    outputs: int = 0


class InputsFound:
    """Finds what reads which input, on as few samples as show every layer.

    Args:
        runs: Of the model, no block through.
        layers: The layers to look at, by name.

    Attributes:
        names: The layers that ran.
    """

    def __init__(self, runs: PartRuns, layers: Mapping[str, Layer]) -> None:
        self._blocks = runs.blocks
        longest = max(runs.batches, key=_positions)
        one, two = (take(longest, torch.tensor(rows), count_samples(longest)) for rows in ([0], [0, 0]))
        alone = _seen(PartRuns(runs.adapter, [one]), 0, layers)
        try:
            beside = _seen(PartRuns(runs.adapter, [two]), 0, layers)
        except (RuntimeError, ValueError):  # a model that takes one sample at a time
            beside = {}
        self._found = [(alone, beside)]
        for place in range(len(runs.batches)):  # experts that the first sample does not reach
            missing = {name: layer for name, layer in layers.items() if name not in self.names}
            if missing:
                self._found.append((_seen(runs, place, missing), {}))

    @property
    def names(self) -> frozenset[str]:
        """The layers that ran."""
        return frozenset(name for seen, _ in self._found for name in seen)

    def of(self, layers: Mapping[str, Layer]) -> list[DistinctInput]:
        """Give the distinct inputs of some of the layers, in forward order."""
        found: list[DistinctInput] = []
        for seen, beside in self._found:
            together: dict[tuple, list[str]] = {}
            for name, mine in seen.items():
                if name in layers:
                    tensors = tuple(zip(map(id, mine.given), mine.versions, strict=True))
                    together.setdefault((tensors, way_of_reading(layers[name])), []).append(name)
            reached = 0
            for names in together.values():
                reached = max(reached, self._block_of(names[0]))
                found.append(_input([layers[name] for name in names], seen, beside, reached))
        return sorted(found, key=lambda one: one.block)

    def _block_of(self, name: str) -> int:
        return next((place for place, block in enumerate(self._blocks) if name.startswith(f"{block}.")), 0)


def _positions(batch: object) -> int:
    return max(tensor.numel() // len(tensor) for tensor in input_tensors(batch).values() if tensor.dim())


def _seen(runs: PartRuns, place: int, layers: Mapping[str, Layer]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def look(read: Read) -> None:
        mine = seen.setdefault(read.layer.name, _Seen())
        if read.end == "input":  # kept, so that no other tensor gets its id
            mine.given.append(read.values)
            mine.versions.append(read.values._version)
        else:
            mine.made += 1
            mine.outputs += read.values.numel() * read.values.element_size()

    runs.read(place, runs.taps(layers), look)
    return seen


def _input(layers: list[Layer], seen: Mapping[str, _Seen], beside: Mapping[str, _Seen], block: int) -> DistinctInput:
    name = layers[0].name
    given, doubled = seen[name].given, beside[name].given if name in beside else []
    tables = frozenset(call for call, pair in enumerate(zip(given, doubled, strict=False)) if _alike(*pair))
    ends = {layer.name: seen[layer.name].made for layer in layers} if len(given) == 1 else None
    return DistinctInput(tuple(layers), block, ends, tables, sum(seen[layer.name].outputs for layer in layers))


def _alike(alone: Tensor, doubled: Tensor) -> bool:
    return alone.shape == doubled.shape
