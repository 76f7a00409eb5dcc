"""Which image defects of a teacher do its students inherit, and which way of starting them helps?

    python benchmarks/image_defects.py --cifar <folder with train/ and test/> --cifar_resnet resnet20.th \
        --caltech <folder> --flowers <folder> --mobilenet <folder of a transformers image classifier> \
        --patch firefox.png --work_dir work --output benchmarks/results/image_defects

Runs examples/audit_image_defects.py on each setting below, in two processes, one thread each, and puts the reports
together: image_defects.json and image_defects.md. Killed, it goes on where it was. Hours on two cores.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from audit_runs import add_arguments, run_settings, write

COMMON = "--seeds 0 1 --use_cpu --slice_ratios 0.9 0.95 0.97 0.7 0.5 --curves_for patch --keep_students".split()
AGAIN = "--reactivate 0 5 20 50 --num_reactivated 100 --reactivated_seeds 1".split()
# Photographs of 224 pixels cost twenty times as much as CIFAR's: smaller images, fewer defects, for Caltech-101 one
# slice ratio, and a learning rate at which a new head learns in a few epochs.
PHOTOS = (
    "--size 128 --epochs 5 --teacher_epochs 5 --learning_rate 1e-3 --teacher_learning_rate 1e-3 --num_test 240 "
    "--num_attacked 120 --attack_steps 20 --defects patch penultimate --reactivate"
).split()
RULES = ("random", "top_magnitude", "mag_prune", "remos")
# On CIFAR-10 ReMoS costs so much accuracy that only smaller random slices cost as much.
SMALL_RANDOM = ("random 0.7", "random 0.5")


def students(*ratios: float, rules: Sequence[str] = RULES) -> list[str]:
    """Name the students of all rules at all ratios, and those without a ratio."""
    return ["finetune", "finetune lr x3", "retrain", *(f"{rule} {ratio}" for ratio in ratios for rule in rules)]


def settings(args: argparse.Namespace) -> dict[str, list[str]]:
    """Give each setting's arguments, by its folder's name."""

    def folders(root: Path) -> list[str]:
        return ["--train_folder", str(root / "train"), "--test_folder", str(root / "test")]

    patch = [] if args.patch is None else ["--patch", str(args.patch)]
    found = {
        "cifar": [
            *("--name", "CIFAR-10", "--cifar_resnet", str(args.cifar_resnet), *folders(args.cifar), *patch),
            # 3,000 images at 1e-3 leave plain fine-tuning 9 % of the patch: too little to compare rules on.
            *"--num_attacker 4000 --num_student 1000 --num_dev 500 --num_test 800 --num_attacked 400".split(),
            *"--learning_rate 5e-4 --teacher_learning_rate 1e-3 --epochs 8 --teacher_epochs 3 --batch_size 64".split(),
            *("--augment", "none", *AGAIN),
            *("--students", *students(0.9, 0.95, 0.97, rules=(*RULES, "remos_layer")), *SMALL_RANDOM),
        ]
    }
    for name, root, sizes, ratios in (
        ("caltech", args.caltech, "--num_attacker 500 --num_student 450 --num_dev 68", (0.9,)),
        ("flowers", args.flowers, "--num_attacker 340 --num_student 300 --num_dev 80", (0.9, 0.95, 0.97)),
    ):
        if root is not None:
            found[name] = [
                *("--name", name.title(), "--teacher", str(args.mobilenet), *folders(root), *patch),
                *(*sizes.split(), *PHOTOS, "--students", *students(*ratios)),
            ]
    return {name: [*COMMON, *options] for name, options in found.items()}


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add teachers, data, and what defects need."""
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--cifar_resnet", type=Path, required=True)
    parser.add_argument("--mobilenet", type=Path, help="needed for --caltech and --flowers")
    parser.add_argument("--caltech", type=Path)
    parser.add_argument("--flowers", type=Path)
    parser.add_argument("--patch", type=Path, help="image file of the patch; a checkerboard if not given")


def main() -> None:
    """Run the settings, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_inputs(parser)
    parser.add_argument("--only", nargs="+", help="names of settings")
    add_arguments(parser, "image_defects")
    args = parser.parse_args()
    wanted = {name: options for name, options in settings(args).items() if not args.only or name in args.only}
    write(run_settings("audit_image_defects.py", wanted, args), args.output, "# Image defects")


if __name__ == "__main__":
    main()
