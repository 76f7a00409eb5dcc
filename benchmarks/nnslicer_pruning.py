r"""Does a slice for some classes prune better than other choices, if all get the same help?

    python benchmarks/nnslicer_pruning.py --cifar <folder with train/ and test/> --cifar_resnet resnet20-12fca82f.th \
        --output benchmarks/results/nnslicer_pruning

For each seed three classes of CIFAR-10 are drawn. Weights of ResNet-20 (or whole channels) are ranked for them and the
lowest removed from every layer but the head, with and without the mean of what is removed given to the BatchNorms
behind. Accuracy before and after one epoch on 600 samples of the target classes. Writes .json after every cell, then
.md and .png; goes on where it was killed.
"""

import argparse
import copy
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nnslicer_cifar import (
    NAMES,
    NUM_TARGETS,
    Cells,
    Images,
    batches,
    cifar_resnet,
    compared,
    difference,
    draw_curve,
    interval,
    percent,
    samples_of,
    scores_by_method,
)
from torch import nn

from remos_hf.applications.class_accuracy import class_accuracy
from remos_hf.applications.class_pruning import fine_tune_pruned, prune_outside
from remos_hf.applications.mean_inputs import profile_mean_inputs
from remos_hf.applications.weight_ranking import highest_scoring
from remos_hf.showing.canvas import PERCENT, new_figure, styled, written

REMOVED = (0.2, 0.4, 0.6, 0.8, 0.9)
TUNED = (0.6, 0.8)
METHODS = {
    "weight": ("contributions", "contributions_all", "gradient", "effective_path", "magnitude", "random"),
    "channel": ("contributions", "gradient", "magnitude", "random"),
}
# The head is pruned too, as in the paper: only for these, with the mean.
WITH_HEAD = ("contributions", "magnitude")
MEASURES = ("target", "among", "others")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the one epoch."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)


def measure_seed(seed: int, model: nn.Module, images: Images, cells: Cells) -> None:
    """Measure every cell of a seed that is not there yet."""
    wanted = [one for one in plan(seed) if not cells.has(**one)]
    if not wanted:
        return
    targets = images.targets(seed)
    scores = scores_by_method(model, images, targets, seed)
    means = profile_mean_inputs(model, batches(images.some("train", targets, 100, seed, skip=100)))
    tuning = samples_of(images.some("train", targets, 200, seed, skip=300))
    test = images.tested(targets, seed)
    measured = rates(model, test, targets)
    if not cells.has(seed=seed, method="nothing removed"):
        cells.add(seed=seed, method="nothing removed", granularity="", removed=0.0, mean=False, head=False,
                  targets=[images.names[one] for one in targets], **measured)  # fmt: skip
    for key in wanted:
        started = time.process_time()
        kept = highest_scoring(
            model, scores[key["method"]], 1 - key["removed"], granularity=key["granularity"],
            head=() if key["head"] else ("linear",), rule=key["method"],
        )  # fmt: skip
        pruned = prune_outside(copy.deepcopy(model), kept, means=means if key["mean"] else None)
        found = rates(pruned, test, targets)
        if key["removed"] in TUNED and not key["head"]:
            fine_tune_pruned(pruned, kept, tuning, optimizer=sgd, epochs=1, batch_size=32, seed=seed, progress=False)
            found |= {f"{name}_tuned": value for name, value in rates(pruned, test, targets).items()}
        cells.add(**key, share_kept=kept.share_kept, **found, seconds=time.process_time() - started)
    print(f"seed {seed}: {[images.names[one] for one in targets]} done", flush=True)


def plan(seed: int) -> list[dict[str, Any]]:
    """List the cells of a seed."""
    ways = [(False, False), (True, False)]
    return [
        {"seed": seed, "method": method, "granularity": granularity, "removed": removed, "mean": mean, "head": head}
        for granularity, methods in METHODS.items()
        for method in methods
        for removed in REMOVED
        for mean, head in [*ways, *([(True, True)] if granularity == "weight" and method in WITH_HEAD else [])]
    ]


def rates(model: nn.Module, test: list, targets: list[int]) -> dict[str, float]:
    """Measure the three accuracies."""
    return {name: rate["value"] for name, rate in asdict(class_accuracy(model, test, targets)).items()}


def table(cells: Cells, measure: str, removed: tuple[float, ...], **key: Any) -> str:  # noqa: ANN401 - JSON
    """Write a table of one measure: a row a method and whether it got the mean."""
    lines = ["| chosen by | mean | " + " | ".join(f"{100 * one:g} %" for one in removed) + " |"]
    lines += ["|---" * (len(removed) + 2) + "|"]
    for method in METHODS[key["granularity"]]:
        for mean in (False, True):
            cell = {"method": method, "mean": mean, **key}
            told = [percent(interval(cells.values(measure, removed=one, **cell).values())) for one in removed]
            lines.append(f"| {NAMES[method]} | {'yes' if mean else 'no'} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def against(cells: Cells, rival: str, removed: float, measure: str, means: tuple[bool, bool], **key: Any) -> tuple:  # noqa: ANN401 - JSON
    """Give contributions less a rival, with who of the two got the mean."""
    one, other = (
        cells.values(measure, method=method, removed=removed, mean=mean, head=False, **key)
        for method, mean in zip(("contributions", rival), means, strict=True)
    )
    return difference(one, other)


def comparison(cells: Cells, granularity: str, measure: str, removed: tuple[float, ...]) -> tuple[str, Mapping]:
    """Write the differences from every rival, and count what they say when both got the same."""
    lines = ["| contributions less | mean given to | " + " | ".join(f"{100 * one:g} %" for one in removed) + " |"]
    lines += ["|---" * (len(removed) + 2) + "|"]
    said: dict[str, dict[str, int]] = {}
    for rival in METHODS[granularity][1:]:
        for means, told in (((True, False), "contributions alone"), ((True, True), "both"), ((False, False), "none")):
            if means == (True, False) and rival != "magnitude":
                continue
            found = [against(cells, rival, one, measure, means, granularity=granularity) for one in removed]
            lines.append(
                f"| {NAMES[rival]} | {told} | " + " | ".join(percent(one, signed=True) for one in found) + " |"
            )
            if means[0] == means[1]:
                counts = said.setdefault(rival, {"higher": 0, "not told apart": 0, "lower": 0})
                for one in found:
                    counts[compared(one)] += 1
    return "\n".join(lines), said


def sentences(said: Mapping[str, Mapping[str, int]]) -> str:
    """Say in words what the comparison counted."""
    return "\n".join(
        f"- Against {NAMES[rival]}: higher in {counts['higher']}, lower in {counts['lower']}, not told apart in "
        f"{counts['not told apart']} of {sum(counts.values())} fair comparisons."
        for rival, counts in said.items()
    )


def verdict(cells: Cells) -> str:
    """Say whether the paper's claims hold, from the numbers alone."""
    ours = {"method": "contributions", "granularity": "weight", "head": False}
    whole = cells.values("among", method="nothing removed")
    by_mean = {
        mean: {one: cells.values("among", removed=one, mean=mean, **ours) for one in REMOVED} for mean in (True, False)
    }
    drops = [(one, difference(by_mean[True][one], whole)) for one in REMOVED]
    stays = [one for one, found in drops if found[1] > -0.02]
    falls = [f"{100 * one:g} % ({percent(found, signed=True)} points)" for one, found in drops if found[2] < -0.02]
    mean_helps = [(one, difference(by_mean[True][one], by_mean[False][one])) for one in REMOVED]
    _, said = comparison(cells, "weight", "among", REMOVED)
    fair = {rival: counts for rival, counts in said.items() if rival != "random"}
    wins = [NAMES[one] for one, counts in fair.items() if counts["higher"] > 0 and counts["lower"] == 0]
    loses = [NAMES[one] for one, counts in fair.items() if counts["lower"] > 0 and counts["higher"] == 0]
    others = cells.values("others", removed=0.6, mean=True, **ours)
    lost = difference(others, cells.values("others", method="nothing removed"))
    kept = ", ".join(f"{100 * one:g} %" for one in stays) or "none of the shares"
    return "\n".join(
        [
            "1. “A targeted slice keeps its classes at every share, without fine-tuning.” "
            + ("Holds here. " if len(stays) == len(REMOVED) else "Does not hold here. ")
            + f"With the mean, at most 2 points are lost (whole interval) at: {kept}."
            + (f" More than 2 points are lost at {'; '.join(falls)}." if falls else ""),
            "2. “It is better than the rivals.” Accuracy among the target classes, before fine-tuning, at all shares, "
            f"if both or none get the mean: never lower and somewhere higher than {', '.join(wins) or 'none of them'}; "
            f"never higher and somewhere lower than {', '.join(loses) or 'none of them'}. Random apart.",
            "3. What the mean does for contributions themselves: "
            + "; ".join(f"{100 * one:g} %: {percent(found, signed=True)}" for one, found in mean_helps)
            + " points.",
            f"4. “Other classes are lost.” At 60 % removed they change by {percent(lost, signed=True)} points: "
            + ("holds." if lost[2] < 0 else "cannot be said."),
        ]
    )


def written_up(cells: Cells) -> str:
    """Write the page."""
    seeds = sorted({cell["seed"] for cell in cells.cells})
    whole = {name: interval(cells.values(name, method="nothing removed").values()) for name in MEASURES}
    parts = [
        "# Pruning ResNet-20 to some classes of CIFAR-10",
        f"{len(seeds)} seeds; of each, {NUM_TARGETS} target classes drawn; 450 test images of them and 280 of the "
        "others. Percent, with the 95 % interval over seeds (Student's t, so target classes and samples are in it). "
        "“Among”: only the target labels can be given, so a model that merely forgot the other labels gains nothing. "
        "The head is not pruned. “Mean”: what removed weights contributed on average on target images goes into the "
        "BatchNorm behind. Images are recompressed JPEGs, on which this net is weaker than published.",
        "Nothing removed: " + ", ".join(f"{name} {percent(one)}" for name, one in whole.items()) + ".",
        "## What holds of the paper's claims",
        verdict(cells),
        sentences(comparison(cells, "weight", "among", REMOVED)[1]),
        "![Accuracy against the share removed](nnslicer_pruning.png)",
    ]
    for granularity in METHODS:
        parts += [
            f"## {granularity.capitalize()}s removed, before fine-tuning",
            "Accuracy among the target classes:",
            table(cells, "among", REMOVED, granularity=granularity, head=False),
            "Differences, seed by seed:",
            comparison(cells, granularity, "among", REMOVED)[0],
            "Accuracy on the target classes where all labels can be given:",
            table(cells, "target", REMOVED, granularity=granularity, head=False),
            "Accuracy on the other classes:",
            table(cells, "others", REMOVED, granularity=granularity, head=False),
            f"## {granularity.capitalize()}s removed, after one epoch on 600 samples of the target classes",
            "Accuracy among the target classes:",
            table(cells, "among_tuned", TUNED, granularity=granularity, head=False),
            "Differences, seed by seed:",
            comparison(cells, granularity, "among_tuned", TUNED)[0],
            sentences(comparison(cells, granularity, "among_tuned", TUNED)[1]),
            "Accuracy on the other classes:",
            table(cells, "others_tuned", TUNED, granularity=granularity, head=False),
        ]
    lines = ["| chosen by | measure | " + " | ".join(f"{100 * one:g} %" for one in REMOVED) + " |"]
    lines += ["|---" * (len(REMOVED) + 2) + "|"]
    for method in WITH_HEAD:
        for measure in ("target", "among"):
            found = [
                difference(
                    *(
                        cells.values(
                            measure, method=method, granularity="weight", removed=one, mean=True, head=head
                        )
                        for head in (True, False)
                    )
                )
                for one in REMOVED
            ]  # fmt: skip
            lines.append(
                f"| {NAMES[method]} | {measure} | " + " | ".join(percent(one, signed=True) for one in found) + " |"
            )
    parts += [
        "## The head pruned too, as in the paper",
        "Change by pruning the head as well (with the mean). What is gained in “target” and not “among” is that the "
        "other labels are no longer given.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


@styled
def drawn(cells: Cells, path: Path) -> None:
    """Draw accuracy among the target classes against the share removed, before fine-tuning."""
    figure = new_figure("Accuracy among three classes, the rest pruned away", 6.6)
    rows = figure.subplots(2, 2, sharex=True, sharey=True)
    whole = interval(cells.values("among", method="nothing removed").values())[0]
    for granularity, axes_of_row in zip(METHODS, rows, strict=True):
        for mean, axes in zip((False, True), axes_of_row, strict=True):
            axes.axhline(whole, color="0.6", linewidth=1)
            for method in METHODS[granularity]:
                key = {"method": method, "granularity": granularity, "mean": mean, "head": False}
                found = [interval(cells.values("among", removed=one, **key).values()) for one in REMOVED]
                draw_curve(axes, REMOVED, method, found)
            axes.set_title(f"{granularity}s, {'mean given' if mean else 'no mean'}")
            axes.set_ylim(0.25, 1)
            axes.xaxis.set_major_formatter(PERCENT)
            axes.yaxis.set_major_formatter(PERCENT)
    for axes in rows[-1]:
        axes.set_xlabel("removed from each layer (%)")
    for axes in rows[:, 0]:
        axes.set_ylabel("accuracy (%)")
    seeds = len({cell["seed"] for cell in cells.cells})
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside lower left", alignment="left",
        title=f"before fine-tuning; {seeds} seeds, 450 images each; bands: 95 % over seeds",
    )  # fmt: skip
    written(path, figure)


def main() -> None:
    """Measure what is missing and write it up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/ and test/ of class folders")
    parser.add_argument("--cifar_resnet", type=Path, required=True, help="checkpoint of pytorch_resnet_cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/nnslicer_pruning"))
    parser.add_argument("--report_only", action="store_true", help="write up what is done")
    args = parser.parse_args()
    settings = {"model": args.cifar_resnet.name, "removed": REMOVED, "tuned": TUNED, "torch": torch.__version__}
    cells = Cells(args.output.with_suffix(".json"), settings)
    if not args.report_only:
        model, images = cifar_resnet(args.cifar_resnet).eval(), Images(args.cifar)
        for seed in args.seeds:
            measure_seed(seed, model, images, cells)
    args.output.with_suffix(".md").write_text(written_up(cells))
    drawn(cells, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
