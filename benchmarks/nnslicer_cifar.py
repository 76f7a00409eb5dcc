"""What `nnslicer_pruning.py` and `nnslicer_protection.py` share: CIFAR-10, its ResNet, cells on disk, intervals."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.special import stdtrit
from torch import Tensor, nn

from remos_hf.adapters.images import ImageInput, decoded
from remos_hf.applications.weight_ranking import weight_scores
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.showing.palette import PALETTE
from remos_hf.whole import replace_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from audit_image_defects import cifar_resnet  # noqa: E402, F401 - the CIFAR net of the example

NUM_CLASSES = 10
NUM_TARGETS = 3
Labelled = tuple[Tensor, Tensor]

NAMES = {
    "contributions": "contributions to the target classes (NNSlicer)",
    "contributions_all": "contributions to all classes",
    "gradient": "gradient x deviation",
    "effective_path": "EffectivePath",
    "magnitude": "magnitude",
    "random": "random",
}
LOOKS = dict(zip(NAMES, zip(PALETTE, "osD^vP", strict=False), strict=False))  # colour and marker
BANDS = ("contributions", "magnitude")  # whose intervals are drawn

READER = ImageInput((32, 32), crop_share=1.0)


class Images:
    """CIFAR-10 as folders of classes, read once each.

    Args:
        folder: Holds train/ and test/.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {
            part: [sorted(one.glob("*.jpg")) for one in sorted((folder / part).iterdir())] for part in ("train", "test")
        }
        self.names = [one.name for one in sorted((folder / "train").iterdir())]

    def some(self, part: str, classes: Sequence[int], each: int, seed: int, skip: int = 0) -> Labelled:
        """Draw images of each class; others with another `skip` do not overlap. Normalised, (samples, 3, 32, 32)."""
        images, labels = [], []
        for label in classes:
            files = self.files[part][label]
            order = np.random.default_rng([seed, label]).permutation(len(files))
            for place in order[skip : skip + each]:
                images.append(READER.pixels(decoded(files[place])))
                labels.append(label)
        return READER.normalised(torch.stack(images)), torch.tensor(labels)

    def targets(self, seed: int) -> list[int]:
        """Draw the target classes of a seed."""
        return sorted(np.random.default_rng(seed).choice(NUM_CLASSES, NUM_TARGETS, replace=False).tolist())

    def tested(self, targets: Sequence[int], seed: int) -> list[Labelled]:
        """Draw the test images: 150 of each target class, 40 of each other."""
        others = [one for one in range(NUM_CLASSES) if one not in targets]
        return batches(self.some("test", targets, 150, seed)) + batches(self.some("test", others, 40, seed))


def batches(data: Labelled, size: int = 100) -> list[Labelled]:
    """Cut into batches."""
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def samples_of(data: Labelled) -> list[tuple[Tensor, int]]:
    """Give single samples, as `fit` takes them."""
    return [(image, int(label)) for image, label in zip(*data, strict=True)]


def scores_by_method(model: nn.Module, images: Images, targets: Sequence[int], seed: int) -> dict[str, Any]:
    """Score the weights by every method: 20 samples of each target class, or 10 of each class for "of all classes"."""
    reference = reference_of(model, images, seed)
    asked = batches(images.some("train", targets, 20, seed, skip=50), 20)
    of_all = batches(images.some("train", range(NUM_CLASSES), 10, seed, skip=50), 20)
    options = {"reference": reference, "outputs": lambda batch: batch[1], "seed": seed}
    found = {
        method: weight_scores(model, method, asked, **options)
        for method in ("contributions", "gradient", "effective_path", "magnitude", "random")
    }
    return {**found, "contributions_all": weight_scores(model, "contributions", of_all, **options)}


def reference_of(model: nn.Module, images: Images, seed: int) -> Reference:
    """Take the mean of what flows over 50 training images of every class."""
    return profile_reference(model, batches(images.some("train", range(NUM_CLASSES), 50, seed)))


class Cells:
    """Measured cells in a JSON file, written after each, so that a killed run goes on.

    Args:
        path: The file.
        settings: What was measured; a file of other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings, self.cells = path, dict(settings), []
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != json.loads(json.dumps(self.settings)):
                raise SystemExit(f"{path} holds cells of other settings. Move it away, or give its settings.")
            self.cells = found["cells"]

    def has(self, **key: Any) -> bool:  # noqa: ANN401 - JSON
        """Whether a cell is measured."""
        return any(all(cell[name] == value for name, value in key.items()) for cell in self.cells)

    def add(self, **cell: Any) -> None:  # noqa: ANN401 - JSON
        """Write a cell."""
        self.cells.append(cell)
        text = ",\n".join(json.dumps(one) for one in self.cells)
        content = f'{{"settings": {json.dumps(self.settings)},\n"cells": [\n{text}\n]}}\n'
        replace_file(self.path, content.encode())

    def values(self, measure: str, **key: Any) -> dict[int, float]:  # noqa: ANN401 - JSON
        """Give a measure by seed."""
        fitting = (cell for cell in self.cells if all(cell[name] == value for name, value in key.items()))
        return {cell["seed"]: cell[measure] for cell in fitting}


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Give the mean of seeds and the ends of its 95 % interval (Student's t)."""
    values = list(values)
    if len(values) < 3:
        raise SystemExit(f"An interval needs three seeds at least, but there are {len(values)}.")
    reach = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
    return fmean(values), fmean(values) - reach, fmean(values) + reach


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, float]:
    """Give the mean of one less the other, seed by seed, and the ends of its 95 % interval."""
    return interval(one[seed] - other[seed] for seed in one if seed in other)


def percent(found: tuple[float, float, float], *, signed: bool = False) -> str:
    """Write a mean with its interval, in percent."""
    mean, low, high = (100 * one for one in found)
    if signed:
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{mean:.1f} [{max(0.0, low):.1f}, {min(100.0, high):.1f}]"


def draw_curve(axes: Axes, places: Sequence[float], method: str, found: Sequence[tuple[float, float, float]]) -> None:
    """Draw a method's means, and of some their intervals."""
    colour, marker = LOOKS[method]
    middle, low, high = zip(*found, strict=True)
    axes.plot(places, middle, marker=marker, color=colour, label=NAMES[method])
    if method in BANDS:
        axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)


def compared(found: tuple[float, float, float]) -> str:
    """Say what an interval of a difference says."""
    return "higher" if found[1] > 0 else "lower" if found[2] < 0 else "not told apart"
