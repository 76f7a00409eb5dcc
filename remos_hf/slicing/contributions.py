"""NNSlicer: how much every weight contributes to what a model says of some samples, and the slice that it makes.

A contribution is a signed whole number. It starts as 1 at the output neurons that are asked about and flows back
through what the model ran, each operation by its rule (`contribution_rules`).
"""

import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.adapters.flow import Flow, Operation
from remos_hf.adapters.flow_recording import flow_of, on_device_of
from remos_hf.errors import CorruptFileError, LayerMismatchError, NonFiniteError
from remos_hf.layers import Layer
from remos_hf.profiling.batches import unpacked
from remos_hf.profiling.reference import Reference
from remos_hf.profiling.sidecar_file import file_in, read_tensors, write_tensors
from remos_hf.slicing.contribution_rules import RULES, Analysis, Keep, TakeWeights
from remos_hf.slicing.contributions_kept import checked_theta, kept_signs

CONTRIBUTIONS_FILE = "remos_contributions.safetensors"
_FORMAT = "remos_hf.contributions.v1"

# Which output neurons are asked about, as `contributions` says.
Outputs = int | Tensor | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Contributions:
    """Contributions of the weights of a model, added up over samples.

    Attributes:
        weights: Signed sums by parameter name, int64, shape of the weight.
        absolute: Sums of |contribution of one sample|, likewise.
        neurons: Signed sums of each layer's output neurons, over samples and positions. Int64, (out,).
        num_samples: Samples that were asked about.
        theta: Share of a relative output that dropped effects may add up to.
        reference: What samples were compared with ("global", "class", "position", "zero").
        each_sample: Of the parameters that were asked for, contributions sample by sample: int32, (samples, *weight).
            They are not saved.
    """

    weights: Mapping[str, Tensor]
    absolute: Mapping[str, Tensor]
    neurons: Mapping[str, Tensor]
    num_samples: int
    theta: float
    reference: str
    each_sample: Mapping[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "Contributions") -> "Contributions":
        """Give the contributions to what is said of both sets of samples."""
        mine, others = ((one.theta, one.reference, len(one.weights), sorted(one.each_sample)) for one in (self, other))
        if mine != others or self.weights.keys() != other.weights.keys():
            raise LayerMismatchError(
                "Contributions add if they are of one model and were taken alike, but these have (theta, reference, "
                f"layers, each_sample) {mine} and {others}."
            )
        sums = [
            {name: one + there[name] for name, one in here.items()}
            for here, there in ((getattr(self, key), getattr(other, key)) for key in _SUMS)
        ]
        each = {name: torch.cat([one, other.each_sample[name]]) for name, one in self.each_sample.items()}
        return Contributions(*sums, self.num_samples + other.num_samples, self.theta, self.reference, each)

    @property
    def share_in_slice(self) -> float:
        """Share of these weights whose contributions do not add up to 0: the paper's slice."""
        return sum(int((one != 0).sum()) for one in self.weights.values()) / sum(
            one.numel() for one in self.weights.values()
        )

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `remos_contributions.safetensors` into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {f"{key}/{name}": one for key in _SUMS for name, one in getattr(self, key).items()}
        told = {"num_samples": self.num_samples, "theta": self.theta, "reference": self.reference}
        return write_tensors(Path(folder) / CONTRIBUTIONS_FILE, tensors, _FORMAT, told)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "Contributions":
        """Read what `save_pretrained` wrote, from its folder or by its own path.

        Raises:
            CorruptFileError: It is no such file.
        """
        path = file_in(path, CONTRIBUTIONS_FILE)
        tensors, told = read_tensors(path, _FORMAT, ("num_samples", "theta", "reference"))
        sums: dict[str, dict[str, Tensor]] = {key: {} for key in _SUMS}
        for name, one in tensors.items():
            key, _, parameter = name.partition("/")
            if key not in sums or one.dtype != torch.int64:
                raise CorruptFileError(f"{path} holds '{name}' of {one.dtype}, which are no contributions.")
            sums[key][parameter] = one
        if not sums["weights"].keys() == sums["absolute"].keys() == sums["neurons"].keys():
            raise CorruptFileError(f"{path} holds sums of unequal layers. It is broken.")
        return cls(*sums.values(), told["num_samples"], told["theta"], told["reference"])


_SUMS = ("weights", "absolute", "neurons")


def contributions(
    model: nn.Module,
    batches: Iterable,
    reference: Reference,
    *,
    outputs: Outputs = None,
    theta: float = 0.2,
    each_sample: Collection[str] = (),
    only: Collection[str] | None = None,
    keep: Keep = kept_signs,
) -> Contributions:
    """Trace what a model says of samples back to its weights.

    Args:
        model: The model, in eval mode, on the device to run on.
        batches: Batches of samples, as in `profile_coverage`; they are put on the model's device.
        reference: What samples are compared with: `profile_reference(model, batches)`, or `Reference()` for zero.
        outputs: The output neurons that are asked about: None for the label that the model predicts (at the last real
            position, if every position has logits), one label for all, labels (samples,), pairs (position, label)
            (samples, 2), or a function that gives them of a batch.
        theta: In [0, 1): of every sum, the most of the smallest effects are dropped that together stay under this share
            of the relative output. 0 keeps all.
        each_sample: Names of parameters whose contributions are wanted sample by sample.
        only: Names of the parameters that are asked about. Tracing stops at the first of them, so that the last layers
            are had at a fraction of the price. None for all.
        keep: Chooses the effects, as `kept_signs` does.

    Raises:
        ValueError: theta is out of range, an output does not exist, the model is in training mode, samples are not of
            its dtype, there is no sample, or the reference is of another model or lacks a class.
        NonFiniteError: A logit that is asked about is NaN or infinite.
        LayerMismatchError: `each_sample` or `only` names a parameter that did not run, or `only` leaves out one of
            `each_sample`.
        UnsupportedModelError: As `flow_of`.

    Source:
        NNSlicer, ESEC/FSE 2020, sections 4.2 to 4.4.
        Differs: dropped is the maximum number of effects, as the paper says and its code does not at ties. A relative
        output is the sum of its effects, so biases and padding play no part. LayerNorm, GELU, gates and attention are
        extensions: what scales a sample and the pattern of attention are frozen.
    """
    theta = checked_theta(theta)
    total = None
    for batch in unpacked(batches):
        batch = on_device_of(model, batch)
        flow = flow_of(model, batch)
        sums = _Sums(flow, each_sample, only)
        start = seeds_of(flow, outputs, batch)
        for operation, contrib in traced(flow, reference, start, theta, sums.take, keep=keep, first=sums.first):
            sums.take_neurons(operation, contrib)
        found = sums.result(theta, reference.kind)
        total = found if total is None else total + found
    if total is None:
        raise ValueError("There is no sample to ask about. Pass batches of the samples that the slice is for.")
    return total


def input_contributions(
    model: nn.Module,
    batch: Any,  # noqa: ANN401 - any batch
    reference: Reference,
    *,
    outputs: Outputs = None,
    theta: float = 0.2,
) -> list[Tensor]:
    """Trace what a model says of a batch back to its inputs: pixels, or what each embedding gave of each token.

    Args:
        model: As in `contributions`, like all that is not named here.
        batch: One batch, on the model's device.
        reference: Likewise.
        outputs: Likewise.
        theta: Likewise.

    Returns:
        Contributions of each input, in the order in which the model reads them. Int32, shape of the input.
    """
    theta = checked_theta(theta)
    flow = flow_of(model, batch)
    left: dict[int, Tensor] = {}
    for _ in traced(flow, reference, seeds_of(flow, outputs, batch), theta, lambda *_: None, left):
        pass
    return [left.get(one, torch.zeros_like(flow.values[one], dtype=torch.int32)) for one in flow.sources]


def _checked_outputs(outputs: Any) -> int | Tensor | None:  # noqa: ANN401 - what a caller asked for
    if outputs is None:
        return None
    if isinstance(outputs, numbers.Integral) and not isinstance(outputs, bool):
        return int(outputs)
    if not isinstance(outputs, Tensor) or outputs.is_floating_point() or outputs.dtype == torch.bool:
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"outputs is a label, a tensor of whole numbers, or a function that gives one, but got {kind}."
        )
    return outputs


def seeds_of(flow: Flow, outputs: Outputs, batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    """Give CONTRIB of the logits: 1 at the output neurons that are asked about. Int32, shape of the logits.

    Raises:
        ValueError: One does not exist, or it is not said which position is asked about.
        NonFiniteError: The logit that is asked about is NaN or infinite.
    """
    logits = flow.logits
    if logits.dim() < 2:
        raise ValueError(
            f"A model is asked about its labels, but its logits have the shape {tuple(logits.shape)}. Give one whose "
            "logits have the shape (samples, labels)."
        )
    outputs = _checked_outputs(outputs(batch) if callable(outputs) else outputs)
    if outputs is None and logits.dim() == 2:
        outputs = logits.argmax(-1)
    elif outputs is None and logits.dim() == 3:
        positions = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
        last = (positions if flow.real is None else positions * flow.real).amax(1)
        outputs = torch.stack([last, logits[torch.arange(len(logits)), last].argmax(-1)], 1)
    wanted = logits.dim() - 1
    if isinstance(outputs, int):
        outputs = torch.full((len(logits),), outputs)
    if outputs is None or outputs.shape != ((len(logits),) if wanted == 1 else (len(logits), wanted)):
        raise ValueError(
            f"The logits have the shape {tuple(logits.shape)}, so outputs names "
            f"{'a label' if wanted == 1 else 'a pair (position, label)'} of each sample, but got "
            f"{'none' if outputs is None else f'the shape {tuple(outputs.shape)}'}."
        )
    places = outputs.reshape(len(logits), wanted).to(logits.device)
    for axis, size in enumerate(logits.shape[1:]):
        wrong = (places[:, axis] < 0) | (places[:, axis] >= size)
        if bool(wrong.any()):
            raise ValueError(
                f"outputs asks for {int(places[wrong][0, axis])}, but the model has {size} "
                f"{'labels' if axis == wanted - 1 else 'positions'}, 0 to {size - 1}."
            )
    made = torch.zeros_like(logits, dtype=torch.int32)
    made[(torch.arange(len(logits), device=logits.device), *places.unbind(1))] = 1
    if not bool(logits[made.bool()].isfinite().all()):
        raise NonFiniteError(
            "A logit that is asked about is NaN or infinite, so nothing can be traced. Check the samples and the "
            "weights, or run the model in float32."
        )
    return made


def traced(
    flow: Flow,
    reference: Reference,
    start: Tensor,
    theta: float,
    take: TakeWeights,
    left: dict[int, Tensor] | None = None,
    *,
    keep: Keep = kept_signs,
    first: int = 0,
) -> Iterable[tuple[Operation, Tensor]]:
    """Go back through the operations, and give each with CONTRIB of what it made.

    Args:
        flow: What ran.
        reference: What it deviates from.
        start: CONTRIB of the logits.
        theta: As in `contributions`.
        take: Is given CONTRIB of the weights, as `TakeWeights` says.
        left: Takes CONTRIB of the inputs, by number.
        keep: Chooses the effects, as `kept_signs` does.
        first: Number of the operation at which it stops.

    Raises:
        ValueError: The reference is of another model, or lacks a class.
    """
    reference.check(flow)
    analysis = Analysis(flow, reference, theta, take, keep)
    contribs = {} if left is None else left
    contribs[flow.output] = start
    with torch.no_grad():
        for operation in reversed(flow.operations[first:]):
            contrib = contribs.pop(operation.output, None)
            if contrib is None or not bool(contrib.any()):
                continue
            yield operation, contrib
            for number, part in RULES[operation.rule](operation, contrib, analysis):
                contribs[number] = contribs[number] + part if number in contribs else part


class _Sums:
    """Adds up contributions of the weights, sample by sample where that is needed."""

    def __init__(self, flow: Flow, each_sample: Collection[str], only: Collection[str] | None) -> None:
        self.flow = flow
        ran = {place: operation.layer for place, operation in enumerate(flow.operations) if operation.layer is not None}
        names = {layer.parameter_name for layer in ran.values()}
        wanted = names if only is None else set(only)
        if not wanted:
            raise LayerMismatchError(f"only names no parameter. Name some of {', '.join(sorted(names))}, or give None.")
        for told, asked, there in (("only", wanted, names), ("each_sample", set(each_sample), wanted)):
            if asked - there:
                raise LayerMismatchError(
                    f"{told} names {sorted(asked - there)}, but what ran on these samples and is asked about is "
                    f"{', '.join(layer.parameter_name for layer in ran.values() if layer.parameter_name in there)}."
                )
        ran = {place: layer for place, layer in ran.items() if layer.parameter_name in wanted}
        layers = list(ran.values())
        self.first = min(ran, default=0)
        self.layers = {layer.parameter_name: layer for layer in layers}
        # What a weight does in several places adds up before its size is taken.
        several = {name for name in self.layers if sum(name == one.parameter_name for one in layers) > 1}
        self.each_sample = each_sample
        self.held = {
            name: torch.zeros(flow.num_samples, *_rows(layer), dtype=torch.int32, device=layer.device)
            for name, layer in self.layers.items()
            if name in several or name in each_sample
        }
        self.weights = {name: self._zeros(layer) for name, layer in self.layers.items()}
        self.absolute = {name: self._zeros(layer) for name, layer in self.layers.items()}
        self.neurons = {name: torch.zeros(layer.out_neurons, dtype=torch.int64) for name, layer in self.layers.items()}

    def _zeros(self, layer: Layer) -> Tensor:
        return torch.zeros(_rows(layer), dtype=torch.int32, device=layer.device)

    def take(self, layer: Layer, start: int, contrib: Tensor) -> None:
        """Take contributions of some samples; int32, (samples, *rows of outputs)."""
        name = layer.parameter_name
        if name not in self.layers:
            return
        if name in self.held:
            self.held[name][start : start + len(contrib)] += contrib
        else:
            self._add(name, contrib)

    def _add(self, name: str, contrib: Tensor) -> None:
        self.weights[name] += contrib.sum(0, dtype=torch.int32)
        self.absolute[name] += contrib.abs().sum(0, dtype=torch.int32)

    def take_neurons(self, operation: Operation, contrib: Tensor) -> None:
        """Take contributions of what an operation made."""
        if operation.layer is not None and operation.layer.parameter_name in self.layers:
            axis = operation.layer.neuron_axis % contrib.dim()
            others = [place for place in range(contrib.dim()) if place != axis]
            self.neurons[operation.layer.parameter_name] += contrib.sum(others, dtype=torch.int64).cpu()

    def result(self, theta: float, reference: str) -> Contributions:
        """Give the sums."""
        for name, contrib in self.held.items():
            self._add(name, contrib)
        each = {
            name: torch.stack([self.layers[name].from_output(one) for one in self.held[name]]).cpu()
            for name in self.each_sample
        }
        sums = [
            {name: self.layers[name].from_output(one).cpu().long() for name, one in found.items()}
            for found in (self.weights, self.absolute)
        ]
        return Contributions(*sums, self.neurons, self.flow.num_samples, theta, reference, each)


def _rows(layer: Layer) -> tuple[int, int, int]:
    columns = layer.numel // layer.out_neurons
    return layer.groups, layer.out_neurons // layer.groups, columns
