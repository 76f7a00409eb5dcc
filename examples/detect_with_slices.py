# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[vision,examples,robustness]", "torch", "transformers"]
# ///
r"""Which inputs of an image classifier were attacked? A tree on the slice of the last layers says so, or does not.

Attacks test images, looks at the slices, feature maps, paths and logits of clean and of attacked ones, and tells how
many are caught at which false alarms: by trees that see no attack (NNSlicer's) and by trees that are shown one. Two
controls beside them: clean images that the model gets wrong, and noise of exactly the attack's size.

    python examples/detect_with_slices.py --teacher <classifier> --train_folder cifar/train --test_folder cifar/test \
        --shown_attack pgd_4 --attack cw_l2 --output_dir detected

Teachers are classifiers of the folders' classes: a folder or Hub id of transformers, or `timm/<id>`. A folder holds a
folder of images for each class. Writes detection.json and roc.png. Minutes: 2 for a thousand images of 32 pixels.
On ResNet-20 the published claim was not seen to hold: benchmarks/results/nnslicer_detection.md. Offline, on a tiny net
that is trained first, in seconds:
`python examples/detect_with_slices.py --smoke --output_dir smoke`
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, TrainingArguments

from remos_hf import (
    ImageInput,
    ImageTask,
    InputDetector,
    InputFeatures,
    attack_images,
    detection_of,
    image_input_of,
    last_layers,
    load_teacher,
    profile_reference,
)
from remos_hf.applications.image_attacks import ATTACKS, shuffled_changes
from remos_hf.auditing.class_folders import read_folder
from remos_hf.auditing.data_files import drawn
from remos_hf.auditing.labels import by_name
from remos_hf.showing.detection_pictures import detection_curves

BATCH = 50


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="folder or Hub id of a transformers image classifier, or timm/<id>")
    parser.add_argument("--train_folder", type=Path, help="a folder of images for each class, for references and trees")
    parser.add_argument("--test_folder", type=Path, help="the same, attacked")
    parser.add_argument("--num_train", type=int, default=1000, help="images to draw")
    parser.add_argument("--num_test", type=int, default=200, help="likewise")
    parser.add_argument("--shown_attack", choices=ATTACKS, default="pgd_4", help="what one of the trees is shown")
    parser.add_argument("--attack", choices=ATTACKS, default="pgd_8", help="what is to be found")
    parser.add_argument("--layers", type=int, default=1, help="how many of the last layers are looked at")
    parser.add_argument("--reference", choices=["class", "global"], default="global")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a tiny net and a toy task, offline, in seconds")
    args = parser.parse_args(argv)
    if not args.smoke and None in (args.teacher, args.train_folder, args.test_folder):
        parser.error("--teacher, --train_folder and --test_folder are needed (or --smoke)")
    return args


def inputs_of(args: argparse.Namespace) -> tuple[nn.Module, ImageInput, Dataset, Dataset]:
    """Load the model and draw the images."""
    if args.smoke:
        args.shown_attack = "fgsm_8"
        return smoke_inputs(args.output_dir)
    train = read_folder(args.train_folder)
    test = by_name(read_folder(args.test_folder), "--test_folder", train, "--train_folder")
    model = load_teacher(args.teacher, AutoModelForImageClassification, dtype=torch.float32).eval()
    train, test = drawn(train, args.num_train, args.seed), drawn(test, args.num_test, args.seed)
    return model, image_input_of(model), train, test


def smoke_inputs(folder: Path) -> tuple[nn.Module, ImageInput, Dataset, Dataset]:
    """Train a tiny net on a toy task: is the image bright at the top, on the left or on the right?"""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    images = ImageInput((32, 32), crop_share=1.0)
    random = np.random.default_rng(0)

    def toy(count: int) -> Dataset:
        pixels = random.integers(0, 140, (count, 32, 32, 3))
        labels = np.arange(count) % 3
        for one, label in zip(pixels, labels, strict=True):
            one[[slice(0, 16), slice(None), slice(None)][label], [slice(None), slice(0, 16), slice(16, 32)][label]] += (
                30
            )
        rows = {"image": [Image.fromarray(one.astype(np.uint8)) for one in pixels], "label": labels.tolist()}
        return Dataset.from_dict(
            rows, features=Features({"image": ImageColumn(), "label": ClassLabel(names=["top", "left", "right"])})
        )

    recipe = TrainingArguments(
        str(folder / "_trainer"), max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    train = toy(120)
    ImageTask(images).train(model, train, recipe)
    return model.eval(), images, train, toy(60)


def pixels_of(data: Dataset, images: ImageInput) -> tuple[Tensor, np.ndarray]:
    """Give pixels from 0 to 1, and labels."""
    batches = [batch["pixel_values"] for _, batch in ImageTask(images).batches(data)]
    return images.denormalised(torch.cat(batches)).clamp(0, 1), np.array(data["label"])


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Detect, and write what was found."""
    datasets.disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, images, train, test = inputs_of(args)

    def batches(pixels: Tensor) -> list[dict[str, Tensor]]:
        return [{"pixel_values": images.normalised(part)} for part in pixels.split(BATCH)]

    def labels_of(pixels: Tensor) -> np.ndarray:
        return InputFeatures("logits").of(model, batches(pixels)).predicted if len(pixels) else np.zeros(0, int)

    shown, labels = pixels_of(train, images)
    shown = shown[labels_of(shown) == labels]
    pixels, labels = pixels_of(test, images)
    right = labels_of(pixels) == labels
    clean, own = pixels[right], labels[right]
    half = len(clean) // 2  # the first half is for the tree that is shown an attack
    known = attack_images(model, images, clean[:half], args.shown_attack, seed=args.seed)
    known = known[labels_of(known) != own[:half]]
    attacked = attack_images(model, images, clean[half:], args.attack, seed=args.seed)
    fooled = labels_of(attacked) != own[half:]
    if not len(known) or not fooled.any():
        raise SystemExit(
            "An attack changed no label, so there is nothing to find. Take --attack and --shown_attack of more levels."
        )
    noise = shuffled_changes(clean[half:], attacked, seed=args.seed)
    sets = {
        "shown": shown,
        "half": clean[:half],
        "known": known,
        "clean": clean[half:],
        "attacked": attacked[fooled],
        "noise": noise[labels_of(noise) == own[half:]],
        "wrong": pixels[~right],
    }

    layers = last_layers(model, batches(shown[:1])[0], args.layers)
    reference = profile_reference(model, batches(shown), kind=args.reference)
    looked_at = {
        f"slices ({args.reference} reference)": InputFeatures("slice", layers, reference),
        "EffectivePath": InputFeatures("effective_path", layers),
        "feature maps": InputFeatures("feature_map", layers),
        "logits": InputFeatures("logits"),
    }
    found: dict[str, Any] = {"no attack shown": {}, f"{args.shown_attack} shown": {}}
    curves: dict[str, Any] = {how: {} for how in found}
    for name, features in looked_at.items():
        seen = {part: features.of(model, batches(one)) for part, one in sets.items() if len(one)}
        detectors = (InputDetector.fit(seen["shown"], seed=args.seed),)
        detectors += (InputDetector.fit(seen["half"], seen["known"], seed=args.seed),)
        for how, detector in zip(found, detectors, strict=True):
            scores = [detector.scores(seen[part]) for part in ("clean", "attacked")]
            controls = {part: float(detector.flags(seen[part]).mean()) for part in ("noise", "wrong") if part in seen}
            found[how][name] = {**detection_of(*scores).to_dict(), "controls_flagged": controls}
            curves[how][name] = [scores]
    counts = {name: len(one) for name, one in sets.items()}
    told = {"attack": args.attack, "layers": list(layers), "counts": counts, "found": found}
    (args.output_dir / "detection.json").write_text(json.dumps(told, indent=1))
    detection_curves(curves, args.output_dir / "roc.png")
    return told


def table(told: dict[str, Any]) -> str:
    """Write what was found as text."""
    lines = [f"{told['attack']}: {told['counts']['attacked']} attacked images, {told['counts']['clean']} clean ones"]
    for how, detectors in told["found"].items():
        lines.append(how)
        for name, one in detectors.items():
            controls = ", ".join(f"{part} flagged {share:.0%}" for part, share in one["controls_flagged"].items())
            lines.append(
                f"  {name}: caught {one['recall']['value']:.0%}, false alarms {one['false_alarms']['value']:.0%}, "
                f"AUROC {one['auroc']:.2f}; {controls}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(main(parse_args(sys.argv[1:]))))
