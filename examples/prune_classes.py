# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[examples]"]
# ///
"""Only three of ten classes are needed: which weights can go, and who chooses them best?

    python examples/prune_classes.py --output_dir pruned

No network and no files: scikit-learn's 8 x 8 digits and a small network trained on the spot. A minute or two.
Weights of every layer but the head are ranked by what they contribute to the needed classes (NNSlicer), by gradient x
deviation, by EffectivePath, by magnitude and at random; all get the same help: the mean of what is removed goes into
the biases. Writes prune_classes.json and prune_classes.png into the output folder.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from remos_hf import (
    class_accuracy,
    fine_tune_pruned,
    highest_scoring,
    profile_mean_inputs,
    profile_reference,
    prune_outside,
    weight_scores,
)

Data = tuple[Tensor, Tensor]  # images in [0, 1], shape (samples, 1, 8, 8), and labels, shape (samples,)

METHODS = ("contributions", "gradient", "effective_path", "magnitude", "random")
# Okabe and Ito's palette, told apart also without colour by the marker.
LOOKS = dict(zip(METHODS, (("#0072B2", "o"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P")),
                 strict=True))  # fmt: skip


class DigitNet(nn.Module):
    """Two convolutions and a hidden layer (the body), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Give logits, shape (samples, 10), of images in [0, 1], shape (samples, 1, 8, 8)."""
        features = torch.relu(self.conv2(torch.relu(self.conv1(images))))
        features = nn.functional.max_pool2d(features, 2).flatten(1)
        return self.head(torch.relu(self.hidden(features)))


def digits(seed: int) -> tuple[Data, Data]:
    """Deal the images out: 1,297 to train on and 500 to test on."""
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(found.target, dtype=torch.int64)
    train, test = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split([1297, 500])
    return (images[train], labels[train]), (images[test], labels[test])


def trained(data: Data, seed: int, epochs: int) -> DigitNet:
    """Train a network, leaving the global generator as it was."""
    images, labels = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitNet()
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    return model.eval()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the one epoch."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def of_classes(data: Data, classes: Sequence[int]) -> Data:
    """Take the samples of some classes."""
    rows = torch.isin(data[1], torch.tensor(classes))
    return data[0][rows], data[1][rows]


def measured(args: argparse.Namespace, seed: int) -> list[dict]:
    """Prune one network by every method to every share."""
    train, test = digits(seed)
    model = trained(train, seed, args.epochs)
    needed = of_classes(train, args.classes)
    asked = list(zip(needed[0][: args.traced].split(32), needed[1][: args.traced].split(32), strict=True))
    reference = profile_reference(model, [train])
    means = profile_mean_inputs(model, [needed])
    samples = [(image, int(label)) for image, label in zip(*needed, strict=True)]
    cells = []
    for method in METHODS:
        scores = weight_scores(model, method, asked, reference=reference, outputs=asked_about, seed=seed)
        for removed in args.removed:
            kept = highest_scoring(model, scores, 1 - removed, head=("head",), rule=method)
            pruned = prune_outside(copy.deepcopy(model), kept, means=means)
            before = class_accuracy(pruned, [test], args.classes)
            fine_tune_pruned(pruned, kept, samples, optimizer=sgd, epochs=1, seed=seed, progress=False)
            after = class_accuracy(pruned, [test], args.classes)
            cells.append({"seed": seed, "method": method, "removed": removed, "before": before.among.value,
                          "after": after.among.value, "others": before.others.value,
                          "num_samples": before.among.num_samples})  # fmt: skip
    return cells


def asked_about(batch: Data) -> Tensor:
    """Ask of every sample about its own label."""
    return batch[1]


def mean_of(cells: list[dict], measure: str, method: str, removed: float) -> float:
    """Give the mean over seeds."""
    found = [cell[measure] for cell in cells if (cell["method"], cell["removed"]) == (method, removed)]
    return sum(found) / len(found)


def draw(cells: list[dict], args: argparse.Namespace) -> Figure:
    """Draw accuracy among the needed classes before and after one epoch."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, measure, title in zip(figure.subplots(1, 2, sharey=True), ("before", "after"),
                                    ("pruned", "pruned, then one epoch"), strict=True):  # fmt: skip
        for method in METHODS:
            colour, marker = LOOKS[method]
            values = [100 * mean_of(cells, measure, method, one) for one in args.removed]
            axes.plot([100 * one for one in args.removed], values, color=colour, marker=marker, label=method)
        axes.set_title(title)
        axes.set_xlabel("removed from each layer (%)")
    figure.axes[0].set_ylabel(f"accuracy among classes {', '.join(map(str, args.classes))} (%)")
    figure.axes[0].legend(frameon=False)
    return figure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 5, 8], help="the digits that are needed")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--traced", type=int, default=96, help="samples that weights are ranked on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="one seed, two shares, a few epochs: seconds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.removed, args.traced, args.epochs = args.seeds[:1], [0.5, 0.9], 16, 4
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    cells = [cell for seed in args.seeds for cell in measured(args, seed)]
    print(f"{'':16}" + "".join(f"{f'{100 * one:g} % removed':>20}" for one in args.removed))
    for method in METHODS:
        pairs = [(mean_of(cells, "before", method, one), mean_of(cells, "after", method, one)) for one in args.removed]
        print(f"{method:16}" + "".join(f"{f'{100 * one:.1f} -> {100 * two:.1f}':>20}" for one, two in pairs))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = {"classes": args.classes, "seeds": args.seeds, "cells": cells}
    (args.output_dir / "prune_classes.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(cells, args).savefig(args.output_dir / "prune_classes.png", dpi=150)


if __name__ == "__main__":
    main(parse_args())
