"""When a neuron counts as covered by one sample: at the median, or NC, TKNC and SNAC, from per-sample statistics.

No criterion needs the activation itself: its extremes and the mean of each neuron decide, so nothing large is kept.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationStatistics:
    """What activations of equal width looked like, padding left out. Leading axes are free: layers, samples.

    Attributes:
        minimum: Smallest value of each sample over all neurons and positions. Float32, shape (..., samples).
        maximum: Largest value, likewise. Shape (..., samples).
        mean: Mean of each neuron over the positions. Float32, shape (..., samples, neurons).
    """

    minimum: Tensor
    maximum: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Criterion:
    """A rule from statistics to covered neurons; its fields are its parameters, JSON values."""

    def __call__(self, statistics: ActivationStatistics) -> Tensor:
        """Decide which neurons are covered. Bool, shape of the means. A constant tensor covers nothing."""
        # NaN compares false, so an activation that is not finite covers nothing either; the profiler names it.
        spread = statistics.maximum > statistics.minimum
        return self.covered(statistics) & spread[..., None]

    def covered(self, statistics: ActivationStatistics) -> Tensor:
        """Apply the rule to samples whose activation is not constant. Bool, shape of the means."""
        raise NotImplementedError(f"{type(self).__name__} must say what covered means.")

    def to_dict(self) -> dict:
        """Give the rule's name and parameters as JSON values."""
        return {"name": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class MedianCoverage(Criterion):
    """The neuron's mean lies strictly above the median of this sample's means: every sample covers half of a layer."""

    def covered(self, statistics: ActivationStatistics) -> Tensor:
        """Apply the rule. Bool, shape of the means."""
        return statistics.mean > _median(statistics.mean)


def _median(values: Tensor) -> Tensor:
    """Give the lower median of the last axis, kept. NaN need not be told from the largest value."""
    if values.device.type != "cpu":
        return values.median(dim=-1, keepdim=True).values
    place = (values.shape[-1] - 1) // 2  # NumPy finds it up to ten times as fast
    return torch.from_numpy(np.partition(values.numpy(), place, axis=-1)[..., place : place + 1])


@dataclass(frozen=True)
class ThresholdCoverage(Criterion):
    """NC: the activation is scaled to [0, 1] per sample, and the neuron's mean lies strictly above a threshold."""

    threshold: float

    def covered(self, statistics: ActivationStatistics) -> Tensor:
        """Apply the rule. Bool, shape of the means."""
        low = statistics.minimum[..., None]
        return (statistics.mean - low) / (statistics.maximum[..., None] - low) > self.threshold


@dataclass(frozen=True)
class TopKCoverage(Criterion):
    """TKNC: the neuron is among the k with the largest means; among equal means the first neuron goes first."""

    k: int

    def covered(self, statistics: ActivationStatistics) -> Tensor:
        """Apply the rule. Bool, shape of the means."""
        mean = statistics.mean
        first = mean.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(mean, dtype=torch.bool).scatter_(-1, first, True)


@dataclass(frozen=True)
class StrongCoverage(Criterion):
    """SNAC: the neuron's mean is above max - (max - min) / k of this sample's means."""

    k: float

    def covered(self, statistics: ActivationStatistics) -> Tensor:
        """Apply the rule. Bool, shape of the means."""
        low, high = (end[..., None] for end in torch.aminmax(statistics.mean, dim=-1))
        return statistics.mean > high - (high - low) / self.k


def median_coverage() -> MedianCoverage:
    """Coverage at the median, the default: NC whose threshold lies where half of the layer is above it.

    NC compares means with the middle between the two outermost values of a sample. Where a few values are much larger
    than all others, that middle lies above or below nearly all means: no sample covers most neurons, or every sample
    does. At the median every layer has the same share of covered neurons in every sample.

    Source:
        Ours. Differs from the ReMoS artifact's NC in where the threshold lies; measured beside NC, TKNC and SNAC in
        benchmarks/results/criteria.md.
    """
    return MedianCoverage()


def threshold_coverage(threshold: float = 0.5) -> ThresholdCoverage:
    """Neuron coverage (NC) at a threshold on the scaled mean.

    Args:
        threshold: In [0, 1); a neuron is covered strictly above it.

    Raises:
        ValueError: The threshold is outside [0, 1).

    Source:
        ReMoS artifact, coverage/my_neuron_coverage.py:117-249; 0.5 is its my_profile.py:135.
    """
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold is compared with means scaled to [0, 1], so it lies in [0, 1), but got {threshold}."
        )
    return ThresholdCoverage(float(threshold))


def top_k_coverage(k: int = 10) -> TopKCoverage:
    """Top-k neuron coverage (TKNC).

    Args:
        k: Covered neurons a sample and layer.

    Raises:
        ValueError: k is below 1.

    Source:
        ReMoS artifact, coverage/top_k_coverage.py:140-185.
    """
    if k < 1:
        raise ValueError(f"k is the number of covered neurons in each layer, at least 1, but got {k}.")
    return TopKCoverage(int(k))


def strong_coverage(k: float = 2) -> StrongCoverage:
    """Strong neuron activation coverage (SNAC), bounded by the sample itself.

    Args:
        k: The upper 1/k of the range of means is covered.

    Raises:
        ValueError: k is below 1.

    Source:
        ReMoS artifact, coverage/strong_neuron_activation_coverage.py:22-69.
    """
    if k < 1:
        raise ValueError(f"k divides the range of a sample's means, so it is at least 1, but got {k}.")
    return StrongCoverage(float(k))
