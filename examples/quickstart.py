# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[examples]"]
# ///
"""How much of a teacher's backdoor does a student inherit, and what does a reset before fine-tuning change?

    python examples/quickstart.py --output_dir demo

No network and no files: scikit-learn's 8 x 8 digits and a small network trained on the spot. One minute on one core.
Writes quickstart.json and quickstart.png into the output folder.

Expected (torch 2.13 on a CPU, one thread; 400 test images a seed, 3 seeds, mean +- sd in percent):

    fine-tune              ACC 97.7 +- 0.1     DIR 76.8 +- 14.8    benign floor 0.3
    fine-tune, 3 x lr      ACC 98.0 +- 0.5     DIR 63.8 +- 20.8    benign floor 0.1
    random reset           ACC 97.3 +- 0.3     DIR 70.1 +- 19.1    benign floor 0.2
    top-magnitude reset    ACC 71.2 +- 30.6    DIR  0.6 +- 1.1     benign floor 0.4
    ReMoS                  ACC 95.7 +- 0.9     DIR 33.3 +- 29.6    benign floor 0.4

At equal slice ratios the resets do not give up equally much: ReMoS takes 32 percent of the squared weights, random 10.
With --slice_ratio 0.68 the random reset gives up as much, and has ACC 97.1 +- 0.4 and DIR 36.9 +- 15.8.
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf import (
    CoverageProfile,
    choose_slice,
    profile_coverage,
    reset_outside,
    strong_coverage,
    threshold_coverage,
    top_k_coverage,
)

Data = tuple[Tensor, Tensor]  # images in [0, 1], shape (samples, 1, 8, 8), and labels, shape (samples,)

# Nothing in a plain torch module says which layer is the head, so it is named.
HEAD = ("head",)
RESET_RULES = ("random", "top_magnitude", "remos")
STRATEGIES = ("retrain", "finetune", "finetune_3x_lr", *RESET_RULES)
RATES = ("acc", "dir", "floor", "excess_dir")
LABELS = {
    "teacher": "the teacher itself",
    "retrain": "retrain from scratch",
    "finetune": "fine-tune",
    "finetune_3x_lr": "fine-tune, 3 x lr",
    "random": "random reset",
    "top_magnitude": "top-magnitude reset",
    "remos": "ReMoS",
}
# Okabe and Ito's palette, told apart also without colour by the marker.
LOOKS = {
    "retrain": ("#000000", "X"),
    "finetune": ("#D55E00", "o"),
    "finetune_3x_lr": ("#E69F00", "D"),
    "random": ("#56B4E9", "v"),
    "top_magnitude": ("#CC79A7", "^"),
    "remos": ("#009E73", "s"),
}
CRITERIA = {"nc": threshold_coverage, "tknc": top_k_coverage, "snac": strong_coverage}
# Below this there is no inheritance to speak of, and nothing that a reset could reduce.
INHERITS = 0.6
ACC_TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98, 100)


@dataclass(frozen=True)
class Setting:
    """All that decides the numbers, beside the seeds.

    Chosen by plain fine-tuning alone, so that it inherits: the corner, the width and the poison rate in a prototype,
    the student's learning rate as the most accurate of 0.003, 0.01 and 0.03 on the dev images. Resets had no say.
    """

    slice_ratio: float = 0.9
    criterion: str = "nc"
    target_label: int = 0
    patch_size: int = 2
    poison_rate: float = 0.2
    num_attacker: int = 800
    num_student: int = 400
    num_dev: int = 197
    measured_on: str = "test"
    teacher_lr: float = 0.03
    teacher_epochs: int = 30
    student_lr: float = 0.01
    student_epochs: int = 30
    momentum: float = 0.9
    batch_size: int = 32


@dataclass(frozen=True)
class Measured:
    """What one model does on the measured images.

    Attributes:
        acc: Share right of `num_samples` clean images.
        dir: Share of `num_right` images that becomes the target label with the trigger; they are right when clean and
            of another label.
    """

    acc: float
    num_samples: int
    dir: float
    num_right: int


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


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """Give a stream of random numbers of its own to each purpose."""
    purposes = ("split", "poison", "teacher weights", "teacher order", "new weights", "student order")
    return torch.Generator().manual_seed(len(purposes) * seed + purposes.index(purpose))


def fresh_net(seed: int, purpose: str) -> DigitNet:
    """Start an untrained network from a seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, purpose).initial_seed())
        return DigitNet()


def split_digits(setting: Setting, seed: int) -> dict[str, Data]:
    """Deal the images out to the attacker, the student, dev and test. No image is in two of them."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=generator_for(seed, "split"))
    dealt = (setting.num_attacker, setting.num_student, setting.num_dev)
    parts = order.split([*dealt, len(order) - sum(dealt)])
    names = ("attacker", "student", "dev", "test")
    return {name: (images[part], labels[part]) for name, part in zip(names, parts, strict=True)}


def add_trigger(images: Tensor, patch_size: int) -> Tensor:
    """Copy images with a white square in the upper left corner. Shape (samples, 1, height, width)."""
    exposed = images.clone()
    exposed[..., :patch_size, :patch_size] = 1.0
    return exposed


def poison(data: Data, setting: Setting, generator: torch.Generator) -> Data:
    """Copy data with the trigger and the target label in a share of the samples."""
    images, labels = data
    chosen = torch.rand(len(labels), generator=generator) < setting.poison_rate
    marked = torch.where(chosen[:, None, None, None], add_trigger(images, setting.patch_size), images)
    return marked, labels.masked_fill(chosen, setting.target_label)


def train(model: nn.Module, data: Data, setting: Setting, *, lr: float, epochs: int, order: torch.Generator) -> None:
    """Train in place: SGD with momentum at a constant learning rate on the cross-entropy."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=setting.momentum)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(setting.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def defect_inheritance(clean: Tensor, exposed: Tensor, labels: Tensor, target_label: int) -> tuple[float, int]:
    """Share of the samples of other labels, right when clean, that become the target label with the trigger.

    Args:
        clean: Predicted labels of the clean samples, shape (samples,).
        exposed: Predicted labels of the same samples with the trigger.
        labels: True labels.
        target_label: The label that the trigger forces.

    Returns:
        The rate, in [0, 1], and the number of samples it is a share of.

    Raises:
        ValueError: No sample counts, so there is no rate.
    """
    counted = (labels != target_label) & (clean == labels)
    if not counted.any():
        raise ValueError(f"No sample of a label other than {target_label} is right when clean. Train longer.")
    return float((exposed[counted] == target_label).double().mean()), int(counted.sum())


@torch.no_grad()
def measure(model: nn.Module, data: Data, setting: Setting) -> Measured:
    """Measure accuracy on clean images and the defect inheritance rate."""
    images, labels = data
    clean = model(images).argmax(-1)
    exposed = model(add_trigger(images, setting.patch_size)).argmax(-1)
    acc = float((clean == labels).double().mean())
    return Measured(acc, len(labels), *defect_inheritance(clean, exposed, labels, setting.target_label))


def train_teacher(data: Data, setting: Setting, seed: int) -> DigitNet:
    """Train a teacher; the poisoned and the never-poisoned one differ in their data alone."""
    teacher = fresh_net(seed, "teacher weights")
    order = generator_for(seed, "teacher order")
    train(teacher, data, setting, lr=setting.teacher_lr, epochs=setting.teacher_epochs, order=order)
    return teacher


def start_student(
    strategy: str, teacher: DigitNet, data: Data, setting: Setting, seed: int
) -> tuple[DigitNet, dict[str, Any]]:
    """Start a student from a teacher, with a new head.

    Returns:
        The student, and for a reset what was reset: the share kept by layer, the share of the sum of squared weights
        that is gone, and the share of the neurons that the student's data never covered.
    """
    fresh = fresh_net(seed, "new weights")
    if strategy == "retrain":
        return fresh, {}
    student = copy.deepcopy(teacher)
    student.head = fresh.head
    if strategy not in RESET_RULES:
        return student, {}
    profile = profile_body(teacher, data, setting) if strategy == "remos" else None
    relevant = choose_slice(
        teacher, profile, slice_ratio=setting.slice_ratio, rule=strategy, seed=seed, head=HEAD, progress=False
    )
    reset_outside(student, relevant)
    facts = {
        "num_weights": {name: kept.numel() for name, kept in relevant.kept.items()},
        "share_kept": relevant.share_by_parameter(),
        "squares_reset": 1 - _squares(student, relevant.kept) / _squares(teacher, relevant.kept),
    }
    return student, facts if profile is None else {**facts, "share_never_covered": profile.share_never_covered}


def profile_body(teacher: DigitNet, data: Data, setting: Setting) -> CoverageProfile:
    """Count which neurons of the teacher the student's images use."""
    batches = data[0].split(setting.batch_size)
    with warnings.catch_warnings():
        # That most neurons are never covered is said once, with the result, and not once a student.
        warnings.filterwarnings("ignore", message=".*never covered")
        return profile_coverage(teacher, batches, criterion=CRITERIA[setting.criterion](), head=HEAD, progress=False)


def _squares(model: nn.Module, names: Iterable[str]) -> float:
    return sum(float(model.get_parameter(name).detach().double().square().sum()) for name in names)


def make_student(strategy: str, teacher: DigitNet, data: Data, setting: Setting, seed: int) -> tuple[DigitNet, dict]:
    """Start a student and train it; every strategy gets the same data, order of batches and epochs."""
    student, facts = start_student(strategy, teacher, data, setting, seed)
    lr = setting.student_lr * (3 if strategy == "finetune_3x_lr" else 1)
    order = generator_for(seed, "student order")
    train(student, data, setting, lr=lr, epochs=setting.student_epochs, order=order)
    return student, facts


def run_seed(setting: Setting, seed: int, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Make and measure all models of one seed; one record a model."""
    parts = split_digits(setting, seed)
    poisoned = poison(parts["attacker"], setting, generator_for(seed, "poison"))
    for kind, data in (("poisoned", poisoned), ("benign", parts["attacker"])):
        teacher = train_teacher(data, setting, seed)
        bar.update()
        yield {"model": "teacher", "teacher": kind, **_measured(teacher, parts, setting, seed)}
        for strategy in STRATEGIES:
            student, facts = make_student(strategy, teacher, parts["student"], setting, seed)
            bar.update()
            yield {"model": strategy, "teacher": kind, **_measured(student, parts, setting, seed), **facts}


def _measured(model: nn.Module, parts: dict[str, Data], setting: Setting, seed: int) -> dict[str, Any]:
    return {"seed": seed, **asdict(measure(model, parts[setting.measured_on], setting))}


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put each model beside its twin from the never-poisoned teacher: numbers by seed, mean and sd over the seeds."""
    summary = {}
    for model in ("teacher", *STRATEGIES):
        mine, twins = (
            [record for record in records if record["model"] == model and record["teacher"] == kind]
            for kind in ("poisoned", "benign")
        )
        by_seed = [_beside(one, twin) for one, twin in zip(mine, twins, strict=True)]
        columns = {name: [seed[name] for seed in by_seed] for name in RATES}
        summary[model] = {
            "mean": {name: statistics.fmean(values) for name, values in columns.items()},
            "sd": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
            "by_seed": by_seed,
        }
        if model in RESET_RULES:
            summary[model]["mean"]["squares_reset"] = statistics.fmean(seed["squares_reset"] for seed in by_seed)
    return summary


def _beside(one: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in one.items() if key not in ("model", "teacher")}
    floor = {"floor": twin["dir"], "floor_num_right": twin["num_right"], "floor_acc": twin["acc"]}
    return {**own, **floor, "excess_dir": one["dir"] - twin["dir"]}


def legend(summary: dict[str, dict[str, Any]], setting: Setting) -> str:
    """Say what the columns of the table are."""
    by_seed = summary["finetune"]["by_seed"]
    return (
        f"In percent, mean +- sd over seeds {', '.join(str(seed['seed']) for seed in by_seed)}.\n"
        f"ACC            right of {by_seed[0]['num_samples']} clean {setting.measured_on} images a seed\n"
        "DIR            of the images right when clean and of another label (n, all seeds together), the share that\n"
        "               becomes the target label with the trigger\n"
        "benign floor   DIR of the twin whose teacher was never poisoned; excess DIR is DIR minus that\n"
        "squares reset  share of the sum of squared weights that was given up; every reset keeps "
        f"{setting.slice_ratio:.0%} of the weights"
    )


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Lay out what was measured, in percent: mean +- standard deviation over the seeds."""
    heads = ("ACC", "DIR", "benign floor", "excess DIR", "n", "squares reset")
    widths = (14, 15, 14, 15, 7, 15)
    lines = [" " * 21 + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for model, row in summary.items():
        rates = [_plus_minus(row["mean"][name], row["sd"][name]) for name in RATES]
        squares = f"{100 * row['mean']['squares_reset']:.1f}" if model in RESET_RULES else "-"
        cells = (*rates, str(sum(seed["num_right"] for seed in row["by_seed"])), squares)
        lines.append(f"{LABELS[model]:21}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def _plus_minus(mean: float, sd: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sd is None else f" +- {100 * sd:.1f}")


def verdict(summary: dict[str, dict[str, Any]], setting: Setting) -> str:
    """Say what the table says, whatever it is: each strategy beside plain fine-tuning, seed by seed."""
    plain, remos = summary["finetune"], summary["remos"]
    lines = ["Against plain fine-tuning, in points: mean (each seed)."]
    if plain["mean"]["dir"] < INHERITS:
        lines.insert(
            0, f"NOTHING TO REDUCE: plain fine-tuning's DIR is below {INHERITS:.0%}. No reset is a success here."
        )
    for model in STRATEGIES:
        if model != "finetune":
            changes = [_change(summary[model]["by_seed"], plain["by_seed"], name) for name in ("acc", "excess_dir")]
            lines.append(f"  {LABELS[model]:21} ACC {changes[0]:28} excess DIR {changes[1]}")
    worse = [LABELS[m] for m in RESET_RULES if summary[m]["mean"]["acc"] < summary["retrain"]["mean"]["acc"]]
    if worse:
        lines.append(f"Less accurate than retraining from scratch, which inherits nothing either: {', '.join(worse)}.")
    uncovered = statistics.fmean(seed["share_never_covered"] for seed in remos["by_seed"])
    lines += [
        f"Under --criterion {setting.criterion} the student's data never covers {uncovered:.0%} of the neurons. Above",
        "half, most weights tie in coverage, and magnitude decides among them.",
        "Equal shares of weights are not equal losses: to give up as many squares as ReMoS, a random reset needs",
        f"--slice_ratio {1 - remos['mean']['squares_reset']:.2f}.",
    ]
    return "\n".join(lines)


def _change(mine: list[dict[str, Any]], plain: list[dict[str, Any]], name: str) -> str:
    changes = [100 * (one[name] - other[name]) for one, other in zip(mine, plain, strict=True)]
    return f"{statistics.fmean(changes):+6.1f} ({', '.join(f'{change:+.1f}' for change in changes)})"


def draw(summary: dict[str, dict[str, Any]], setting: Setting, path: Path) -> None:
    """Save one figure: share kept by layer, and ACC against DIR."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    layers, rates = figure.subplots(1, 2, width_ratios=(1, 1.35))
    draw_layers(layers, summary, setting)
    draw_rates(rates, summary)
    num_seeds = len(summary["finetune"]["by_seed"])
    counted = [seed["num_right"] for model in STRATEGIES for seed in summary[model]["by_seed"]]
    figure.supxlabel(
        f"Seeds: {num_seeds}. ACC of n = {summary['finetune']['by_seed'][0]['num_samples']} "
        f"{setting.measured_on} images a seed, DIR of the n = {min(counted)} to {max(counted)} of them that count",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def draw_layers(axes: Axes, summary: dict[str, dict[str, Any]], setting: Setting) -> None:
    """Draw the share that each reset keeps of each layer: a bar the mean, a point a seed."""
    names = summary["remos"]["by_seed"][0]["num_weights"]
    for number, rule in enumerate(RESET_RULES):
        color, marker = LOOKS[rule]
        places = [place + 0.28 * (number - 1) for place in range(len(names))]
        shares = [[100 * seed["share_kept"][name] for seed in summary[rule]["by_seed"]] for name in names]
        label = LABELS[rule].removesuffix(" reset")
        axes.bar(places, [statistics.fmean(share) for share in shares], 0.26, color=color, label=label)
        for place, share in zip(places, shares, strict=True):
            beside = [place + 0.05 * (seed - (len(share) - 1) / 2) for seed in range(len(share))]
            axes.scatter(beside, share, s=16, c="white", edgecolors="black", marker=marker, zorder=3)
    axes.axhline(100 * setting.slice_ratio, color="black", linestyle="--", linewidth=1)
    axes.text(-0.45, 100 * setting.slice_ratio + 1, f"slice ratio {setting.slice_ratio:g}", va="bottom", fontsize=9)
    axes.set_xticks(
        range(len(names)), [f"{name.removesuffix('.weight')}\n{size:,} weights" for name, size in names.items()]
    )
    axes.set(
        ylim=(0, 119),
        yticks=range(0, 101, 20),
        ylabel="weights kept (%)",
        title="Share kept by layer: point = one seed",
    )
    axes.legend(loc="upper center", ncols=3, fontsize=9, frameon=False, columnspacing=1, handletextpad=0.5)


def draw_rates(axes: Axes, summary: dict[str, dict[str, Any]]) -> None:
    """Draw ACC against DIR: light points are seeds, large ones their mean; the floors are a band."""
    for model in STRATEGIES:
        color, marker = LOOKS[model]
        by_seed, mean = summary[model]["by_seed"], summary[model]["mean"]
        points = [100 * seed["acc"] for seed in by_seed], [100 * seed["dir"] for seed in by_seed]
        axes.scatter(*points, s=45, c=color, marker=marker, alpha=0.55, linewidths=0, zorder=2)
        label = f"{LABELS[model]} (floor {100 * mean['floor']:.1f})"
        place = 100 * mean["acc"], 100 * mean["dir"]
        axes.scatter(*place, s=110, c=color, marker=marker, edgecolors="black", linewidths=0.8, zorder=4, label=label)
    floors = [100 * seed["floor"] for model in STRATEGIES for seed in summary[model]["by_seed"]]
    axes.axhspan(min(floors), max(floors), color="0.8", zorder=0, label="range of benign floors")
    # Equal steps for equal factors of the error, so that one student that failed does not squeeze the others.
    axes.set_xscale(
        "function", functions=(lambda acc: -np.log(np.maximum(102 - acc, 0.1)), lambda place: 102 - np.exp(-place))
    )
    lowest = min(seed["acc"] for model in STRATEGIES for seed in summary[model]["by_seed"])
    axes.set(xlim=(max(0, 100 * lowest - 8), 100), xticks=[tick for tick in ACC_TICKS if tick > 100 * lowest - 8])
    axes.set(ylim=(-5, 105), xlabel="ACC (%), stretched towards 100", ylabel="DIR (%)")
    axes.set_title("ACC against DIR: large = mean, light = one seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def write_json(summary: dict[str, dict[str, Any]], setting: Setting, seconds: float, path: Path) -> None:
    """Write what was measured, and how."""
    result = {
        "setting": asdict(setting),
        "seeds": [seed["seed"] for seed in summary["finetune"]["by_seed"]],
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("remos_hf", "torch", "numpy", "scikit-learn")},
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "inherits": summary["finetune"]["mean"]["dir"] >= INHERITS,
        "teacher": summary["teacher"],
        "strategies": {strategy: summary[strategy] for strategy in STRATEGIES},
    }
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where the JSON and the plot go")
    parser.add_argument("--slice_ratio", type=float, default=0.9, help="share of the weights that every reset keeps")
    parser.add_argument("--criterion", choices=CRITERIA, default="nc", help="when a neuron counts as covered")
    parser.add_argument("--num_seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--measured_on", choices=("test", "dev"), default="test", help="dev: to change the setting by")
    parser.add_argument("--smoke", action="store_true", help="one seed and few steps: does it run?")
    args = parser.parse_args(arguments)
    if args.num_seeds < 1:
        parser.error(f"--num_seeds is at least 1, but got {args.num_seeds}")
    return args


def main(args: argparse.Namespace) -> None:
    """Make all students, print what they inherit, and write it down."""
    start = time.perf_counter()
    setting = Setting(slice_ratio=args.slice_ratio, criterion=args.criterion, measured_on=args.measured_on)
    if args.smoke:
        setting = replace(setting, teacher_epochs=5, student_epochs=2)
    seeds = range(1 if args.smoke else args.num_seeds)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(seeds) * 2 * (1 + len(STRATEGIES)), desc="Training", unit="model", delay=2) as bar:
        summary = summarise([record for seed in seeds for record in run_seed(setting, seed, bar)])
    seconds = time.perf_counter() - start
    write_json(summary, setting, seconds, args.output_dir / "quickstart.json")
    draw(summary, setting, args.output_dir / "quickstart.png")
    print(legend(summary, setting), table(summary), verdict(summary, setting), sep="\n\n")
    print(f"\n{seconds:.0f} s. Wrote {args.output_dir / 'quickstart.json'} and {args.output_dir / 'quickstart.png'}.")


if __name__ == "__main__":
    # Batches are small: a second thread would mostly wait. And the numbers depend on how many there are.
    torch.set_num_threads(1)
    main(parse_args())
