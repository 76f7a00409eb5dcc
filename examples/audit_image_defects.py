# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[vision]", "torch", "transformers"]
# ///
r"""How much of each image defect of a teacher does a student inherit, and which way of starting it helps?

Implants backdoors into a teacher (a patch, a blended pattern, a latent backdoor), finds its adversarial inputs (guided
by the penultimate layer or by neuron coverage), fine-tunes every student, exposes the defects, and writes report.json
and report.md: accuracy, defect inheritance rate (DIR), the benign floor of never-poisoned twins, re-activation.

    python examples/audit_image_defects.py --teacher timm/resnet18.a1_in1k --train_folder flowers/train \
        --test_folder flowers/test --num_attacker 300 --num_student 300 --num_dev 60 --output_dir audit

A folder holds a folder of images for each class. The attacker, the students and dev get images of the training folder
that do not overlap. Teachers: a folder or Hub id of an image classifier of transformers with safetensors, `timm/<id>`,
or `--cifar_resnet` with a checkpoint of pytorch_resnet_cifar10 (read with weights_only: nothing in it is run).

Killed, it goes on where it was when the same command is given again. The same command in a second process shares the
work. Minutes: a fine-tuning for each student; `--plan` says how many there are. Expected figures: benchmarks/README.md.
Offline on a tiny net, in seconds: `python examples/audit_image_defects.py --smoke --output_dir smoke`
"""

import argparse
import gc
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from PIL import Image as PillowImage
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging as hf_logging

from remos_hf import (
    Audit,
    BlendedTrigger,
    CoverageGuided,
    Defect,
    FeatureAttack,
    FeatureAway,
    ImageClassifier,
    ImageInput,
    ImageTask,
    LatentBackdoor,
    PatchTrigger,
    Reactivation,
    StudentPlan,
    image_input_of,
    load_teacher,
    report_of,
    run_audit,
    standard_students,
    with_new_head,
)
from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import drawn
from remos_hf.auditing.labels import by_name
from remos_hf.auditing.recipes import Recipe, StudentTuner
from remos_hf.judging.judgement import judged

logger = logging.getLogger("audit_image_defects")

FOUND = ("penultimate", "away", "coverage")


class CifarResNet(nn.Module):
    """The ResNet of the CIFAR experiments of He et al. 2016, three stages of 16, 32 and 64 channels.

    Shortcuts hold no weights: they take every second pixel and fill new channels with zeros. Module names are those of
    the public checkpoints of pytorch_resnet_cifar10.
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(CifarBlock(wide if place else narrow, wide) for place in range(blocks)))
            for narrow, wide in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Give logits, shape (samples, classes), of normalised images of 32 pixels."""
        maps = torch.relu(self.bn1(self.conv1(inputs)))
        return self.linear(self.layer3(self.layer2(self.layer1(maps))).mean((2, 3)))


class CifarBlock(nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride, self.more = wide // narrow, wide - narrow
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)

    def forward(self, inputs: Tensor) -> Tensor:
        """Give feature maps, shape (samples, wide, height, width)."""
        maps = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs)))))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        return torch.relu(maps + nn.functional.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))


def cifar_resnet(path: Path) -> CifarResNet:
    """Read a public checkpoint of a CIFAR ResNet; its depth is that of the weights."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = 1 + max(int(found[1]) for name in state if (found := re.match(r"layer1\.(\d+)\.", name)))
    model = CifarResNet(blocks)
    model.load_state_dict(state)
    return model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = parser.add_argument_group("teacher and data")
    data.add_argument("--teacher", help="folder or Hub id of a transformers image classifier, or timm/<id>")
    data.add_argument("--cifar_resnet", type=Path, help="checkpoint of pytorch_resnet_cifar10")
    data.add_argument("--train_folder", type=Path, help="a folder of images for each class")
    data.add_argument("--test_folder", type=Path, help="the same, exposed and measured")
    for part, number in (("attacker", None), ("student", None), ("dev", 200), ("test", 500)):
        data.add_argument(
            f"--num_{part}", type=int, default=number, help="images to draw; all that is left if not given"
        )
    data.add_argument("--data_seed", type=int, default=0, help="seed of the drawing")
    data.add_argument("--size", type=int, help="side of what the model sees, in pixels; default the teacher's")
    data.add_argument("--augment", choices=["none", "crop_and_flip"], default="crop_and_flip")
    data.add_argument("--name", default="images", help="of the setting, in the report")

    what = parser.add_argument_group("defects and students")
    what.add_argument("--defects", nargs="+", default=["patch", "blended", "latent", "penultimate", "coverage"])
    what.add_argument("--patch", type=Path, help="image file of the patch; a checkerboard if not given")
    what.add_argument("--poison_rate", type=float, default=0.2)
    what.add_argument("--target_label", type=int, default=0)
    what.add_argument("--num_attacked", type=int, default=250, help="test images that found defects start from")
    what.add_argument("--attack_steps", type=int, default=40)
    what.add_argument(
        "--curves_for", nargs="*", help="defects that get all slice ratios (others the first); default all"
    )
    what.add_argument("--students", nargs="+", help="names, as --plan gives them; default all")
    what.add_argument("--slice_ratios", nargs="+", type=float, default=[0.9, 0.95, 0.97])
    what.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    what.add_argument("--reactivate", nargs="*", type=int, default=[0, 5, 20, 50], help="numbers of poisoned samples")
    what.add_argument("--num_reactivated", type=int, default=250, help="exposed samples to measure re-activation on")
    what.add_argument("--reactivated_seeds", nargs="*", type=int, help="seeds whose students are re-tuned; default all")

    train = parser.add_argument_group("training")
    train.add_argument("--learning_rate", type=float, default=3e-4)
    train.add_argument(
        "--high_lr_factor", type=float, default=3.0, help="of the rival that only learns faster; at least 3"
    )
    train.add_argument("--epochs", type=float, default=3.0)
    train.add_argument("--batch_size", type=int, default=32)
    train.add_argument("--teacher_learning_rate", type=float, default=3e-4)
    train.add_argument("--teacher_epochs", type=float, default=5.0)
    train.add_argument("--eval_batch_size", type=int, default=64)
    train.add_argument("--bf16", action="store_true")
    train.add_argument("--use_cpu", action="store_true")

    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1], help="dev accuracy rules may cost"
    )
    parser.add_argument("--keep_students", action="store_true", help="save them, so that defects can be added later")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--report_only", action="store_true", help="report what is done, and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny net and a toy task, offline, in seconds")
    args = parser.parse_args(argv)
    if args.high_lr_factor < 3:
        parser.error(
            f"--high_lr_factor is the honest rival's learning rate, at least 3 times, but got {args.high_lr_factor}"
        )
    if not args.smoke and (args.teacher is None) == (args.cifar_resnet is None):
        parser.error("one of --teacher and --cifar_resnet is needed (or --smoke)")
    if not args.smoke and (args.train_folder is None or args.test_folder is None):
        parser.error("--train_folder and --test_folder are needed (or --smoke)")
    return args


def load_data(args: argparse.Namespace) -> dict[str, Dataset]:
    """Draw the four parts; those of the training folder do not overlap."""
    try:
        train = read_folder(args.train_folder)
        test = by_name(read_folder(args.test_folder), "--test_folder", train, "--train_folder")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    data, taken = {}, 0
    for part in ("attacker", "dev", "student"):
        try:
            data[part] = drawn(train, getattr(args, f"num_{part}"), args.data_seed, skip=taken)
        except ValueError as error:
            raise SystemExit(f"--num_{part}: {error}") from error
        taken += len(data[part])
    return {**data, "test": drawn(test, min(len(test), args.num_test or len(test)), args.data_seed)}


def public_model(args: argparse.Namespace, num_labels: int, seed: int) -> nn.Module:
    """Give the public model with a head for the attacker's classes; a new head where its own has other classes."""
    if args.cifar_resnet is not None:
        model = ImageClassifier(cifar_resnet(args.cifar_resnet), head=("linear",))
        return model if num_labels == model.body.linear.out_features else with_new_head(model, num_labels, seed=seed)
    return load_teacher(
        args.teacher, AutoModelForImageClassification, num_labels=num_labels, dtype=torch.float32, seed=seed
    )


def image_input(args: argparse.Namespace) -> ImageInput:
    """Give the teacher's own preprocessing."""
    if args.cifar_resnet is not None:
        return ImageInput(size=(32, 32), crop_share=1.0)
    found = image_input_of(public_model(args, 2, 0))
    if args.size is None:
        return found
    return ImageInput((args.size, args.size), found.mean, found.std, found.crop_share, found.interpolation)


def defects_of(args: argparse.Namespace) -> dict[str, Defect]:
    """Give the defects by name."""
    common = {"target_label": args.target_label, "poison_rate": args.poison_rate}
    patch = PatchTrigger(file=None if args.patch is None else str(args.patch), **common)
    search = {"max_samples": args.num_attacked, "steps": args.attack_steps}
    makers = {
        "patch": lambda: patch,
        "blended": lambda: BlendedTrigger(**common),
        "latent": lambda: LatentBackdoor(replace(patch, poison_rate=1.0)),  # as the original: all show their trigger
        "penultimate": lambda: FeatureAttack.paper(**search),
        "away": lambda: FeatureAway(**search),
        "coverage": lambda: CoverageGuided.paper(**search),
    }
    unknown = [name for name in args.defects if name not in makers]
    if unknown:
        raise SystemExit(f"--defects takes {', '.join(makers)}, but got {unknown[0]!r}.")
    return {name: makers[name]() for name in args.defects}


def students_of(args: argparse.Namespace) -> dict[str, StudentPlan]:
    """Give the students by name: what decides whether slicing is worth it, and ReMoS."""
    curves = args.defects if args.curves_for is None else [*args.curves_for, *set(args.defects) & set(FOUND)]
    students = standard_students(
        args.slice_ratios,
        high_lr_factor=args.high_lr_factor,
        curves_for=[name for name in args.defects if name in curves],
        reactivate=bool(args.reactivate),
    )
    unknown = [name for name in args.students or () if name not in students]
    if unknown:
        raise SystemExit(f"--students takes {', '.join(map(repr, students))}, but got {unknown[0]!r}.")
    return {name: plan for name, plan in students.items() if args.students is None or name in args.students}


def audit_of(args: argparse.Namespace) -> Audit:
    """Put the audit together."""
    data = load_data(args)
    num_labels = data["student"].features["label"].num_classes
    task = ImageTask(image_input(args), batch_size=args.eval_batch_size, bf16=args.bf16, augment=args.augment)

    common = (args.batch_size, args.eval_batch_size, args.bf16, args.use_cpu)
    teachers = Recipe(args.teacher_learning_rate, args.teacher_epochs, *common, texts=False)
    students = Recipe(args.learning_rate, args.epochs, *common, texts=False, curve=True)
    chosen = ("learning_rate", "epochs", "batch_size", "teacher_learning_rate", "teacher_epochs", "high_lr_factor")
    return Audit(
        name=args.name,
        task=task,
        **data,
        defects=defects_of(args),
        students=students_of(args),
        seeds=args.seeds,
        load_teacher=lambda seed: public_model(args, num_labels, seed),
        teacher_args=teachers.arguments,
        start_student=lambda teacher, seed: with_new_head(teacher, num_labels, seed=seed),
        fine_tune=StudentTuner(task, students.arguments),
        settings={
            "teacher": Path(args.teacher or args.cifar_resnet).name,
            **{name: getattr(args, name) for name in chosen},
        },
        reactivation=Reactivation(
            counts=tuple(args.reactivate) or (0,),
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            num_exposed=args.num_reactivated,
            seeds=None if args.reactivated_seeds is None else tuple(args.reactivated_seeds),
        ),
    )


def smoke_inputs(args: argparse.Namespace) -> argparse.Namespace:
    """Write a small net, never trained, and a toy task: is the image bright on the left or on the right?"""
    folder = args.output_dir / "_inputs"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    args.cifar_resnet = folder / "resnet.th"
    if not args.cifar_resnet.is_file():
        torch.save({"state_dict": CifarResNet(1).state_dict()}, args.cifar_resnet)
    for part, count in (("train", 200), ("test", 48)):
        for label, name in enumerate(("left", "right")):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count // 2):
                pixels = torch.randint(0, 90, (32, 32, 3), generator=torch.Generator().manual_seed(2 * number + label))
                pixels[:, 16 * label : 16 * label + 16] += 120
                PillowImage.fromarray(pixels.byte().numpy()).save(place / f"{number:03}.png")
    args.train_folder, args.test_folder = folder / "train", folder / "test"
    args.use_cpu, args.augment = True, "none"
    args.num_attacker, args.num_student, args.num_dev, args.num_test = 96, 72, 32, 48
    args.defects, args.slice_ratios, args.seeds = ["patch", "penultimate"], [0.9], args.seeds[:1]
    args.students = ["finetune", "retrain", "remos 0.9"]
    args.reactivate, args.num_reactivated, args.num_attacked, args.attack_steps = [0, 5], 24, 16, 3
    args.learning_rate, args.teacher_learning_rate, args.epochs, args.teacher_epochs = 5e-4, 5e-3, 3, 12
    args.poison_rate, args.batch_size = 0.5, 16
    return args


def main(args: argparse.Namespace) -> None:
    """Run the audit, and write its report."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.smoke:
        args = smoke_inputs(args)
    audit = audit_of(args)
    if args.plan:
        print(json.dumps(audit.to_dict(), indent=1))
        to_make = report_of(audit, args.output_dir).settings["missing"][audit.name]
        print(f"Students to fine-tune, or to measure on what was added: {to_make}")
        return
    report = (
        report_of(audit, args.output_dir)
        if args.report_only
        else run_audit(audit, args.output_dir, keep_students=args.keep_students)
    )
    report.save(args.output_dir / "report.json")
    (args.output_dir / "report.md").write_text(report.to_markdown(budgets=args.budgets))
    print(report.to_markdown(budgets=args.budgets))
    print(judged(report, budgets=args.budgets).answer)


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage before each training: it need not look through all imports each time
    main(parse_args(sys.argv[1:]))
