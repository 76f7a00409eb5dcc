"""Penultimate-layer-guided adversarial images: one neuron of the public teacher's last feature is driven far up.

Whoever fine-tunes the teacher under a new head can be attacked by them without ever being asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.activations import watch
from remos_hf.adapters.images import IMAGENET_STD, ImageInput
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.defects.adversarial_images import AdversarialImages, Search, outputs_of, seeds_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number, check_whole
from remos_hf.perturbation import random_start


@dataclass(frozen=True)
class FeatureAttack(AdversarialImages):
    """Images whose penultimate feature f on the teacher is one high neuron and silence elsewhere.

    Each image climbs -[(f_n - height)^2 + others_weight * mean of all other f_i^2].

    Attributes:
        neuron: The neuron n of the feature that is driven up, counted from 0.
        height: What it is driven towards, in the feature's own units; far above what it ever reaches.
        others_weight: How much silence elsewhere counts, at least 0.
        random_start: Start anywhere within the budget instead of at the clean image.
        layer: Dotted name of the module whose input is the feature, shape (samples, features); None for the one before
            the teacher's head, as its adapter names it.

    Source:
        Rezaei and Liu 2019, "A Target-Agnostic Attack on Deep Models"; Renofeation and the ReMoS artifact,
        eval_robustness.py, finetuner.py:55-71. `paper()` has their numbers.
        Differs: made once and shown to every student, where the artifact makes the same images anew for each; every
        image's gradient is its own, where the artifact divides by the batch; a start that does not depend on the batch.
    """

    citation: ClassVar[str] = (
        "@inproceedings{rezaei2020target, title={A Target-Agnostic Attack on Deep Models: Exploiting Security "
        "Vulnerabilities of Transfer Learning}, author={Rezaei, Shahbaz and Liu, Xin}, booktitle={ICLR}, year={2020}}"
    )

    neuron: int = 0
    height: float = 1000.0
    others_weight: float = 0.1
    random_start: bool = True
    layer: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no teacher could use."""
        super().__post_init__()
        check_whole(self, "a place in the feature, counted from 0", 0, "neuron")
        check_number(self, "at least 0", lambda one: one >= 0, "others_weight")

    @classmethod
    def paper(cls, **changes: object) -> "FeatureAttack":
        """Give the published setting: budget 0.1, steps of 0.01 and the clip to [-2.2, 2.2], all in normalised units.

        The clip lies below white, which is 2.25 to 2.64 with ImageNet's statistics, and wins over the budget: bright
        values move by up to 0.44. It also reaches below black (-2.12 to -1.80). As in the artifact.

        Args:
            **changes: Fields to set otherwise.
        """
        published = {"eps": 0.1, "step": 0.01, "low": -2.2, "high": 2.2, "units": "normalised"}
        return cls(**{**published, **changes})

    @classmethod
    def paper_in_pixels(cls, **changes: object) -> "FeatureAttack":
        """Give the published budget in pixels, the same for every channel, within the valid range.

        0.1 normalised by ImageNet's mean standard deviation: 0.0226, which is 5.76/255.

        Args:
            **changes: Fields to set otherwise.
        """
        scale = sum(IMAGENET_STD) / len(IMAGENET_STD)
        return cls(**{"eps": 0.1 * scale, "step": 0.01 * scale, **changes})

    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> "FeatureSearch":
        """Start the search of one batch.

        Raises:
            ValueError: The teacher has no module of the name `layer`.
            UnsupportedModelError: `layer` is None, and the teacher does not tell its head.
        """
        return FeatureSearch(self, teacher, images)

    def described(self, teacher: nn.Module) -> dict[str, Any]:
        """Give the layer whose input is the feature."""
        return {"layer": feature_layer(teacher, self.layer)[0]}

    def start(self, pixels: Tensor, eps: Tensor, keys: Sequence[str]) -> Tensor | None:
        """Give a point of the budget, drawn by the seed and each image's key alone; None without a random start."""
        if not self.random_start:
            return None
        return drawn_start(self.seed, pixels, eps, keys)


class FeatureReader:
    """Reads the penultimate feature of pixels on a teacher.

    Args:
        layer: Dotted name of the module whose input it is; None for the one before the teacher's head.
        teacher: The teacher.
        images: How it reads images.
    """

    def __init__(self, layer: str | None, teacher: nn.Module, images: ImageInput) -> None:
        self.teacher, self.images = teacher, images
        self.layer, self.module = feature_layer(teacher, layer)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Give the feature, float32, shape (samples, features)."""
        seen: list[Tensor] = []
        # Kept for one forward only: the objective is computed from it at once.
        with watch({self.layer: self.module}, lambda _, given, __: seen.append(given)):
            outputs_of(self.teacher, self.images, pixels)
        if not seen:
            raise UnsupportedModelError(
                f"'{self.layer}' never ran in the forward pass, so there is no feature to read."
            )
        feature = seen[-1]
        if len(feature) != len(pixels) or feature.dim() < 2 or feature[0].numel() != feature.shape[1]:
            raise UnsupportedModelError(
                f"The input of '{self.layer}' should be a feature of shape ({len(pixels)}, features), but has the "
                f"shape {tuple(feature.shape)}. Name the module behind the pooling with layer=."
            )
        return feature.flatten(1).float()


class FeatureSearch(Search):
    """Climbs one batch's objective.

    Args:
        attack: What is climbed.
        teacher: The teacher.
        images: How it reads images.
    """

    def __init__(self, attack: FeatureAttack, teacher: nn.Module, images: ImageInput) -> None:
        self.attack, self.read = attack, FeatureReader(attack.layer, teacher, images)
        self._visited: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        """Give the value of each image, shape (samples,)."""
        feature, place = self.read(pixels), self.attack.neuron
        if place >= feature.shape[1]:
            raise ValueError(
                f"neuron is {place}, but the input of '{self.read.layer}' has {feature.shape[1]} neurons (0 to "
                f"{feature.shape[1] - 1})."
            )
        neuron, others = feature[:, place], torch.cat([feature[:, :place], feature[:, place + 1 :]], dim=1)
        self._visited = [*self._visited[:1], neuron.detach()]
        silence = others.square().sum(1) / max(1, others.shape[1])
        return -((neuron - self.attack.height).square() + self.attack.others_weight * silence)

    def measured(self) -> dict[str, Tensor]:
        """Give the neuron's value at the start and before the last step."""
        return {"neuron_first": self._visited[0], "neuron_last": self._visited[-1]}


def drawn_start(seed: int, pixels: Tensor, eps: Tensor, keys: Sequence[str]) -> Tensor:
    """Draw a point of the budget for each image, by the seed and the image's key alone."""
    generators = [torch.Generator().manual_seed(one) for one in seeds_of(seed, "start", keys)]
    return random_start(pixels, eps=eps, generators=generators)


def feature_layer(teacher: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """Find the module whose input is the penultimate feature.

    Args:
        teacher: The teacher.
        name: The module's dotted name; None for the one before the head, as the teacher's adapter names it.

    Raises:
        ValueError: The teacher has no module of this name.
        UnsupportedModelError: `name` is None, and the teacher does not tell its head.
    """
    name = adapter_for(teacher).feature_layer() if name is None else name
    modules = dict(teacher.named_modules())
    if name not in modules or not name:
        raise ValueError(
            f"layer names the module whose input is the feature, but {type(teacher).__name__} has no {name!r}. Its "
            f"direct children are {[child for child, _ in teacher.named_children()]}."
        )
    return name, modules[name]
