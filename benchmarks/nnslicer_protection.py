r"""Does hiding the weights that contribute most to some classes protect these classes from an attacker who trains?

    python benchmarks/nnslicer_protection.py --cifar <folder with train/ and test/> \
        --cifar_resnet resnet20-12fca82f.th --output benchmarks/results/nnslicer_protection

For each seed three classes of CIFAR-10 are drawn and the highest-ranked weights of every layer of ResNet-20, the head
among them, are hidden. The attacker gets the rest and a budget of labelled images of all classes, and trains every
parameter. Writes .json after every cell, then .md and .png; goes on where it was killed.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nnslicer_cifar import (
    NAMES,
    NUM_CLASSES,
    Cells,
    Images,
    Labelled,
    cifar_resnet,
    compared,
    difference,
    draw_curve,
    interval,
    percent,
    scores_by_method,
)
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.applications.class_accuracy import class_accuracy
from remos_hf.applications.protection import hide_weights, relearn
from remos_hf.applications.weight_ranking import highest_scoring
from remos_hf.randomness import seeded
from remos_hf.showing.canvas import PERCENT, new_figure, styled, written

# By the share that is hidden, so that all of it takes less than half an hour of a core.
METHODS = {
    0.1: ("contributions", "gradient", "effective_path", "magnitude", "random"),
    0.5: ("contributions", "magnitude", "random"),
}
# Labelled images, of all classes alike, and how often the attacker sees each.
BUDGETS = {100: 30, 1000: 9}
# Of .01, .05 and AdamW at .002, tried on another seed with 500 images, none was best at every share and method.
RATE = 0.01
MEASURES = ("target", "among", "others")
WHOLE, NOTHING = "nothing hidden", "everything hidden"


class Shifted:
    """Labelled images, shifted by up to four pixels and mirrored at random each time.

    Args:
        data: Images and labels.
    """

    def __init__(self, data: Labelled) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[1])

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image = functional.pad(self.data[0][place], (4, 4, 4, 4))
        top, left, mirrored = torch.randint(9, ()), torch.randint(9, ()), torch.randint(2, ())
        image = image[:, top : top + 32, left : left + 32]
        return image.flip(2) if mirrored else image, int(self.data[1][place])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Build the attacker's optimizer."""
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Let its learning rate fall to 0."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def measure_seed(seed: int, model: nn.Module, images: Images, cells: Cells) -> None:
    """Measure every cell of a seed that is not there yet."""
    wanted = [one for one in plan(seed) if not cells.has(**one)]
    if not wanted:
        return
    targets = images.targets(seed)
    test = images.tested(targets, seed)
    scores = scores_by_method(model, images, targets, seed)
    known = {budget: images.some("train", range(NUM_CLASSES), budget // 10, seed, skip=300) for budget in BUDGETS}
    for key in wanted:
        started = time.process_time()
        attacked = given_away(model, key, scores, seed)
        if key["budget"]:
            relearn(
                attacked, Shifted(known[key["budget"]]), optimizer=sgd, scheduler=falling,
                epochs=BUDGETS[key["budget"]], batch_size=32, seed=seed, progress=False,
            )  # fmt: skip
        found = {name: rate["value"] for name, rate in asdict(class_accuracy(attacked, test, targets)).items()}
        cells.add(**key, **found, targets=[images.names[one] for one in targets],
                  seconds=time.process_time() - started)  # fmt: skip
    print(f"seed {seed}: {[images.names[one] for one in targets]} done", flush=True)


def given_away(model: nn.Module, key: dict[str, Any], scores: dict[str, Any], seed: int) -> nn.Module:
    """Give the attacker's model before it trains."""
    attacked = copy.deepcopy(model)
    if key["method"] == NOTHING:
        with seeded(seed):
            for module in attacked.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    elif key["method"] != WHOLE:
        chosen = highest_scoring(attacked, scores[key["method"]], key["hidden"], head=(), rule=key["method"])
        hide_weights(attacked, chosen)
    return attacked


def plan(seed: int) -> list[dict[str, Any]]:
    """List the cells of a seed."""
    budgets = (0, *BUDGETS)
    cells = [(method, hidden, budget) for budget in budgets for hidden in METHODS for method in METHODS[hidden]]
    cells += [(WHOLE, 0.0, 0), (WHOLE, 0.0, max(BUDGETS)), (NOTHING, 1.0, max(BUDGETS))]
    return [
        {"seed": seed, "method": method, "hidden": hidden, "budget": budget} for method, hidden, budget in cells
    ]  # fmt: skip


def header(first: str) -> str:
    """Write the head of a table with a column a budget."""
    return (
        f"| {first} | "
        + " | ".join(f"{one} images" for one in (0, *BUDGETS))
        + " |\n"
        + "|---" * (2 + len(BUDGETS))
        + "|"
    )


def table(cells: Cells, measure: str, hidden: float) -> str:
    """Write a table of one measure: a row a method, a column a budget."""
    rows = [
        f"| {NAMES[method]} | "
        + " | ".join(
            percent(interval(cells.values(measure, method=method, hidden=hidden, budget=one).values()))
            for one in (0, *BUDGETS)
        )
        + " |"
        for method in METHODS[hidden]
    ]
    return "\n".join([header("hidden by"), *rows])


def less(cells: Cells, rival: str, measure: str, hidden: float, budget: int) -> tuple[float, float, float]:
    """Give what is left after contributions were hidden, less what is left after a rival's choice."""
    one, other = (
        cells.values(measure, method=method, hidden=hidden, budget=budget) for method in ("contributions", rival)
    )
    return difference(one, other)


def comparison(cells: Cells, measure: str, hidden: float) -> str:
    """Write the differences from every rival."""
    rows = [
        f"| {NAMES[rival]} | "
        + " | ".join(percent(less(cells, rival, measure, hidden, one), signed=True) for one in (0, *BUDGETS))
        + " |"
        for rival in METHODS[hidden][1:]
    ]
    return "\n".join([header("contributions less"), *rows])


def counted(cells: Cells, measure: str, rival: str, budgets: Sequence[int]) -> dict[str, int]:
    """Count what the differences from a rival say over shares and budgets."""
    said = {"lower": 0, "not told apart": 0, "higher": 0}
    for hidden in (one for one, methods in METHODS.items() if rival in methods):
        for budget in budgets:
            said[compared(less(cells, rival, measure, hidden, budget))] += 1
    return said


def told(said: dict[str, int]) -> str:
    """Write such counts."""
    return f"{', '.join(f'{name} in {count}' for name, count in said.items())} of {sum(said.values())}"


def verdict(cells: Cells) -> str:
    """Say whether the paper's claims hold, from the numbers alone."""
    budgets = tuple(BUDGETS)
    lines = ["1. “Accuracy on the target classes is lowest if contributions are hidden.” After the attack:"]
    lines += [
        f"   - than after hiding by {NAMES[one]}: {told(counted(cells, 'target', one, budgets))}."
        for one in METHODS[0.1][1:]
    ]
    rivals = [counted(cells, "target", one, budgets) for one in METHODS[0.1][1:]]
    if all(one["lower"] == sum(one.values()) for one in rivals):
        lines.append("   It holds.")
    elif any(one["higher"] for one in rivals):
        lines.append("   It does not hold: some rival's choice protects better somewhere.")
    else:
        lines.append("   It cannot be said: some differences are within what the seeds leave open.")
    lines.append(
        "2. “Other classes suffer less than if the largest weights are hidden.” Accuracy on the other classes:"
    )
    lines.append(f"   - than after hiding by magnitude: {told(counted(cells, 'others', 'magnitude', budgets))}.")
    most = max(BUDGETS)
    whole = cells.values("target", method=WHOLE, budget=most)
    nothing = cells.values("target", method=NOTHING, budget=most)
    lines.append(
        f"3. How much protection is it at all? Target accuracy after {most} images, beside the same attack on ..."
    )
    for hidden in METHODS:
        found = cells.values("target", method="contributions", hidden=hidden, budget=most)
        lines.append(
            f"   - {100 * hidden:g} % hidden by contributions: {percent(difference(found, whole), signed=True)} points "
            f"from the whole model, {percent(difference(found, nothing), signed=True)} from a model without any weight."
        )
    return "\n".join(lines)


def written_up(cells: Cells) -> str:
    """Write the page."""
    seeds = sorted({cell["seed"] for cell in cells.cells})
    most = max(BUDGETS)
    ends = [
        f"- {name}, {budget} images: "
        + ", ".join(
            f"{one} {percent(interval(cells.values(one, method=name, budget=budget).values()))}" for one in MEASURES
        )
        for name, budget in ((WHOLE, 0), (WHOLE, most), (NOTHING, most))
    ]
    parts = [
        "# Hiding weights of ResNet-20 from an attacker who trains",
        f"{len(seeds)} seeds; of each, three target classes of CIFAR-10 drawn, 450 test images of them and 280 of the "
        "others. Percent, with the 95 % interval over seeds (Student's t). Every method hides the same share of every "
        "layer, the head among them, without replacement. The attacker trains every parameter with one softmax: SGD, "
        f"momentum .9, learning rate {RATE} falling to 0, batches of 32, shifted and mirrored images, "
        + ", ".join(f"{epochs} epochs of {budget} images" for budget, epochs in BUDGETS.items())
        + ". The last epoch counts, not the best on the test set. Lower accuracy on the target classes is better "
        "protection.",
        "The ends of the scale:",
        "\n".join(ends),
        "## What holds of the paper's claims",
        verdict(cells),
        "![Accuracy against the attacker's budget](nnslicer_protection.png)",
    ]
    for hidden in METHODS:
        parts += [
            f"## {100 * hidden:g} % of every layer hidden",
            "Accuracy on the target classes where all labels can be given:",
            table(cells, "target", hidden),
            "Differences, seed by seed:",
            comparison(cells, "target", hidden),
            "Accuracy among the target classes:",
            table(cells, "among", hidden),
            "Accuracy on the other classes:",
            table(cells, "others", hidden),
            "Differences, seed by seed:",
            comparison(cells, "others", hidden),
        ]
    return "\n\n".join(parts) + "\n"


@styled
def drawn(cells: Cells, path: Path) -> None:
    """Draw accuracy on target and other classes against the budget."""
    figure = new_figure("What an attacker relearns of hidden weights", 6.6)
    rows = figure.subplots(2, 2, sharex=True, sharey=True)
    places = range(1 + len(BUDGETS))
    for hidden, axes_of_row in zip(METHODS, rows, strict=True):
        for measure, axes in zip(("target", "others"), axes_of_row, strict=True):
            for style, name in (("-", WHOLE), (":", NOTHING)):
                found = cells.values(measure, method=name, budget=max(BUDGETS))
                axes.axhline(interval(found.values())[0], color="0.5", linewidth=1, linestyle=style)
            for method in METHODS[hidden]:
                key = {"method": method, "hidden": hidden}
                found = [interval(cells.values(measure, budget=one, **key).values()) for one in (0, *BUDGETS)]
                draw_curve(axes, places, method, found)
            axes.set_title(f"{measure.replace('others', 'other')} classes, {100 * hidden:g} % hidden")
            axes.set_ylim(0, 1)
            axes.set_xticks(places, [str(one) for one in (0, *BUDGETS)])
            axes.yaxis.set_major_formatter(PERCENT)
    for axes in rows[-1]:
        axes.set_xlabel("the attacker's labelled images")
    for axes in rows[:, 0]:
        axes.set_ylabel("accuracy (%)")
    seeds = len({cell["seed"] for cell in cells.cells})
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside lower left", alignment="left",
        title=f"{seeds} seeds; bands: 95 % over seeds. {max(BUDGETS)} images where\n"
        "nothing is hidden: grey line; where everything is: dotted",
    )  # fmt: skip
    written(path, figure)


def main() -> None:
    """Measure what is missing and write it up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--cifar_resnet", type=Path, required=True, help="checkpoint of pytorch_resnet_cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/nnslicer_protection"))
    parser.add_argument("--report_only", action="store_true", help="write up what is done")
    args = parser.parse_args()
    settings = {
        "model": args.cifar_resnet.name, "hidden": [*METHODS], "budgets": {str(k): v for k, v in BUDGETS.items()},
        "learning_rate": RATE, "torch": torch.__version__,
    }  # fmt: skip
    cells = Cells(args.output.with_suffix(".json"), settings)
    if not args.report_only:
        model, images = cifar_resnet(args.cifar_resnet).eval(), Images(args.cifar)
        for seed in args.seeds:
            measure_seed(seed, model, images, cells)
    args.output.with_suffix(".md").write_text(written_up(cells))
    drawn(cells, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
