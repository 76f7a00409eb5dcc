"""Tiny pictures with labels, and convolutional teachers that read them."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from torch import nn

from remos_hf.adapters.images import ImageInput

READING = ImageInput(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_share=1.0)


def picture(seed, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def data(count=6, size=8):
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["cat", "dog", "owl", "bat"])})
    rows = {"image": [picture(seed, size) for seed in range(count)], "label": [seed % 4 for seed in range(count)]}
    return Dataset.from_dict(rows, features)


def clean_pixels(dataset, images=READING):
    return torch.stack([images.pixels(image) for image in dataset["image"]])


def pixels_of(exposed):
    return torch.from_numpy(np.asarray(exposed.dataset.with_format("numpy")["pixels"][:]))


class Residual(nn.Module):
    """A residual block that adds and applies ReLU in place, and a BatchNorm without weights, under a head."""

    def __init__(self, seed=0, inplace=True):
        super().__init__()
        torch.manual_seed(seed)
        self.inplace = inplace
        self.last = nn.BatchNorm2d(6, affine=False)  # registered first, called last
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(6, 4)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.uniform_(0.2, 2)
                norm.bias.uniform_(-0.5, 0.5)
                norm.running_mean.uniform_(-0.3, 0.3)
        self.eval()
        with torch.no_grad():  # no label is the answer to everything
            noise = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            self.fc.bias -= self(READING.normalised(noise)).mean(0)

    def forward(self, pixel_values):
        hidden = self.relu(self.norm1(self.stem(pixel_values)))
        added = self.norm2(self.conv(hidden))
        if self.inplace:
            added += hidden
        else:
            added = added + hidden
        return self.fc(self.relu(self.last(self.relu(added))).mean((2, 3)))
