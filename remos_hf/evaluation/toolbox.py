"""A model of ours as the Adversarial Robustness Toolbox takes it (`remos_hf[robustness]`)."""

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import logits_of

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier


class _FromPixels(nn.Module):
    def __init__(self, model: nn.Module, images: ImageInput) -> None:
        super().__init__()
        self.model, self.images = model, images

    def forward(self, pixels: Tensor) -> Tensor:
        return logits_of(self.model, self.images, pixels)


def toolbox() -> ModuleType:
    """Give the toolbox.

    Raises:
        ImportError: The extra `robustness` is not installed.
    """
    try:
        import art.attacks.evasion
        import art.estimators.classification
    except ImportError as error:
        raise ImportError(
            "These attacks come from adversarial-robustness-toolbox: pip install 'remos_hf[robustness]'."
        ) from error
    return art


def estimator_of(model: nn.Module, images: ImageInput, pixels: np.ndarray) -> "PyTorchClassifier":
    """Wrap a classifier of images, on the device where it is.

    Args:
        model: The classifier; it runs in eval mode from now on, so wrap it inside `frozen`.
        images: How it reads images.
        pixels: Some of them, values from 0 to 1, shape (samples, channels, height, width).

    Raises:
        ImportError: The extra `robustness` is not installed.
    """
    device, whole = next(model.parameters()).device, _FromPixels(model, images).eval()
    with torch.no_grad():
        labels = whole(torch.from_numpy(pixels[:1]).to(device)).shape[1]
    return toolbox().estimators.classification.PyTorchClassifier(
        whole,
        loss=nn.CrossEntropyLoss(),
        input_shape=pixels.shape[1:],
        nb_classes=labels,
        clip_values=(0.0, 1.0),
        device_type="cpu" if device.type == "cpu" else "gpu",
    )
