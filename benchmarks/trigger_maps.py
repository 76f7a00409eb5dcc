"""How much of what a student looks at lies inside the trigger: activation maps and Grad-CAM over a whole test set.

    python benchmarks/trigger_maps.py --cifar <folder> --cifar_resnet resnet20.th --patch firefox.png --work_dir work \
        --hide_images

Takes the patch backdoor's teachers and students that strategies.py --keep_students left in the same `--work_dir`. Every
map is of an image of another class than the target, with the trigger and without it; Grad-CAM shows the evidence for
the target label. Chance is the trigger's share of the image. Writes benchmarks/results/trigger_maps.json and a picture
of the first images, which `remos report strategies_cifar.json --maps trigger_maps.json` shows in the report. Minutes.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from image_starts import add_data
from safetensors.torch import load_model
from strategies import SETTINGS, audit
from torch import Tensor, nn

from remos_hf.showing.maps import activation_map, grad_cam, mean_share
from remos_hf.showing.pictures import overlay

LAYERS = ("body.layer3", "body.layer2")  # of CifarResNet
STUDENTS = ("finetune", "mag_prune 0.2", "relative_update 0.9", "random 0.7", "remos 0.95", "subspace 0.95")
DRAWN = ("teacher", "finetune", "relative_update 0.9", "subspace 0.95")
BATCH = 64


def measured(model: nn.Module, inputs: Tensor, labels: Tensor, mask: Tensor) -> dict:
    """Give the share in the trigger of both kinds of map, layer by layer."""

    def maps(kind: str, layer: str) -> Iterator[Tensor]:
        for start in range(0, len(inputs), BATCH):
            part = slice(start, start + BATCH)
            if kind == "grad_cam":
                yield grad_cam(model, layer, inputs[part], labels[part])
            else:
                yield activation_map(model, layer, inputs[part])

    return {
        kind: {layer: mean_share(maps(kind, layer), mask).to_dict() for layer in LAYERS}
        for kind in ("activation_map", "grad_cam")
    }


def in_report(results: Sequence[Mapping[str, Any]], num_images: int, picture: str) -> dict[str, Any]:
    """Give what `remos report --maps` shows: the picture, and each model's share by Grad-CAM."""
    return {
        "title": "CIFAR-10: patch, Grad-CAM of the last stage",
        "png": picture,
        "caption": f"The target label's evidence on test images with the patch, n = {num_images}; three are drawn, "
        "seed 0. The outline is the patch.",
        "share": {f"{one['model']}, seed {one['seed']}": one["with"]["grad_cam"][LAYERS[0]] for one in results},
    }


def main() -> None:
    """Load the teachers and their students, measure all, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=SETTINGS["cifar"].seeds)
    parser.add_argument(
        "--hide_images", action="store_true", help="draw the maps on grey: the images are not yours to show"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trigger_maps"))
    parser.set_defaults(setting="cifar", starts=None)
    args = parser.parse_args()
    made, folder = audit(args), args.work_dir / "strategies_cifar"
    images, trigger = made.task.images, made.defects["patch"]
    exposed = trigger.exposed_set(made.test, teacher=made.load_teacher(0), **made.task.exposing)
    rows = [row for row, label in enumerate(made.test["label"]) if label != trigger.target_label]
    inputs = {
        told: torch.cat([batch["pixel_values"] for _, batch in made.task.batches(data)])
        for told, data in (("with", exposed.dataset), ("without", made.test.select(rows)))
    }
    labels = torch.full((len(rows),), trigger.target_label)
    height, width = trigger.size_on(*images.size)
    ((top, left),) = trigger.corners_on(*images.size)
    mask = torch.zeros(images.size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    assert torch.equal(inputs["with"][..., ~mask], inputs["without"][..., ~mask])  # the same images in the same order
    results, shown = [], []
    for seed in args.seeds:
        for name in ("teacher", *STUDENTS):
            kept = folder / (f"teachers/patch-{seed}" if name == "teacher" else f"students/patch-{seed}-{name}")
            model = made.load_teacher(seed)
            load_model(model, kept / "model.safetensors")
            found = {told: measured(model.eval(), given, labels, mask) for told, given in inputs.items()}
            results.append({"model": name, "seed": seed, **found})
            told = [found[one]["grad_cam"][LAYERS[0]]["value"] for one in ("with", "without")]
            print(f"{name} seed {seed}: Grad-CAM in the trigger's place {told[0]:.3f} with it, {told[1]:.3f} without")
            if seed == args.seeds[0] and name in DRAWN:
                shown.append((name, grad_cam(model, LAYERS[0], inputs["with"][:3], labels[:3])))
    facts = {"images": len(rows), "trigger": trigger.to_dict(), "trigger_pixels": [height, width]}
    maps = [in_report(results, len(rows), args.output.with_suffix(".png").name)]
    text = json.dumps({**facts, "results": results, "maps": maps}, indent=1)
    args.output.with_suffix(".json").write_text(f"{text}\n")
    pixels = images.denormalised(inputs["with"][:3]).repeat(len(shown), 1, 1, 1)
    pixels = torch.full_like(pixels, 0.5) if args.hide_images else pixels
    titles = [f"{name}, image {number + 1}" for name, _ in shown for number in range(3)]
    overlay(pixels, torch.cat([maps for _, maps in shown]), args.output.with_suffix(".png"), titles, mask=mask)


if __name__ == "__main__":
    main()
