"""What the values of a flow are on average: the reference from which a sample's own values deviate."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.flow import Flow
from remos_hf.adapters.flow_layouts import factors_of
from remos_hf.adapters.flow_recording import recording
from remos_hf.errors import NonFiniteError, RemosError, UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.data_pass import observe
from remos_hf.profiling.observers import Observer

ReferenceKind = Literal["global", "class", "position"]

# A value is held as whole numbers of these, which add exactly over batches and processes: to 1e-17, up to 1e15, for
# 2**27 samples.
_UNITS = (2.0**16, 2.0**-20, 2.0**-56)
_LARGEST = 2.0**51
# Rules that look at how what is read deviates from its mean.
_DEVIATES = frozenset({"weighted", "add", "multiply", "curve", "total", "average_pool", "mixed", "attention"})


def deviating(flow: Flow) -> list[int]:
    """Give the numbers of the values whose mean is needed: what moves values about only moves their means about."""
    wanted = [one for operation in flow.operations if operation.rule in _DEVIATES for one in operation.inputs]
    found = set()
    while wanted:
        number = wanted.pop()
        if number in flow.places:
            found.add(number)
        else:
            wanted += flow.made_by[number].inputs
    return sorted(found)


@dataclass(frozen=True)
class Reference:
    """Mean values of a flow; `Reference()` is zero everywhere.

    Attributes:
        kind: "global": one mean a neuron, over samples and real positions. "class": likewise, over the samples of which
            the model predicts the same class. "position": one mean a neuron and position, over the samples that are
            real there; 0 where none is. "zero".
        names: The operations of the flow that it was taken of.
        means: By place of a value among those that are computed, float32. Shape (rows, entries): one row, or one a
            class and behind them that of all classes.
        num_samples: Samples that it is the mean of.
    """

    kind: Literal["global", "class", "position", "zero"] = "zero"
    names: tuple[str, ...] = ()
    means: Mapping[int, Tensor] = field(default_factory=dict)
    num_samples: int = 0

    def of(self, flow: Flow, number: int) -> Tensor:
        """Give the reference of a value, float32, of the value's shape.

        Raises:
            ValueError: It was taken of another model, of other positions, or of no sample of a predicted class.
        """
        value = flow.values[number]
        if self.kind == "zero":
            return torch.zeros_like(value, dtype=torch.float32)
        self.check(flow)
        if number not in flow.places:
            moving = flow.made_by[number]
            return moving.run({one: self.of(flow, one) for one in moving.inputs}).float()
        factors = factors_of(flow.layouts[number])
        rows = self.means[flow.places[number]].to(value.device)
        per_sample = factors[:1] == [("n", flow.num_samples)]
        if self.kind == "class":
            rows = rows[flow.logits.argmax(-1)] if per_sample or flow.num_samples == 1 else rows[-1:]
        factors = factors[1:] if per_sample else factors
        kept = [size for role, size in factors if role == "f" or self.kind == "position"]
        if math.prod(kept) != rows.shape[1]:
            raise ValueError(
                f"The reference holds {rows.shape[1]} means where the batch has {math.prod(kept)}: a reference by "
                "position needs batches of one size. Take kind='global'."
            )
        sizes = [size if role == "f" or self.kind == "position" else 1 for role, size in factors]
        rows = rows.view(([len(rows)] if per_sample else []) + sizes)
        return rows.expand([size for _, size in factors_of(flow.layouts[number])]).reshape(value.shape)

    def check(self, flow: Flow) -> None:
        """Refuse the flow of another model, or one that predicts a class without a mean."""
        if self.kind == "zero":
            return
        if self.names != flow.names:
            raise ValueError(
                "The reference was taken of a model that runs other operations. Take it of this one: "
                "profile_reference(model, batches)."
            )
        if self.kind == "class":
            empty = ~next(iter(self.means.values())).isfinite().all(1)
            missing = sorted(set(flow.logits.argmax(-1)[empty.to(flow.logits.device)[flow.logits.argmax(-1)]].tolist()))
            if missing:
                raise ValueError(
                    f"The model predicts class {missing[0]} here, and did so for no sample of the reference. Give "
                    "it more samples, or take kind='global'."
                )


def profile_reference(
    model: nn.Module,
    batches: Iterable,
    *,
    kind: ReferenceKind = "global",
    max_samples: int | Literal["all"] | None = None,
    across_processes: bool = False,
    progress: bool = False,
) -> Reference:
    """Take the mean of what flows through a model, in one pass over the data.

    For a reference of your own, such as a blank image, give batches of that.

    Args:
        model: The model, on the device to run on; it runs in eval mode.
        batches: As in `profile_coverage`, like all that is not named here. Padding never counts.
        kind: "global", "class" (the model's own prediction) or "position".
        max_samples: Likewise.
        across_processes: Likewise.
        progress: Likewise.

    Raises:
        ValueError: The kind is none of these, or there is no sample.
        NonFiniteError: A value is NaN or infinite at a real position.
        RemosError: A value is beyond 2e15.
        UnsupportedModelError: As `flow_of`.
    """
    means = FlowMeans(kind)
    observe(
        model,
        batches,
        [means],
        head=(),
        max_samples=max_samples,
        across_processes=across_processes,
        progress=progress,
    )
    return means.reference()


class FlowMeans(Observer):
    """Adds up the values of a flow, neuron by neuron, in exact whole numbers.

    Args:
        kind: As in `profile_reference`.
    """

    def __init__(self, kind: ReferenceKind = "global") -> None:
        if kind not in ("global", "class", "position"):
            raise ValueError(f"kind is 'global', 'class' or 'position', but got {kind!r}.")
        self.kind = kind
        # By value: int64 (rows, units, entries); behind the units is how many values an entry is of.
        self._sums: dict[str, Tensor] = {}
        self._names: tuple[str, ...] = ()
        self.drop_batch()

    def wants(self, layer: Layer, end: str) -> bool:
        """Look at no layer for itself."""
        return False

    @contextmanager
    def around(self, adapter: Adapter, batch: Any) -> Iterator[None]:  # noqa: ANN401 - any batch
        """Note the flow while the batch runs."""
        with recording(adapter, batch) as recorder:
            yield
        flow = recorder.flow()
        if self._names and self._names != flow.names:
            raise UnsupportedModelError("The model runs other operations on some batches than on others.")
        self._names = flow.names
        classes = _classes(flow) if self.kind == "class" else None
        for number in deviating(flow):
            added = []
            for part in _whole_numbers(*_values(flow, number, by_position=self.kind == "position")):
                if classes is None:
                    added.append(part.sum(0, keepdim=True))
                else:
                    added.append(part.new_zeros(flow.logits.shape[-1], part.shape[1]).index_add_(0, classes, part))
            self._seen[str(flow.places[number])] = torch.stack(added, 1).cpu()
        self._seen["samples"] = torch.tensor([[[flow.num_samples]]])

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._seen: dict[str, Tensor] = {}

    def close_batch(self) -> None:
        """Add up the batch."""
        for name, sums in self._seen.items():
            known = self._sums.get(name)
            if known is not None and known.shape != sums.shape:
                raise ValueError(
                    f"A reference by position needs batches of one size, but got {known.shape[2]} and "
                    f"{sums.shape[2]} values of one kind. Take kind='global'."
                )
            self._sums[name] = sums if known is None else known + sums
        self.drop_batch()

    def state(self) -> dict[str, Tensor]:
        """Give the sums by value."""
        return self._sums

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of all processes."""
        self._sums = dict(state)

    def reference(self) -> Reference:
        """Give the means."""
        means = {}
        units = torch.tensor(_UNITS, dtype=torch.float64)[:, None]
        for name, sums in self._sums.items():
            if name != "samples":
                rows = torch.cat([sums, sums.sum(0, keepdim=True)]) if self.kind == "class" else sums
                found, counts = (rows[:, :-1].double() * units).sum(1), rows[:, -1]
                if self.kind == "position":  # where no sample is real
                    counts = counts.clamp(min=1)
                means[int(name)] = (found / counts).float()
        return Reference(self.kind, self._names, means, int(self._sums["samples"]) if self._sums else 0)


def _classes(flow: Flow) -> Tensor:
    if flow.logits.dim() != 2:
        raise UnsupportedModelError(
            f"A reference by class needs logits of shape (samples, classes), but they are {tuple(flow.logits.shape)}."
        )
    return flow.logits.argmax(-1)


def _values(flow: Flow, number: int, *, by_position: bool) -> tuple[Tensor, Tensor]:
    """Add up a value over the positions of each sample, or leave them apart.

    Returns:
        Float64, (samples, entries), and how many values each is the sum of, int64, of its shape or (samples, 1).
    """
    factors = factors_of(flow.layouts[number])
    value = flow.values[number].detach().reshape([size for _, size in factors])
    if factors[:1] != [("n", flow.num_samples)]:
        factors = [("n", flow.num_samples), *factors]
        value = value[None].expand([size for _, size in factors])
    if ("n", flow.num_samples) in factors[1:] and flow.num_samples > 1:
        raise UnsupportedModelError("Samples do not lie on the first axis of what flows, so they cannot be told apart.")
    places = [place for place, (role, _) in enumerate(factors) if role == "p"]
    counts = torch.ones(flow.num_samples, *(1 for _ in factors[1:]), dtype=torch.int64, device=value.device)
    if flow.real is not None and places:
        if len(places) > 1 or factors[places[0]][1] != flow.real.shape[-1]:
            raise UnsupportedModelError("Padding cannot be found in a value of the flow. Give batches without padding.")
        real = flow.real.view([size if place in (0, places[0]) else 1 for place, (_, size) in enumerate(factors)])
        value, counts = torch.where(real, value, 0), real.long()
    if by_position:
        counts = counts.expand(value.shape)
    elif places:
        counts = counts.expand([size if role == "p" or not place else 1 for place, (role, size) in enumerate(factors)])
        value, counts = value.sum(places, dtype=torch.float64), counts.sum(places)
    values = value.reshape(flow.num_samples, -1).double()
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            "The model computes NaN or infinity on this data. Check the data, or run the model in float32."
        )
    if len(values) and values.shape[1] and float(values.abs().max()) > _LARGEST:
        raise RemosError(
            f"The model computes {float(values.abs().max()):.3g} on this data, and means are taken of values up to "
            f"{_LARGEST:.3g}. Scale its inputs down."
        )
    return values, counts.reshape(flow.num_samples, -1)


def _whole_numbers(values: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Give values, shape (samples, entries), as whole numbers of each unit, and how many they are of: int64."""
    for unit in _UNITS:
        number = (values / unit).round()
        values = values - number * unit
        yield number.long()
    yield counts.expand(values.shape)
