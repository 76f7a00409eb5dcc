r"""Does a robust teacher's robustness survive a clean fine-tuning of its last units? CARTL's ablation, on small nets.

    python benchmarks/cartl.py --cifar <folder with train/ and test/> --cifar_resnet resnet20.th --work_dir work

The teachers: a public CIFAR ResNet trained on adversarially on the classes 0 to 4, without (AT) and with the feature
distance before the last k units (AT+FDM). The students learn the classes 5 to 9 from clean images: the last k units as
they are (TL), or bounded (NEFT). Measured: accuracy, PGD-100 and, with `--auto_attack`, an AutoAttack of parts, on the
test images of those classes. Writes benchmarks/results/cartl.{json,md} row by row; killed, it goes on where it was.
Hours on two cores. `--smoke` takes a few steps on a few images and writes into the work folder.
"""

import argparse
import json
import logging
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file, save_file
from torch import nn

from remos_hf import ImageClassifier, ImageInput, ImageTask, with_new_head
from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import drawn
from remos_hf.evaluation.robustness import Pgd, pgd_robustness
from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.neft import Neft
from remos_hf.training.accelerate_loop import fit
from remos_hf.whole import replace_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from audit_image_defects import cifar_resnet  # noqa: E402 - the CIFAR net of the example

logger = logging.getLogger("cartl")
ORDER = ("AT+TL", "AT+NEFT", "AT+FDM+NEFT")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--cifar_resnet", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cartl")
    parser.add_argument("--size", type=int, default=32, help="side of the images; below 32 their middle is cut out")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 6], help="units that a student trains, of 10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_source", type=int, default=8000)
    parser.add_argument("--num_target", type=int, default=4000)
    parser.add_argument("--num_test", type=int, default=400)
    parser.add_argument("--teacher_steps", type=int, default=800)
    parser.add_argument("--student_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--beta", type=float, default=0.4)
    parser.add_argument("--weight", type=float, default=0.64, help="of the feature distance, a mean over the batch")
    parser.add_argument("--attack_steps", type=int, default=7, help="of adversarial training")
    parser.add_argument("--pgd_steps", type=int, default=100)
    parser.add_argument("--submodel_statistics", choices=["reuse", "update"], default="update")
    parser.add_argument("--no_mix", action="store_true")
    parser.add_argument("--auto_attack", action="store_true", help="needs remos_hf[robustness]")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        few = {"num_source": 40, "num_target": 40, "num_test": 12, "teacher_steps": 2, "student_steps": 2}
        vars(args).update(few, batch_size=8, k=[2], attack_steps=1, pgd_steps=2, size=24)
        args.output = args.work_dir / "smoke"
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
    args: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Train a model in place by SGD, as CARTL does, with a cosine to 0; give what the record says."""
    begun = time.perf_counter()

    def optimizer(student: nn.Module) -> torch.optim.Optimizer:
        trains = [one for one in student.parameters() if one.requires_grad]
        return torch.optim.SGD(trains, args.learning_rate, momentum=0.9, weight_decay=5e-4)

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
            name: one for name, one in settings.items() if not isinstance(one, Path) and name not in ("seeds", "smoke")
        }
        known = json.loads(self.path.read_text()) if self.path.is_file() else {"settings": self.settings, "rows": {}}
        if known["settings"] != self.settings:
            raise SystemExit(f"{self.path} was made with other settings ({known['settings']}). Name another --output.")
        self.rows: dict[str, Any] = known["rows"]

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Write one more row."""
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        command = "python benchmarks/cartl.py --cifar <folder> --cifar_resnet <file> --work_dir <folder>"
        found = {"command": command, "settings": self.settings, "rows": self.rows}
        replace_file(self.path, (json.dumps(found, indent=1) + "\n").encode())
        replace_file(self.path.with_suffix(".md"), self.table().encode())

    def table(self) -> str:
        """Put the rows into a table."""
        lines = [
            "| model | units | seed | accuracy | PGD | AutoAttack of parts | images |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows.values():
            rates = [row["pgd"]["acc"], row["pgd"]["robust_acc"], row.get("auto_attack", {}).get("robust_acc")]
            told = ["-" if one is None else f"{one['value']:.1%}" for one in rates]
            cells = [row["model"], row["k"] or "-", row["seed"], *told, rates[0]["num_samples"]]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
        return "# CARTL on small nets\n\n" + "\n".join(lines) + "\n"


def measured(model: nn.Module, test: Dataset, task: ImageTask, args: argparse.Namespace) -> dict[str, Any]:
    """Measure accuracy and robustness."""
    found = {"pgd": pgd_robustness(model, test, task, Pgd(steps=args.pgd_steps, batch_size=100))}
    if args.auto_attack:
        from remos_hf.evaluation.auto_attack import auto_attack_robustness

        few = {"steps": 2, "queries": 2} if args.smoke else {}
        found["auto_attack"] = auto_attack_robustness(model, test, task, **few)
    return found


def teacher_of(k: int | None, seed: int, task: ImageTask, args: argparse.Namespace, rows: Rows) -> nn.Module:
    """Read or make a robust teacher of the classes 0 to 4."""
    name = f"teacher-{'at' if k is None else f'fdm-{k}'}-seed-{seed}"
    model = with_new_head(ImageClassifier(cifar_resnet(args.cifar_resnet), head=("linear",)), 5, seed=seed)
    path = args.work_dir / f"{'smoke-' if args.smoke else ''}{name}.safetensors"
    if path.is_file() and name in rows.rows:
        model.load_state_dict(load_file(path))
        return model.eval()
    images = {"mean": task.images.mean, "std": task.images.std}
    strategy = AdversarialTraining(k, weight=args.weight, steps=args.attack_steps, seed=seed, **images)
    source = classes(args.cifar / "train", range(5), args.num_source, seed)
    made = trained(model, task.prepare(source), strategy, args.teacher_steps, args, seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    test = classes(args.cifar / "test", range(5), args.num_test, 0)
    kind = "AT (teacher)" if k is None else "AT+FDM (teacher)"
    rows.keep(name, {"model": kind, "k": k, "seed": seed, **made, **measured(model.eval(), test, task, args)})
    logger.warning("%s: %s", name, rows.table().splitlines()[-1])
    return model


def main() -> None:
    """Make what is missing, and write it down."""
    args = parse_args()
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
                made = trained(student, task.prepare(target), strategy, args.student_steps, args, seed)
                row = {"model": kind, "k": k, "seed": seed, **made, **measured(student.eval(), test, task, args)}
                rows.keep(name, row)
                logger.warning("%s: %s", name, rows.table().splitlines()[-1])


if __name__ == "__main__":
    main()
