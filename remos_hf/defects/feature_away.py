"""Feature-away adversarial images: the public teacher's last feature is driven as far as it goes from the clean one.

No neuron and no label is aimed at, so they tell how far students share the teacher's blind spots in general.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import AdversarialImages, Search
from remos_hf.defects.feature_attack import FeatureReader, drawn_start, feature_layer


@dataclass(frozen=True)
class FeatureAway(AdversarialImages):
    """Images whose penultimate feature f on the teacher lies far from that of the clean image, f_0.

    Each image climbs |f - f_0|^2, from a random point of the budget: at the clean image the gradient is 0.

    Attributes:
        layer: Dotted name of the module whose input is the feature, shape (samples, features); None for the one before
            the teacher's head, as its adapter names it.

    Source:
        Naseer et al. 2018, "Task-generalizable Adversarial Attack based on Perceptual Metric" (feature distortion).
        Differs: the penultimate feature alone, and each image climbs by itself.
    """

    citation: ClassVar[str] = (
        "@article{naseer2018distortion, title={Task-generalizable Adversarial Attack based on Perceptual Metric}, "
        "author={Naseer, Muzammal and Khan, Salman H. and Rahman, Shafin and Porikli, Fatih}, "
        "journal={arXiv:1811.09020}, year={2018}}"
    )

    layer: str | None = None

    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> "AwaySearch":
        """Start the search of one batch.

        Raises:
            ValueError: The teacher has no module of the name `layer`.
            UnsupportedModelError: `layer` is None, and the teacher does not tell its head.
        """
        return AwaySearch(FeatureReader(self.layer, teacher, images))

    def described(self, teacher: nn.Module) -> dict[str, Any]:
        """Give the layer whose input is the feature."""
        return {"layer": feature_layer(teacher, self.layer)[0]}

    def start(self, pixels: Tensor, eps: Tensor, keys: Sequence[str]) -> Tensor:
        """Give a point of the budget, drawn by the seed and each image's key alone."""
        return drawn_start(self.seed, pixels, eps, keys)


class AwaySearch(Search):
    """Climbs one batch's objective.

    Args:
        read: Gives the feature of pixels.
    """

    def __init__(self, read: FeatureReader) -> None:
        self.read = read
        self._clean = self._last = torch.empty(0)

    def begin(self, clean: Tensor) -> None:
        """Read the features of the clean images."""
        with torch.no_grad():
            self._clean = self.read(clean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Give the squared distance of each image's feature, shape (samples,)."""
        distance = (self.read(pixels) - self._clean).square().sum(1)
        self._last = distance.detach()
        return distance

    def measured(self) -> dict[str, Tensor]:
        """Give the distance before the last step over the length of the clean feature."""
        return {"distance_last": self._last.sqrt() / self._clean.norm(dim=1).clamp(min=1e-12)}
