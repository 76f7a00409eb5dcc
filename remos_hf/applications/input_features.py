"""What a detector looks at of each input: slices of the last layers, or what slices have to be better than."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from remos_hf.adapters.flow import Flow
from remos_hf.adapters.flow_recording import flow_of, on_device_of
from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.profiling.batches import unpacked
from remos_hf.profiling.reference import Reference
from remos_hf.slicing.contributions import contributions
from remos_hf.slicing.effective_path import effective_path

FeatureKind = Literal["slice", "effective_path", "feature_map", "logits"]


@dataclass(frozen=True)
class Observed:
    """What was seen of some inputs.

    Attributes:
        features: Shape (samples, features); of slices and paths whole numbers of 8 or 16 bits, of the others float32.
        predicted: The label that the model gives each, shape (samples,).
    """

    features: np.ndarray
    predicted: np.ndarray

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.predicted)

    def __getitem__(self, rows: np.ndarray | slice) -> "Observed":
        """Give some of the samples."""
        return Observed(self.features[rows], self.predicted[rows])

    def __add__(self, other: "Observed") -> "Observed":
        """Give the samples of both, these first."""
        return Observed(
            np.concatenate([self.features, other.features]), np.concatenate([self.predicted, other.predicted])
        )


@dataclass(frozen=True)
class InputFeatures:
    """What is looked at of inputs. What the model predicts of each is asked about.

    Attributes:
        kind: "slice": contributions of single samples to each weight (NNSlicer). "effective_path": how often each
            weight lies on the path of the largest positive effects. "feature_map": what the layers give, value by
            value. "logits": what the model gives.
        layers: Names of the weights of the layers that are looked at, such as `last_layers` gives; none for logits.
        reference: What samples are compared with, of `profile_reference`; for slices alone. With kind="class" each
            sample is compared with the mean of the class that the model predicts for it, so an image of another class
            deviates whatever was done to it. With kind="global" all are compared with the same.
        theta: As in `contributions` or `effective_path`; None for what was published, 0.2 and 0.5.

    Source:
        NNSlicer, ESEC/FSE 2020, section 6.1: all weights of the last convolution.
    """

    kind: FeatureKind = "slice"
    layers: tuple[str, ...] = ()
    reference: Reference | None = None
    theta: float | None = None

    def __post_init__(self) -> None:
        """Refuse what looks at nothing."""
        if self.kind not in ("slice", "effective_path", "feature_map", "logits"):
            raise ValueError(f"kind is 'slice', 'effective_path', 'feature_map' or 'logits', but got {self.kind!r}.")
        if bool(self.layers) == (self.kind == "logits"):
            told = "no layers, but got some" if self.layers else "layers: take last_layers(model, batch)"
            raise ValueError(f"Features of kind {self.kind!r} want {told}.")
        if (self.reference is None) == (self.kind == "slice"):
            told = "a reference: profile_reference(model, batches)" if self.kind == "slice" else "no reference"
            raise ValueError(f"Features of kind {self.kind!r} want {told}.")

    def of(self, model: nn.Module, batches: Iterable) -> Observed:
        """Look at inputs.

        Args:
            model: A classifier in eval mode, on the device to run on.
            batches: As in `contributions`.

        Raises:
            ValueError: There is no sample, or as `contributions` says.
            LayerMismatchError: A layer did not run on these inputs.
            NonFiniteError: The model computes NaN or infinity on them.
            UnsupportedModelError: The model gives a label to every position, or as `flow_of` says.
        """
        found = [self._of_batch(model, on_device_of(model, batch)) for batch in unpacked(batches)]
        if not found:
            raise ValueError("There is no input to look at. Pass batches of samples.")
        parts = zip(*((one.features, one.predicted) for one in found), strict=True)
        return Observed(*(np.concatenate(part) for part in parts))

    def _of_batch(self, model: nn.Module, batch: Any) -> Observed:  # noqa: ANN401 - any batch
        flow = flow_of(model, batch)
        if flow.logits.dim() != 2:
            raise UnsupportedModelError(
                f"A detector wants one label of each sample, but the logits are {tuple(flow.logits.shape)}."
            )
        predicted = flow.logits.argmax(1)
        if self.kind in ("slice", "effective_path"):
            features = np.concatenate([_small(one.flatten(1)) for one in self._traced(model, batch, predicted)], 1)
        elif self.kind == "feature_map":
            made = self._made(flow)
            features = _finite(torch.cat([made[name].flatten(1) for name in self.layers], 1))
        else:
            features = _finite(flow.logits)
        return Observed(features, predicted.cpu().numpy())

    def _traced(self, model: nn.Module, batch: Any, predicted: Tensor) -> list[Tensor]:  # noqa: ANN401 - any batch
        asked: dict[str, Any] = {"outputs": predicted, "each_sample": self.layers, "only": self.layers}
        if self.theta is not None:
            asked["theta"] = self.theta
        if self.kind == "slice":
            each = contributions(model, [batch], self.reference, **asked).each_sample
        else:
            each = effective_path(model, [batch], **asked).each_sample
        return [each[name] for name in self.layers]

    def _made(self, flow: Flow) -> dict[str, Tensor]:
        made = {one.layer.parameter_name: flow.values[one.output] for one in flow.operations if one.layer is not None}
        unknown = [name for name in self.layers if name not in made]
        if unknown:
            raise LayerMismatchError(
                f"layers names {unknown[0]!r}, but what ran on these samples is {', '.join(made)}."
            )
        return made


def last_layers(model: nn.Module, batch: Any, count: int = 1) -> tuple[str, ...]:  # noqa: ANN401 - any batch
    """Name the weights of the last layers that a batch runs through, but the one that makes the logits.

    Of that one only the row of the predicted label contributes, so a slice of it tells the label and nothing else.

    Args:
        model: The model, in eval mode.
        batch: A batch on the model's device.
        count: How many.

    Returns:
        Names of parameters, the last first.

    Raises:
        ValueError: There are not as many.
    """
    ran = dict.fromkeys(one.layer.parameter_name for one in flow_of(model, batch).operations if one.layer is not None)
    names = list(ran)[-2::-1]
    if not 1 <= count <= len(names):
        raise ValueError(f"Before the layer that makes the logits run {len(names)} layers, but {count} are asked for.")
    return tuple(names[:count])


def _finite(values: Tensor) -> np.ndarray:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            "The model computes NaN or infinity on these inputs, so nothing can be told by them. Check the inputs, or "
            "run the model in float32."
        )
    return values.float().cpu().numpy()


def _small(counts: Tensor) -> np.ndarray:
    """Give whole numbers in 8 or 16 bits; none is larger than a layer's positions are many."""
    found = counts.numpy()
    largest = np.abs(found).max(initial=0)
    if largest > np.iinfo(np.int16).max:
        raise UnsupportedModelError("A contribution is above 32,767, more than a detector can hold. Take later layers.")
    return found.astype(np.int8 if largest <= np.iinfo(np.int8).max else np.int16)
