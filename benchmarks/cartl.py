r"""Does a robust teacher's robustness survive a clean fine-tuning of its last units? CARTL's ablation, on small nets.

    python benchmarks/cartl.py --cifar <folder with train/ and test/> --work_dir work --seeds 0 1 2

The teachers: a small WideResNet from random weights (`--depth`, `--width`), or with `--cifar_resnet resnet20.th` a
public CIFAR ResNet, trained adversarially on the classes 0 to 4, without (AT) and with the feature distance before the
last k units (AT+FDM). The students learn the classes 5 to 9 from clean images: the last k units as they are (TL), or
bounded (NEFT). Measured: accuracy, PGD-100 and, with `--auto_attack`, an AutoAttack of parts, on the test images of
those classes. Below the table stands whether the three are in the order of the paper's slides, which takes three seeds.

Batch norms of the trained units keep the teacher's statistics: with `--submodel_statistics update`, as in the published
code, the norm right behind a bounded convolution cancels its beta, which the table says too.

Writes benchmarks/results/cartl.{json,md} row by row; killed, it goes on where it was. Teachers lie in the work folder
under a hash of all that they are made of, so that runs of other students share them. Hours on two cores. `--smoke`
takes a few steps on a few images and writes into the work folder.
"""

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from remos_hf import ImageClassifier, ImageInput, ImageTask, with_new_head
from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import drawn
from remos_hf.auditing.fingerprint import fingerprint
from remos_hf.evaluation.measures import rate_of
from remos_hf.evaluation.over_seeds import MIN_SEEDS, rate_over_seeds
from remos_hf.evaluation.robustness import Pgd, pgd_robustness
from remos_hf.randomness import seeded
from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.neft import Neft
from remos_hf.training.accelerate_loop import fit
from remos_hf.whole import replace_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from audit_image_defects import cifar_resnet  # noqa: E402 - the CIFAR net of the example

logger = logging.getLogger("cartl")
ORDER = ("AT+TL", "AT+NEFT", "AT+FDM+NEFT")  # robustness as in the slides, where k is 4 and 6 of 17 units
# What decides a teacher, beside its images, its seed and the weights that it starts from.
OF_TEACHERS = ("net", "size", "teacher_steps", "batch_size", "teacher_learning_rate", "attack_steps")
ROBUSTNESS = {"pgd": "PGD", "auto_attack": "AutoAttack of parts"}


class WideBlock(nn.Module):
    """Two convolutions behind their norms, beside a shortcut."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(narrow), nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(wide), nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shortcut = None if narrow == wide else nn.Conv2d(narrow, wide, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Give feature maps, shape (samples, wide, height / stride, width / stride)."""
        first = torch.relu(self.bn1(maps))
        residual = self.conv2(torch.relu(self.bn2(self.conv1(first))))
        return residual + (maps if self.shortcut is None else self.shortcut(first))


class WideResNet(nn.Module):
    """The WideResNet of Zagoruyko and Komodakis (2016), WRN-depth-width, of three stages and random weights.

    Args:
        depth: 4 more than 6 times the blocks of a stage.
        width: Times 16, 32 and 64 channels.
        seed: Of the weights.
    """

    def __init__(self, depth: int, width: int, seed: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks, left = divmod(depth - 4, 6)
        if blocks < 1 or left or width < 1:
            raise SystemExit(f"--depth is 10, 16, 22, ... and --width at least 1, but got {depth} and {width}.")
        with seeded(seed):
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.layer1, self.layer2, self.layer3 = (
                nn.Sequential(WideBlock(narrow, wide, stride), *(WideBlock(wide, wide, 1) for _ in range(blocks - 1)))
                for narrow, wide, stride in (
                    (16, 16 * width, 1),
                    (16 * width, 32 * width, 2),
                    (32 * width, 64 * width, 2),
                )
            )
            self.bn = nn.BatchNorm2d(64 * width)
            self.linear = nn.Linear(64 * width, num_classes)
            for one in self.modules():
                if isinstance(one, nn.Conv2d):
                    nn.init.kaiming_normal_(one.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Give logits, shape (samples, classes), of normalised images."""
        maps = self.layer3(self.layer2(self.layer1(self.conv1(inputs))))
        return self.linear(torch.relu(self.bn(maps)).mean((2, 3)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument(
        "--cifar_resnet", type=Path, help="checkpoint of pytorch_resnet_cifar10, instead of a WideResNet"
    )
    parser.add_argument("--depth", type=int, default=16, help="of the WideResNet: 10, 16, 22, ...")
    parser.add_argument("--width", type=int, default=1, help="of the WideResNet: times 16, 32 and 64 channels")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cartl")
    parser.add_argument("--size", type=int, default=32, help="side of the images; below 32 their middle is cut out")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 6], help="units that a student trains: of 8 (WRN-16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_source", type=int, default=8000)
    parser.add_argument("--num_target", type=int, default=4000)
    parser.add_argument("--num_test", type=int, default=400)
    parser.add_argument("--teacher_steps", type=int, default=800)
    parser.add_argument("--student_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--teacher_learning_rate", type=float, help="default: .1 from random weights, else the same")
    parser.add_argument("--beta", type=float, default=0.4)
    parser.add_argument("--weight", type=float, default=0.64, help="of the feature distance, a mean over the batch")
    parser.add_argument("--attack_steps", type=int, default=7, help="of adversarial training")
    parser.add_argument("--pgd_steps", type=int, default=100)
    parser.add_argument("--submodel_statistics", choices=["reuse", "update"], default="reuse")
    parser.add_argument("--no_mix", action="store_true")
    parser.add_argument("--auto_attack", action="store_true", help="needs remos_hf[robustness]")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.teacher_learning_rate is None:
        args.teacher_learning_rate = 0.1 if args.cifar_resnet is None else args.learning_rate
    args.net = args.cifar_resnet.stem if args.cifar_resnet else f"WRN-{args.depth}-{args.width}"
    if args.smoke:
        few = {"num_source": 40, "num_target": 40, "num_test": 12, "teacher_steps": 2, "student_steps": 2, "k": [3]}
        few |= {"batch_size": 8, "attack_steps": 1, "pgd_steps": 2, "size": 24, "output": args.work_dir / "smoke"}
        vars(args).update({name: one for name, one in few.items() if getattr(args, name) == parser.get_default(name)})
    return args


@cache
def images_in(folder: Path) -> Dataset:
    """Read a folder of classes, once."""
    return read_folder(folder)


def classes(folder: Path, numbers: range, count: int, seed: int) -> Dataset:
    """Draw images of some classes; their labels are counted from 0."""
    dataset = images_in(folder)
    labels = dataset["label"]
    dataset = dataset.select([row for row, label in enumerate(labels) if label in numbers])
    names = [dataset.features["label"].names[number] for number in numbers]
    moved = [label - numbers.start for label in dataset["label"]]
    dataset = dataset.remove_columns("label").add_column("label", moved, feature=ClassLabel(names=names))
    return drawn(dataset, count, seed)


def trained(
    model: nn.Module,
    data: torch.utils.data.Dataset,
    strategy: Strategy,
    steps: int,
    learning_rate: float,
    args: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Train a model in place by SGD, as CARTL does, with a cosine to 0; give what the record says."""
    begun = time.perf_counter()

    def optimizer(student: nn.Module) -> torch.optim.Optimizer:
        trains = [one for one in student.parameters() if one.requires_grad]
        return torch.optim.SGD(trains, learning_rate, momentum=0.9, weight_decay=5e-4)

    fitted = fit(
        model,
        data,
        strategy=strategy,
        optimizer=optimizer,
        scheduler=lambda made, total: torch.optim.lr_scheduler.CosineAnnealingLR(made, total),
        max_steps=steps,
        batch_size=args.batch_size,
        seed=seed,
        progress=False,
    )
    config = fitted.sidecars.config
    seconds = round(time.perf_counter() - begun, 1)
    return {"seconds": seconds, "start": config.get("start"), "finish": config.get("finish"), "steps": fitted.steps}


class Rows:
    """The file of results: what is in it is not made again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, settings = args.output.with_suffix(".json"), vars(args)
        self.settings = {
            name: one
            for name, one in settings.items()
            if not isinstance(one, Path) and name not in ("seeds", "smoke", "cifar_resnet", "depth", "width")
        }
        known = json.loads(self.path.read_text()) if self.path.is_file() else {"settings": self.settings, "rows": {}}
        if known["settings"] != self.settings:
            raise SystemExit(f"{self.path} was made with other settings ({known['settings']}). Name another --output.")
        self.rows: dict[str, Any] = known["rows"]

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Write one more row."""
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/cartl.py --cifar <folder> --work_dir <folder>"
        found = {"command": command, "settings": self.settings, "rows": self.rows}
        replace_file(self.path, (json.dumps(found, indent=1) + "\n").encode())
        replace_file(self.path.with_suffix(".md"), self.table().encode())

    def last(self) -> str:
        """Give the line of the table that was added last."""
        return [line for line in self.table().splitlines() if line.startswith("|")][-1]

    def table(self) -> str:
        """Put the rows into a table, and below it what was cancelled and whether the order holds."""
        lines = [
            "| model | units | seed | accuracy | PGD | AutoAttack of parts | images | beta cancelled in |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows.values():
            rates = [row["pgd"]["acc"], row["pgd"]["robust_acc"], row.get("auto_attack", {}).get("robust_acc")]
            told = ["-" if one is None else f"{one['value']:.1%}" for one in rates]
            bounded, cancelled = bounded_and_cancelled(row)
            told += [rates[0]["num_samples"], f"{len(cancelled)} of {len(bounded)} layers" if bounded else "-"]
            cells = [row["model"], row["k"] or "-", row["seed"], *told]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        rows = list(self.rows.values())
        said = [*cancelled_told(rows), *order_told(rows)]
        return f"# CARTL on {self.settings['net']}\n\n" + "\n".join(lines) + "\n\n" + "\n".join(said) + "\n"


def bounded_and_cancelled(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Name the layers that beta bounds, and those of them behind which a norm takes it out again."""
    told = (row.get("start") or {}).get("neft", {})
    return told.get("bounded", []), told.get("beta_cancelled", [])


def cancelled_told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say behind which layers beta does nothing, once for each k."""
    found = {row["k"]: bounded_and_cancelled(row)[1] for row in rows if bounded_and_cancelled(row)[0]}
    return [
        f"- k={k}: beta does nothing in {', '.join(names)}: the norm right behind takes the statistics of its input."
        if names
        else f"- k={k}: no norm cancels beta."
        for k, names in sorted(found.items())
    ]


def order_told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say for each k and attack whether each of the three is more robust than the one before, as in the slides."""
    told = []
    for k in sorted({row["k"] for row in rows if row["model"] in ORDER}):
        for attack, name in ROBUSTNESS.items():
            by_seed = {
                (row["model"], row["seed"]): rate_of(row[attack]["robust_acc"])
                for row in rows
                if row["k"] == k and attack in row
            }
            seeds = sorted(seed for model, seed in by_seed if model == ORDER[0])
            seeds = [seed for seed in seeds if all((model, seed) in by_seed for model in ORDER)]
            if seeds:
                told.append(f"- k={k}, {name}: {_order(by_seed, seeds)}")
    return told


def _order(by_seed: Mapping[tuple[str, int], Any], seeds: Sequence[int]) -> str:
    means = {model: rate_over_seeds([by_seed[model, seed] for seed in seeds]) for model in ORDER}
    told = ", ".join(f"{model} {mean.value:.1%}" for model, mean in means.items())
    told += f" ({'means of ' * (len(seeds) > 1)}{len(seeds)} seed{'s' * (len(seeds) > 1)}). "
    if len(seeds) < MIN_SEEDS:
        return f"{told}Whether the slides' order holds cannot be said below {MIN_SEEDS} seeds."
    pairs = list(pairwise(means.items()))
    for (one, before), (other, after) in pairs:
        if after.high < before.low:
            return f"{told}The slides' order does not hold: {other} is below {one}."
    for (one, before), (other, after) in pairs:
        if after.low <= before.high:
            return f"{told}Whether the slides' order holds cannot be said: the intervals of {one} and {other} overlap."
    return f"{told}The slides' order holds."


def measured(model: nn.Module, test: Dataset, task: ImageTask, args: argparse.Namespace) -> dict[str, Any]:
    """Measure accuracy and robustness."""
    found = {"pgd": pgd_robustness(model, test, task, Pgd(steps=args.pgd_steps, batch_size=100))}
    if args.auto_attack:
        from remos_hf.evaluation.auto_attack import auto_attack_robustness

        few = {"steps": 2, "queries": 2} if args.smoke else {}
        found["auto_attack"] = auto_attack_robustness(model, test, task, **few)
    return found


def fresh_net(args: argparse.Namespace, seed: int) -> nn.Module:
    """Give what a teacher is trained from, with a head for five classes."""
    net = cifar_resnet(args.cifar_resnet) if args.cifar_resnet else WideResNet(args.depth, args.width, seed)
    return with_new_head(ImageClassifier(net, head=("linear",)), 5, seed=seed)


def teacher_of(k: int | None, seed: int, task: ImageTask, args: argparse.Namespace, rows: Rows) -> nn.Module:
    """Read or make a robust teacher of the classes 0 to 4."""
    name = f"teacher-{'at' if k is None else f'fdm-{k}'}-seed-{seed}"
    model = fresh_net(args, seed)
    source = classes(args.cifar / "train", range(5), args.num_source, seed)
    of = {**{one: getattr(args, one) for one in OF_TEACHERS}, "k": k, "seed": seed, "images": fingerprint(source)}
    of |= {} if k is None else {"weight": args.weight}
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode() + save(model.state_dict())).hexdigest()[:12]
    path = args.work_dir / f"{name}-{digest}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            made = json.loads(file.metadata()["made"])
        model.load_state_dict(load_file(path))
    else:
        images = {"mean": task.images.mean, "std": task.images.std}
        strategy = AdversarialTraining(k, weight=args.weight, steps=args.attack_steps, seed=seed, **images)
        made = trained(
            model, task.prepare(source), strategy, args.teacher_steps, args.teacher_learning_rate, args, seed
        )
        args.work_dir.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(model.state_dict(), {"made": json.dumps(made)}))
    if name not in rows.rows:
        test = classes(args.cifar / "test", range(5), args.num_test, 0)
        kind = "AT (teacher)" if k is None else "AT+FDM (teacher)"
        rows.keep(name, {"model": kind, "k": k, "seed": seed, **made, **measured(model.eval(), test, task, args)})
        logger.warning("%s: %s", name, rows.last())
    return model.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, and write it down."""
    args = parse_args(argv)
    rows = Rows(args)
    task = ImageTask(ImageInput(size=(args.size, args.size), crop_share=args.size / 32), batch_size=100)
    for seed in args.seeds:
        target = classes(args.cifar / "train", range(5, 10), args.num_target, seed)
        test = classes(args.cifar / "test", range(5, 10), args.num_test, 0)
        for k in args.k:
            for kind in ORDER:
                name = f"{kind}-{k}-seed-{seed}"
                if name in rows.rows:
                    continue
                teacher = teacher_of(k if "FDM" in kind else None, seed, task, args, rows)
                student = with_new_head(teacher, 5, seed=seed)
                bounded = {"beta": args.beta, "mix": not args.no_mix} if "NEFT" in kind else {"beta": None}
                strategy = Neft(k, submodel_statistics=args.submodel_statistics, seed=seed, **bounded)
                made = trained(
                    student, task.prepare(target), strategy, args.student_steps, args.learning_rate, args, seed
                )
                row = {"model": kind, "k": k, "seed": seed, **made, **measured(student.eval(), test, task, args)}
                rows.keep(name, row)
                logger.warning("%s: %s", name, rows.last())


if __name__ == "__main__":
    main()
