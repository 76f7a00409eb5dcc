"""The slice of one input: how much flows through each layer to what the model says of it, and where it came from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.adapters.flow import Flow
from remos_hf.adapters.flow_recording import flow_of, on_device_of
from remos_hf.errors import CorruptFileError
from remos_hf.layers import Layer
from remos_hf.profiling.reference import Reference
from remos_hf.slicing.contribution_rules import Analysis, relative_output
from remos_hf.slicing.contributions import Outputs, seeds_of, traced
from remos_hf.slicing.contributions_kept import checked_theta
from remos_hf.whole import replace_file

_FORMAT = "remos_hf.explanation.v1"


@dataclass(frozen=True)
class NeuronFlow:
    """What flows through one output neuron of a layer, over its positions.

    Attributes:
        neuron: Its number.
        positive: Sum of the contributions above 0.
        negative: Sum of those below 0, at most 0.
    """

    neuron: int
    positive: int
    negative: int


@dataclass(frozen=True)
class LayerFlow:
    """What flows through one layer.

    Attributes:
        name: Of its weight.
        positive: Sum of the contributions above 0 of its output neurons, over positions.
        negative: Sum of those below 0, at most 0.
        neurons: Output neurons.
        reached: Those with a contribution.
        weights: Weights.
        in_slice: Those with a contribution.
        strongest: The output neurons through which most flows, of either sign, the first first.
    """

    name: str
    positive: int
    negative: int
    neurons: int
    reached: int
    weights: int
    in_slice: int
    strongest: tuple[NeuronFlow, ...]


@dataclass(frozen=True)
class Explanation:
    """The slice of one input.

    Attributes:
        label: The output neuron that was asked about.
        logits: Of all labels, at the position that was asked about.
        relative_logit: How far that label's logit lies from what the head makes of the reference. A positive
            contribution helped the logit to go where it went, up or down. None where no weighted sum makes the logits.
        layers: In the order in which they run.
        inputs: Contributions of what the model was given, by the batch's key or the embedding's parameter, summed over
            channels or features. Int64, shape (positions,) of texts, (height, width) of images.
        theta: Share of a relative output that dropped effects may add up to.
        reference: What the input was compared with ("global", "class", "position", "zero").
        reference_samples: Samples that the reference is the mean of.
        position: Where the logits stand, if every position has some.
        labels: Names of the labels, by number; numbers if they have none.
    """

    label: int
    logits: tuple[float, ...]
    relative_logit: float | None
    layers: tuple[LayerFlow, ...]
    inputs: Mapping[str, Tensor]
    theta: float
    reference: str
    reference_samples: int
    position: int | None = None
    labels: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values."""
        rest = {key: value for key, value in vars(self).items() if key not in ("layers", "inputs")}
        layers = [asdict(one) for one in self.layers]
        inputs = {name: one.tolist() for name, one in self.inputs.items()}
        return json.loads(json.dumps({"format": _FORMAT, **rest, "layers": layers, "inputs": inputs}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Explanation":
        """Read what `to_dict` gave.

        Raises:
            ValueError: It is of another format.
            KeyError: A value is missing.
            TypeError: One is of another kind.
        """
        if values["format"] != _FORMAT:
            raise ValueError(f"it has the format {values['format']!r}, and {_FORMAT!r} is read. Update remos_hf.")
        layers = [
            LayerFlow(**{**one, "strongest": tuple(NeuronFlow(**neuron) for neuron in one["strongest"])})
            for one in values["layers"]
        ]
        inputs = {name: torch.tensor(one, dtype=torch.int64) for name, one in values["inputs"].items()}
        rest = {key: value for key, value in values.items() if key not in ("format", "layers", "inputs")}
        rest |= {"logits": tuple(values["logits"]), "labels": tuple(values["labels"])}
        return cls(layers=tuple(layers), inputs=inputs, **rest)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the explanation as JSON, beside its place and renamed."""
        path = Path(path)
        replace_file(path, f"{json.dumps(self.to_dict())}\n".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Explanation":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: The file is no explanation.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path} is no explanation: {error!r}. Explain the input again.") from error


def explain(
    model: nn.Module,
    batch: Any,  # noqa: ANN401 - any batch
    reference: Reference,
    *,
    outputs: Outputs = None,
    theta: float = 0.2,
    strongest: int = 5,
    labels: Sequence[str] = (),
) -> Explanation:
    """Trace what a model says of one input back through its layers, to the input itself.

    Args:
        model: As in `contributions`, like all that is not named here.
        batch: One sample, as a batch of one.
        reference: What it is compared with: `profile_reference(model, batches)` of ordinary samples, or `Reference()`
            for zero, against which what all inputs have in common counts too.
        outputs: Likewise; None for the label that the model predicts.
        theta: Likewise.
        strongest: Neurons of each layer that are told one by one.
        labels: Names of the labels, by number.

    Raises:
        ValueError: The batch is not one sample; or as `contributions`.
        UnsupportedModelError: As `contributions`.

    Source:
        NNSlicer, ESEC/FSE 2020, sections 4.2 to 4.4, of one sample.
    """
    theta = checked_theta(theta)
    if isinstance(strongest, bool) or not isinstance(strongest, int) or strongest < 0:
        raise ValueError(f"strongest is a number of neurons, 0 or more, but got {strongest!r}.")
    flow = flow_of(model, on_device_of(model, batch))
    if flow.num_samples != 1:
        raise ValueError(
            f"One input is explained at a time, but the batch holds {flow.num_samples}. Give a batch of 1."
        )
    start = seeds_of(flow, outputs, batch)
    weights: dict[str, Tensor] = {}
    neurons: dict[str, Tensor] = {}
    left: dict[int, Tensor] = {}

    def take(layer: Layer, first: int, contrib: Tensor) -> None:
        weights[layer.parameter_name] = weights.get(layer.parameter_name, 0) + contrib[0]

    for operation, contrib in traced(flow, reference, start, theta, take, left):
        if operation.layer is not None:
            name, found = operation.layer.parameter_name, _by_neuron(contrib, operation.layer)
            neurons[name] = neurons.get(name, 0) + found
    layers = {one.layer.parameter_name: one.layer for one in flow.operations if one.layer is not None}
    _, *place = start.nonzero()[0].tolist()
    return Explanation(
        label=place[-1],
        logits=tuple(flow.logits[(0, *place[:-1])].float().tolist()),
        relative_logit=_relative_logit(flow, reference, start),
        layers=tuple(_layer_flow(one, neurons.get(name), weights.get(name), strongest) for name, one in layers.items()),
        inputs=_inputs(flow, left),
        theta=theta,
        reference=reference.kind,
        reference_samples=reference.num_samples,
        position=place[0] if len(place) == 2 else None,
        labels=tuple(map(str, labels)),
    )


def _by_neuron(contrib: Tensor, layer: Layer) -> Tensor:
    """Add up what is above and what is below 0 over positions. Int64, (2, neurons)."""
    rows = contrib.movedim(layer.neuron_axis, -1).reshape(-1, layer.out_neurons)
    return torch.stack([rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)]).cpu()


def _layer_flow(layer: Layer, neurons: Tensor | None, weights: Tensor | None, strongest: int) -> LayerFlow:
    sums = torch.zeros(2, layer.out_neurons, dtype=torch.int64) if neurons is None else neurons
    strength = sums[0] - sums[1]
    first = [int(one) for one in strength.argsort(descending=True, stable=True)[:strongest] if strength[one]]
    return LayerFlow(
        name=layer.parameter_name,
        positive=int(sums[0].sum()),
        negative=int(sums[1].sum()),
        neurons=layer.out_neurons,
        reached=int(strength.count_nonzero()),
        weights=layer.numel,
        in_slice=0 if weights is None else int(weights.count_nonzero()),
        strongest=tuple(NeuronFlow(one, int(sums[0, one]), int(sums[1, one])) for one in first),
    )


def _inputs(flow: Flow, left: Mapping[int, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for one in flow.sources:
        name = flow.source_names[one]
        while name in made:  # an encoder's and a decoder's tokens are embedded by one parameter
            name = f"{name}, read again"
        made[name] = _summed(flow, one, left.get(one))
    return made


def _summed(flow: Flow, number: int, contrib: Tensor | None) -> Tensor:
    """Add up an input's contributions over its features; where it has no positions they stay apart."""
    found = torch.zeros_like(flow.values[number], dtype=torch.int64) if contrib is None else contrib.long()
    axes = [place for place, entry in enumerate(flow.layouts[number]) if any(role == "f" for role, _ in entry)]
    has_positions = found.dim() - len(axes) > 1 or len(found) > 1  # beside the one axis of samples, where there is one
    summed = found.sum(axes) if axes and has_positions else found
    return (summed[0] if summed.dim() > 1 and len(summed) == 1 else summed).cpu()


def _relative_logit(flow: Flow, reference: Reference, start: Tensor) -> float | None:
    """Follow the logits back to the weighted sum that made them, and give what it deviates by."""
    moving, number = [], flow.output
    while (made := flow.made_by.get(number)) and made.rule == "moved" and len(set(made.inputs)) == 1:
        moving.append(made)
        number = made.inputs[0]
    if made is None or made.rule != "weighted":
        return None
    analysis = Analysis(flow, reference, 0.0, lambda *_: None)
    with torch.no_grad():
        found = relative_output(made, analysis)
        for one in reversed(moving):
            found = one.run({one.inputs[0]: found})
    return float(found[start.bool()][0])
