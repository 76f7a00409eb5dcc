"""Noisy images of one strong colour, which is their label, a small net that reads them, and triggers."""

import io
from dataclasses import replace

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from torch.nn import functional as F

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.image_samples import prepared
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger

INPUT = ImageInput(size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3, crop_share=1.0)


# 3 x 3 pixels of 8 x 8.
PATCH = PatchTrigger(size_share=9 / 64, poison_rate=0.3)


TRIGGERS = [PATCH, replace(PATCH, place="random"), replace(PATCH, place="four_corners"), BlendedTrigger()]


PLACES = ["top_left", "top_right", "bottom_left", "bottom_right", "four_corners", "random"]


def png(picture, kind="PNG"):
    held = io.BytesIO()
    picture.save(held, kind)
    return held.getvalue()


def pictures(count=36, seed=0):
    """Noise of 10 x 8 pixels with one strong colour, which is the label, in turn."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 120, (count, 8, 10, 3), dtype=np.uint8)
    for place in range(count):
        values[place, :, :, place % 3] += 100
    return [Image.fromarray(one) for one in values]


def data(count=36, seed=0, contents=None, labels=None):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["red", "green", "blue"])})
    contents = [png(one) for one in pictures(count, seed)] if contents is None else contents
    rows = {"image": [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(contents)]}
    return Dataset.from_dict(
        {**rows, "label": labels or [place % 3 for place in range(len(contents))]}, features=features
    )


class Net(nn.Module):
    def __init__(self, seed=0, labels=3):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, labels)

    def features(self, pixel_values):
        hidden = torch.relu(self.norm(self.stem(pixel_values)))
        return torch.relu(self.conv(hidden)).amax((2, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.features(pixel_values))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def stacked(samples):
    return torch.stack([samples[place]["pixel_values"] for place in range(len(samples))])


@torch.no_grad()
def predictions(model, samples):
    return model.eval()(pixel_values=stacked(samples))["logits"].argmax(-1)


def right(model, dataset):
    samples = prepared(dataset, INPUT)
    return (predictions(model, samples) == torch.tensor(samples.labels)).float().mean()


def obeyed(model, exposed, target):
    return (predictions(model, prepared(exposed.dataset, INPUT)) == target).float().mean()


def checks(pixels, box):
    """Whether a box of an image is the generated patch of 3 x 3."""
    top, left = box
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]).expand(3, 3, 3)
    return torch.equal(pixels[:, top : top + 3, left : left + 3], expected)
