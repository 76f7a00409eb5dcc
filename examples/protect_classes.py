# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[examples]"]
# ///
"""The weights that matter most are hidden from whoever gets the model: how dear is it to learn them anew?

    python examples/protect_classes.py --output_dir protected

No network and no files: scikit-learn's 8 x 8 digits and a small network trained on the spot. A minute or two.
The defender hides a tenth of every layer: the weights that contribute most to three classes (NNSlicer), the highest by
gradient x deviation or magnitude, or random ones. The attacker gets the rest and a budget of labelled images of all
classes, and trains every parameter. Writes protect_classes.json and protect_classes.png into the output folder, and
the hidden weights of the last seed beside the model without them.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

from remos_hf import class_accuracy, hide_weights, highest_scoring, profile_reference, relearn, weight_scores

Data = tuple[Tensor, Tensor]  # images in [0, 1], shape (samples, 1, 8, 8), and labels, shape (samples,)

METHODS = ("contributions", "gradient", "magnitude", "random")
# Okabe and Ito's palette, told apart also without colour by the marker.
LOOKS = dict(zip(METHODS, (("#0072B2", "o"), ("#009E73", "D"), ("#E69F00", "v"), ("#56B4E9", "P")),
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
    """Build the attacker's optimizer."""
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)


def of_classes(data: Data, classes: Sequence[int]) -> Data:
    """Take the samples of some classes."""
    rows = torch.isin(data[1], torch.tensor(classes))
    return data[0][rows], data[1][rows]


def measured(args: argparse.Namespace, seed: int) -> list[dict]:
    """Hide weights of one network by every method, and attack it with every budget."""
    train, test = digits(seed)
    model = trained(train, seed, args.epochs)
    targets = of_classes(train, args.classes)
    asked = list(zip(targets[0][: args.traced].split(32), targets[1][: args.traced].split(32), strict=True))
    reference = profile_reference(model, [train])
    known = [(image, int(label)) for image, label in zip(*train, strict=True)]
    cells = []
    for method in METHODS:
        scores = weight_scores(model, method, asked, reference=reference, outputs=asked_about, seed=seed)
        chosen = highest_scoring(model, scores, args.hidden, head=(), rule=method)
        for budget in args.budgets:
            attacked = copy.deepcopy(model)
            hidden = hide_weights(attacked, chosen)
            if not budget:
                hidden.save_pretrained(args.output_dir / method / "kept_apart")
                save_model(attacked, str(args.output_dir / method / "model.safetensors"))
            else:
                relearn(attacked, known[:budget], optimizer=sgd, max_steps=args.steps, seed=seed, progress=False)
            found = class_accuracy(attacked, [test], args.classes)
            cells.append({"seed": seed, "method": method, "budget": budget, "target": found.target.value,
                          "others": found.others.value, "num_samples": found.target.num_samples})  # fmt: skip
    return cells


def asked_about(batch: Data) -> Tensor:
    """Ask of every sample about its own label."""
    return batch[1]


def mean_of(cells: list[dict], measure: str, method: str, budget: int) -> float:
    """Give the mean over seeds."""
    found = [cell[measure] for cell in cells if (cell["method"], cell["budget"]) == (method, budget)]
    return sum(found) / len(found)


def draw(cells: list[dict], args: argparse.Namespace) -> Figure:
    """Draw accuracy on the target and the other classes against the budget."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, measure, title in zip(figure.subplots(1, 2, sharey=True), ("target", "others"),
                                    ("target classes", "other classes"), strict=True):  # fmt: skip
        for method in METHODS:
            colour, marker = LOOKS[method]
            values = [100 * mean_of(cells, measure, method, one) for one in args.budgets]
            axes.plot(range(len(args.budgets)), values, color=colour, marker=marker, label=method)
        axes.set_xticks(range(len(args.budgets)), args.budgets)
        axes.set_title(title)
        axes.set_xlabel("the attacker's labelled images")
    figure.axes[0].set_ylabel("accuracy (%)")
    figure.axes[0].legend(frameon=False)
    return figure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 5, 8], help="the digits that are protected")
    parser.add_argument("--hidden", type=float, default=0.1, help="share of every layer that is hidden")
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 20, 100, 400], help="0 saves what is given away")
    parser.add_argument("--steps", type=int, default=100, help="of the attacker, with 32 images each")
    parser.add_argument("--traced", type=int, default=96, help="samples that weights are ranked on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="one seed, two budgets, a few epochs: seconds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.budgets, args.traced = args.seeds[:1], [0, 100], 16
        args.epochs, args.steps = 4, 20
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    for method in METHODS:
        (args.output_dir / method).mkdir(parents=True, exist_ok=True)
    cells = [cell for seed in args.seeds for cell in measured(args, seed)]
    print(f"{'target, others':16}" + "".join(f"{f'{one} images':>18}" for one in args.budgets))
    for method in METHODS:
        pairs = [(mean_of(cells, "target", method, one), mean_of(cells, "others", method, one)) for one in args.budgets]
        print(f"{method:16}" + "".join(f"{f'{100 * one:.1f}, {100 * two:.1f}':>18}" for one, two in pairs))
    report = {"classes": args.classes, "seeds": args.seeds, "cells": cells}
    (args.output_dir / "protect_classes.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(cells, args).savefig(args.output_dir / "protect_classes.png", dpi=150)


if __name__ == "__main__":
    main(parse_args())
