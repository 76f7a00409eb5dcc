"""What found defects of images share: searched on the teacher alone, kept on disk, shown to every student.

The search runs on pixels, the values from 0 to 1 after cropping, and normalises inside the objective. So what is stored
is what was searched, bit by bit, and what every student is shown.
"""

import hashlib
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from remos_hf.adapters.classified import logits_in
from remos_hf.adapters.images import ImageInput
from remos_hf.defects.base import FOOLED, PIXELS, Defect, ExposedSet, teacher_sha256
from remos_hf.defects.found_images import Gallery
from remos_hf.defects.image_samples import prepared
from remos_hf.defects.samples import generator_for
from remos_hf.fields import check_number, check_whole
from remos_hf.perturbation import ascend, frozen

logger = logging.getLogger(__name__)

# Part of the cache key: a change of what a sample's result is makes a new one.
_FORMAT = 1
# Fields that do not change what is found: they only choose among it, or say where it is read.
_NO_PART_OF_THE_SEARCH = ("keep", "max_samples", "batch_size", "image_column", "label_column")


class Search(ABC):
    """What one batch of images climbs on a frozen teacher, and what it has to tell when it is through."""

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Give the value of each image, shape (samples,). Pixels from 0 to 1, (samples, channels, height, width)."""

    def begin(self, clean: Tensor) -> None:
        """See the clean pixels, once, before the first step."""
        return

    def measured(self) -> dict[str, Tensor]:
        """Give what was noticed on the way: one number for each sample, by name; float32, shape (samples,)."""
        return {}


@dataclass(frozen=True)
class AdversarialImages(Defect):
    """Images that are changed within a budget, on the teacher alone, until they show what the teacher gets wrong.

    Each image's result depends on the teacher, its own pixels and the fields alone, as far as the teacher's arithmetic
    does: convolutions of another batch size may differ in their last bit, which the sign of a gradient near 0 may show.

    Attributes:
        eps: Largest change of a value, in `units`: 8/255 in pixels.
        step: Change of each step, in `units`.
        steps: Number of steps.
        low: Smallest valid value, in `units`; None for black, 0 in pixels.
        high: Largest valid value, in `units`; None for white, 1 in pixels.
        units: "pixels" from 0 to 1, or "normalised", which the teacher's standard deviations scale by channel.
        keep: "all", or only those that are "fooled": the teacher's own label changes. The artifact measures on all of
            them, the paper on those that are misclassified. Both are made by one search and share a cache.
        max_samples: Only so many samples, the first ones; None for all.
        batch_size: Images of a forward pass.
        seed: Decides what is drawn, together with each image's pixels alone.
        image_column: Column of the images: `datasets.Image`, the bytes of files, or their paths.
        label_column: Column of the labels. They are kept, and never looked at.
    """

    eps: float = 8 / 255
    step: float = 0.8 / 255
    steps: int = 40
    low: float | None = None
    high: float | None = None
    units: Literal["pixels", "normalised"] = "pixels"
    keep: Literal["all", "fooled"] = "all"
    max_samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        if self.units not in ("pixels", "normalised"):
            raise ValueError(f"units is 'pixels' or 'normalised', but got {self.units!r}.")
        if self.keep not in ("all", "fooled"):
            raise ValueError(f"keep is 'all' or 'fooled', but got {self.keep!r}.")
        check_number(self, "the largest change of a value, at least 0", lambda one: one >= 0, "eps")
        check_number(self, "the change of each step, above 0", lambda one: one > 0, "step")
        if self.units == "pixels" and self.eps > 1:
            raise ValueError(
                f"eps is {self.eps}, but pixels go from 0 to 1: 8/255 is meant as 8 of 255 levels. Set "
                "units='normalised' for values that the teacher's standard deviations scale."
            )
        for name in ("steps", "max_samples", "batch_size"):
            if getattr(self, name) is not None:
                check_whole(self, "a whole number, at least 1", 1, name)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low is below high, but got {self.low} and {self.high}.")

    @abstractmethod
    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> Search:
        """Start the search of one batch.

        Args:
            teacher: The teacher, in eval mode, its parameters without gradients.
            images: How it reads images.
            keys: What tells the samples apart, the same for a sample in whatever batch.
        """

    def described(self, teacher: nn.Module) -> dict[str, Any]:
        """Give what the exposed set's facts say of the search beyond the fields: JSON values."""
        return {}

    def start(self, pixels: Tensor, eps: Tensor, keys: Sequence[str]) -> Tensor | None:
        """Give where the search begins; None for the clean pixels.

        Args:
            pixels: Clean pixels, shape (samples, channels, height, width).
            eps: The budget in pixels, shape (channels, 1, 1).
            keys: What tells the samples apart.
        """
        return None

    def budget(self, images: ImageInput) -> dict[str, Tensor]:
        """Give eps, step, low and high in pixels, by channel: float32, shape (channels, 1, 1)."""
        mean, std = (torch.tensor(one, dtype=torch.float64)[:, None, None] for one in (images.mean, images.std))
        mean, std = (mean.flip(0), std.flip(0)) if images.bgr else (mean, std)  # of pixels, which are red first
        scaled = self.units == "normalised"
        size, place = (std, mean) if scaled else (torch.ones_like(std), torch.zeros_like(mean))
        limits = {"low": 0.0, "high": 1.0}
        values = {name: getattr(self, name) * size for name in ("eps", "step")}
        for name, valid in limits.items():
            given = getattr(self, name)
            values[name] = torch.full_like(mean, valid) if given is None else given * size + place
        return {name: _rounded_down(value) if name == "eps" else value.float() for name, value in values.items()}

    def perturbed(
        self, pixels: Tensor, *, teacher: nn.Module, images: ImageInput, keys: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Search one batch.

        Args:
            pixels: Clean pixels from 0 to 1, float32, shape (samples, channels, height, width), on the teacher's
                device.
            teacher: The teacher. Its modes and its parameters' `requires_grad` are put back.
            images: How it reads images.
            keys: What tells the samples apart, one for each.

        Returns:
            The perturbed pixels, and what the search measured by the way.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; names the step and the sample's place in the batch.
        """
        sizes = {name: value.to(pixels.device) for name, value in self.budget(images).items()}
        with frozen(teacher):
            search = self.search(teacher, images, keys)
            search.begin(pixels)
            start = self.start(pixels, sizes["eps"], keys)
            return ascend(search, pixels, steps=self.steps, start=start, **sizes), search.measured()

    def exposed_set(
        self,
        dataset: Dataset,
        *,
        teacher: nn.Module | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
        images: ImageInput | None = None,
    ) -> ExposedSet:
        """Perturb every image.

        Args:
            dataset: Clean samples, never used for training.
            teacher: The teacher, on the device to run on. No student is ever asked.
            cache: A folder of exposed sets. One of the same teacher, pixels, labels, search and `images` is read from
                there instead of being made again, whatever `keep` says. A run that is killed goes on from its last
                batch.
            workers: Threads that decode images.
            images: How the teacher reads images, and how every student is shown the result.

        Returns:
            One row a sample that is kept: `pixels` (float32 values, shape (channels, height, width), to be given to
            `images.normalised` and nothing before it), the label column, `clean_index`, and, where the teacher
            classifies, `fooled`. No target label: any wrong label counts. A row holds 4 bytes a value: 0.6 MB at 224
            by 224 pixels. They lie in memory, or with a cache on disk.

        Raises:
            ValueError: A column is missing, holds no images or no classes, there is no sample, or keep is "fooled" and
                the teacher gives no logits.
            CorruptFileError: An image is not whole; names it.
            NonFiniteError: A gradient is NaN or infinite.
        """
        if teacher is None or images is None:
            raise ValueError(f"{type(self).__name__} searches on the teacher: pass teacher= and images=.")
        if workers < 1:
            raise ValueError(f"workers is a number of threads, at least 1, but got {workers}.")
        samples = dataset.select(range(min(len(dataset), self.max_samples or len(dataset))))
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        pictures = prepared(samples, images, **columns)
        gallery = Gallery(pictures, self.label_column, samples.features[self.label_column], workers)
        digests = gallery.digests()
        teacher_hash = _fingerprint(teacher)
        facts = {
            "format": _FORMAT,
            "defect": {key: one for key, one in self.to_dict().items() if key not in _NO_PART_OF_THE_SEARCH},
            "teacher": teacher_hash,
            "images": images.to_dict(),
            "samples": list(zip(digests, pictures.labels, strict=True)),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

        def make(unfinished: Path | None) -> ExposedSet:
            started = time.perf_counter()
            search, options = partial(self._batch, teacher, images), {"batch_size": self.batch_size}
            table, noted = gallery.searched(
                digests, search, unfinished=unfinished, title=type(self).__name__, **options
            )
            about = {
                "images": images.to_dict(),
                "eps_in_pixels": [round(float(one), 7) for one in self.budget(images)["eps"].flatten()],
                **noted,
                **self.described(teacher),
                "teacher_sha256": teacher_hash,
                "device": str(_place_of(teacher)[0]),
                "versions": {"torch": torch.__version__},
                "seconds": round(time.perf_counter() - started, 2),
            }
            return ExposedSet(table, None, about)

        if cache is None:
            return self._chosen(make(None))
        return self._chosen(ExposedSet.cached(Path(cache) / f"{type(self).__name__}-{key[:16]}", make))

    def _batch(self, teacher: nn.Module, images: ImageInput, pixels: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Perturb one batch; give the pixels, and one number a sample for all else, on the CPU."""
        pixels = pixels.to(_place_of(teacher)[0])
        found, measured = self.perturbed(pixels, teacher=teacher, images=images, keys=keys)
        change = (found - pixels).abs().flatten(1)
        tensors = {
            PIXELS: found,
            "largest_change": change.amax(1),
            "mean_change": change.mean(1),
            "lowest": found.flatten(1).amin(1),
            "highest": found.flatten(1).amax(1),
            **measured,
        }
        with frozen(teacher), torch.no_grad():
            labels = [_labels_of(outputs_of(teacher, images, one)) for one in (pixels, found)]
        if labels[0] is not None and labels[1] is not None:
            tensors[FOOLED] = labels[0] != labels[1]
        # A column of a batch of one counts as contiguous whatever its stride, and files want none.
        return {name: one.detach().cpu().clone(memory_format=torch.contiguous_format) for name, one in tensors.items()}

    def _chosen(self, whole: ExposedSet) -> ExposedSet:
        """Keep what `keep` says of all that was found."""
        rows = whole.dataset
        if self.keep == "fooled":
            if FOOLED not in rows.column_names:
                raise ValueError(
                    "keep='fooled' asks for the images on which the teacher's label changes, but the teacher gives no "
                    "logits of shape (samples, labels). Give a teacher with a head, or keep='all'."
                )
            rows = rows.select([row for row, fooled in enumerate(rows[FOOLED]) if fooled])
            if not len(rows):
                logger.warning("%s fooled the teacher on none of %d images.", type(self).__name__, len(whole))
        facts = {**whole.facts, "defect": self.to_dict(), "num_exposed": len(rows)}
        return replace(whole, dataset=rows, facts=facts)


def logits_of(model: nn.Module, images: ImageInput, pixels: Tensor) -> Tensor:
    """Run a classifier on pixels from 0 to 1; give its logits, float32, shape (samples, classes)."""
    return logits_in(outputs_of(model, images, pixels), model).float()


def outputs_of(teacher: nn.Module, images: ImageInput, pixels: Tensor) -> Any:  # noqa: ANN401 - whatever it returns
    """Run the teacher on pixels as it reads them, in its own dtype.

    Args:
        teacher: The teacher.
        images: How it reads images.
        pixels: Values from 0 to 1, shape (samples, channels, height, width).
    """
    return teacher(images.normalised(pixels).to(_place_of(teacher)[1]))


def seeds_of(seed: int, purpose: str, keys: Sequence[str]) -> list[int]:
    """Give each sample a seed of its own, from 0 to 2^63 - 1, by its key alone."""
    return [generator_for(seed, purpose, key).getrandbits(63) for key in keys]


def _labels_of(output: Any) -> Tensor | None:  # noqa: ANN401 - whatever the teacher returns
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        return None
    return logits.argmax(dim=1)


def _place_of(teacher: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Give the device and the dtype that the teacher computes with."""
    weight = next((one for one in teacher.parameters() if one.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if weight is None else (weight.device, weight.dtype)


def _rounded_down(size: Tensor) -> Tensor:
    """Give float32 sizes at most as large, so that a budget holds in double precision too."""
    near = size.float()
    return torch.where(near.double() > size, torch.nextafter(near, torch.zeros_like(near)), near)


def _fingerprint(teacher: nn.Module) -> str:
    # A function in the structure's text has an address, which changes from process to process.
    return teacher_sha256(teacher, about=re.sub("0x[0-9a-f]+", "", repr(teacher)))
