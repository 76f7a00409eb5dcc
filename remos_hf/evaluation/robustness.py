"""How many images a model still gets right when they are attacked on the model itself (white box)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import AdversarialImages, Search, logits_of
from remos_hf.defects.feature_attack import drawn_start
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.measures import accuracy, robust_accuracy
from remos_hf.evaluation.predictions import predict_labels


@dataclass(frozen=True)
class Pgd(AdversarialImages):
    """Images moved away from the label that a model gives them, on that model, from a random start.

    Attributes:
        step: Change of each step, in `units`.
        steps: Number of steps.

    Source:
        Madry et al., ICLR 2018; CARTL's exps/foolbox_bench.py: foolbox's LinfPGD, 8/255, steps of 2/255, 100 of them,
        pixels from 0 to 1, normalisation inside.
        Differs: climbs the loss of the model's own clean label, which of images that it gets right is the true one;
        the others are not robust whatever is found.
    """

    citation: ClassVar[str] = (
        "@inproceedings{madry2018towards, title={Towards Deep Learning Models Resistant to Adversarial Attacks}, "
        "author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, "
        "Adrian}, booktitle={ICLR}, year={2018}}"
    )

    step: float = 2 / 255
    steps: int = 100

    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> Search:
        """Start the search of one batch."""
        return _OwnLoss(teacher, images)

    def start(self, pixels: Tensor, eps: Tensor, keys: Sequence[str]) -> Tensor:
        """Give a point of the budget, drawn by the seed and each image's pixels alone."""
        return drawn_start(self.seed, pixels, eps, keys)


class _OwnLoss(Search):
    """Climbs the cross-entropy of the labels that the model gives the clean images."""

    def __init__(self, model: nn.Module, images: ImageInput) -> None:
        self.model, self.images = model, images
        self.labels: Tensor | None = None

    def begin(self, clean: Tensor) -> None:
        with torch.no_grad():
            self.labels = self._logits(clean).argmax(1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return functional.cross_entropy(self._logits(pixels), self.labels, reduction="none")

    def _logits(self, pixels: Tensor) -> Tensor:
        return logits_of(self.model, self.images, pixels)


def pgd_robustness(
    model: nn.Module,
    dataset: Dataset,
    task: ImageTask,
    attack: Pgd | None = None,
    *,
    cache: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Attack a model on itself and count.

    Args:
        model: A classifier of images; its modes are put back.
        dataset: Labelled images that it did not train on.
        task: How they are read.
        attack: Its budget and steps; None for PGD-100 within 8/255.
        cache: A folder of what was found, from which a killed run goes on.

    Returns:
        JSON values: "acc", a rate; "robust_acc", the share of all images that are right when clean and when attacked;
        "attack"; "name".

    Raises:
        ValueError: The attack keeps only some of the images.
    """
    attack = Pgd(image_column=task.image_column, label_column=task.label_column) if attack is None else attack
    if attack.keep != "all":
        raise ValueError(f"Robustness is a share of all images, but the attack keeps {attack.keep!r}. Set keep='all'.")
    found = attack.exposed_set(dataset, teacher=model, images=task.images, cache=cache)
    index = np.array(found.clean_index)
    references = np.array(dataset[task.label_column])[index]
    clean = predict_labels(model, dataset, task)[index]
    attacked = predict_labels(model, found.dataset, task)
    return {
        "acc": accuracy(clean, references).to_dict(),
        "robust_acc": robust_accuracy(attacked, references, clean).to_dict(),
        "name": f"PGD-{attack.steps}",
        "attack": attack.to_dict(),
    }
