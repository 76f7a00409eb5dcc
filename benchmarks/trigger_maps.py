"""How much of what a student looks at lies inside the trigger: activation maps and Grad-CAM over a whole test set.

    python benchmarks/trigger_maps.py --cifar <folder> --cifar_resnet resnet20.th --patch firefox.png --work_dir work \
        --hide_images --output benchmarks/results/trigger_maps

Takes the patch backdoor's teacher and students that image_defects.py left in the same `--work_dir`. Every map is of an
image of another class than the target with the trigger on it; Grad-CAM shows the evidence for the target label. Chance
is the trigger's share of the image. Writes a JSON and a picture of the first images, which `remos report
image_defects.json --maps trigger_maps.json` shows in the report. Minutes.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import image_defects
import torch
from audit_runs import EXAMPLES, add_arguments
from safetensors.torch import load_model
from torch import Tensor, nn

from remos_hf.showing.maps import activation_map, grad_cam, mean_share
from remos_hf.showing.pictures import overlay

sys.path.insert(0, str(EXAMPLES))
import audit_image_defects  # noqa: E402 - an example is a script, found by the path above

LAYERS = ("body.layer3", "body.layer2")  # of CifarResNet: 8 and 16 pixels a side
STUDENTS = ("finetune", "finetune lr x3", "random 0.9", "mag_prune 0.9", "remos 0.97", "remos 0.9")
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
        "share": {f"{one['model']}, seed {one['seed']}": one["grad_cam"][LAYERS[0]] for one in results},
    }


def main() -> None:
    """Load the teacher and its students, measure all, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    image_defects.add_inputs(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--hide_images", action="store_true", help="draw the maps on grey: the images are not yours to show"
    )
    add_arguments(parser, "trigger_maps")
    args = parser.parse_args()
    folder = args.work_dir / "cifar"
    options = [*image_defects.settings(args)["cifar"], "--output_dir", str(folder)]
    audit = audit_image_defects.audit_of(audit_image_defects.parse_args(options))
    images, trigger = audit.task.images, audit.defects["patch"]
    exposed = trigger.exposed_set(audit.test, teacher=audit.load_teacher(0), **audit.task.exposing)
    inputs = torch.cat([batch["pixel_values"] for _, batch in audit.task.batches(exposed.dataset)])
    labels = torch.full((len(inputs),), trigger.target_label)
    height, width = trigger.size_on(*images.size)
    ((top, left),) = trigger.corners_on(*images.size)
    mask = torch.zeros(images.size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    results, shown = [], []
    for seed in args.seeds:
        for name in ("teacher", *STUDENTS):
            kept = folder / (f"teachers/patch-{seed}" if name == "teacher" else f"students/patch-{seed}-{name}")
            model = audit.load_teacher(seed)
            load_model(model, kept / "model.safetensors")
            results.append({"model": name, "seed": seed, **measured(model.eval(), inputs, labels, mask)})
            told = results[-1]["grad_cam"][LAYERS[0]]
            print(f"{name} seed {seed}: Grad-CAM {told['value']:.3f} in the trigger, chance {told['chance']:.3f}")
            if seed == args.seeds[0] and name in ("teacher", "finetune", "remos 0.97"):
                shown.append((name, grad_cam(model, LAYERS[0], inputs[:3], labels[:3])))
    facts = {"images": len(inputs), "trigger": trigger.to_dict(), "trigger_pixels": [height, width]}
    maps = [in_report(results, len(inputs), args.output.with_suffix(".png").name)]
    text = json.dumps({**facts, "results": results, "maps": maps}, indent=1)
    args.output.with_suffix(".json").write_text(f"{text}\n")
    pixels = images.denormalised(inputs[:3]).repeat(len(shown), 1, 1, 1)
    pixels = torch.full_like(pixels, 0.5) if args.hide_images else pixels
    titles = [f"{name}, image {number + 1}" for name, _ in shown for number in range(3)]
    overlay(pixels, torch.cat([maps for _, maps in shown]), args.output.with_suffix(".png"), titles, mask=mask)


if __name__ == "__main__":
    main()
