"""What picking neurons for a whole batch at once saves in coverage-guided generation.

The reference goes the way of the ReMoS artifact: at each step one forward pass for the coverage, on the host, and one
for the gradient; then neurons are picked image by image into Python lists, and their values gathered neuron by neuron.
Both start from the same images and draw the same numbers, and it is an error if they pick other neurons. Images may
differ only where a gradient is within rounding of 0; the result says how many do.

    python benchmarks/coverage_guided.py --model resnet18 --pretrained --output benchmarks/results/coverage_guided.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from remos_hf.activations import capture
from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import outputs_of, seeds_of
from remos_hf.defects.coverage_guided import CoverageGuided, CoverageSearch, hooked_layers, lots
from remos_hf.perturbation import frozen
from remos_hf.profiling.criteria import ActivationStatistics

Picks = list[list[list[int]]]  # by step, image


class Recorded(CoverageGuided):
    """Notes what is picked; the search is the same."""

    def search(self, teacher: nn.Module, images: ImageInput, keys: Sequence[str]) -> CoverageSearch:
        """Start a search that leaves its picks in `self.picks`."""
        search, picks = super().search(teacher, images, keys), []
        pick = search.pick

        def noted(covered_at: Tensor) -> tuple[Tensor, Tensor]:
            picked, able = pick(covered_at)
            picks.append((picked, able))
            return picked, able

        search.pick = noted
        object.__setattr__(self, "picks", picks)
        return search


def ours(attack: CoverageGuided, teacher: nn.Module, images: ImageInput, pixels: Tensor, keys: list[str]) -> Tensor:
    """Perturb the images batch by batch."""
    parts = []
    for start in range(0, len(pixels), attack.batch_size):
        batch = slice(start, start + attack.batch_size)
        parts.append(attack.perturbed(pixels[batch], teacher=teacher, images=images, keys=keys[batch])[0])
    return torch.cat(parts)


def reference(
    attack: CoverageGuided, teacher: nn.Module, images: ImageInput, pixels: Tensor, keys: list[str]
) -> tuple[Tensor, Picks]:
    """Perturb one batch with lists of neurons; gives the images and the picks."""
    sizes = {name: value.to(pixels.device) for name, value in attack.budget(images).items()}
    heavy, seeds = heavy_neurons(teacher), torch.tensor(seeds_of(attack.seed, "neurons", keys))
    point, covered_at, picks = pixels, None, []
    with frozen(teacher):
        for step in range(attack.steps):
            covered = coverage(attack, teacher, images, point)
            covered_at = covered if covered_at is None else added(covered_at, covered)
            picks.append(
                [
                    picked(attack, step, times, heavy, lots(seeds[row : row + 1], step, len(times))[0].tolist())
                    for row, times in enumerate(covered_at)
                ]
            )
            leaf = point.detach().requires_grad_()
            # Adding up all images' losses has the signs of their mean, which the artifact takes.
            (gradient,) = torch.autograd.grad(gathered(teacher, images, leaf, picks[-1]), leaf)
            point = point + sizes["step"] * gradient.sign()
            point = point.clamp(pixels - sizes["eps"], pixels + sizes["eps"])
            point = torch.minimum(torch.maximum(point, sizes["low"]), sizes["high"])
    return point, picks


def added(counts: list[list[int]], covered: list[list[int]]) -> list[list[int]]:
    """Count one more step, image by image and neuron by neuron."""
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(counts, covered, strict=True)]


def coverage(attack: CoverageGuided, teacher: nn.Module, images: ImageInput, pixels: Tensor) -> list[list[int]]:
    """Give which neurons each image covers, layer after layer, on the host."""
    criterion, columns = attack.coverage_criterion(), []
    layers = hooked_layers(teacher)
    with torch.no_grad(), capture(layers) as outputs:
        outputs_of(teacher, images, pixels)
    for name in layers:
        output = outputs[name]
        means = output.mean((2, 3)).cpu()
        low, high = output.amin((1, 2, 3)).cpu(), output.amax((1, 2, 3)).cpu()
        columns.append(criterion(ActivationStatistics(low, high, means)).int())
    return torch.cat(columns, 1).tolist()


def picked(attack: CoverageGuided, step: int, times: list[int], heavy: list[int], drawn: list[int]) -> list[int]:
    """Pick one image's neurons, most wanted first."""
    rule = attack.selection
    if rule == "dlfuzz_rr":
        rule = ("dlfuzz", "rare", "heavy")[step % 3]
    if rule == "dlfuzz":
        able = sorted(range(len(times)), key=lambda neuron: (-times[neuron], neuron))
    elif rule == "rare":
        able = sorted(range(len(times)), key=lambda neuron: (times[neuron], neuron))
    else:
        able = heavy if rule == "heavy" else [neuron for neuron, count in enumerate(times) if not count]
        able = sorted(able, key=lambda neuron: -drawn[neuron])
    return able[: attack.neurons]


def gathered(teacher: nn.Module, images: ImageInput, pixels: Tensor, picks: list[list[int]]) -> Tensor:
    """Add up the picked neurons' means, neuron by neuron."""
    layers = hooked_layers(teacher)
    with capture(layers) as outputs:
        outputs_of(teacher, images, pixels)
    means = [outputs[name].mean((2, 3)) for name in layers]
    place = [(layer, channel) for layer, mean in enumerate(means) for channel in range(mean.shape[1])]
    losses = []
    for row, neurons in enumerate(picks):
        values = []
        for neuron in neurons:
            layer, channel = place[neuron]
            values.append(means[layer][row][channel])
        losses.append(torch.stack(values).sum() if values else pixels[row].sum() * 0)
    return torch.stack(losses).sum()


def heavy_neurons(teacher: nn.Module) -> list[int]:
    """Give the tenth of the neurons with the largest mean weights."""
    weights: list[float] = []
    for layer in hooked_layers(teacher).values():
        weight = layer.weight.detach()
        weights += (weight.flatten(1).mean(1) if weight.dim() > 1 else weight).tolist()
    return sorted(range(len(weights)), key=lambda neuron: -weights[neuron])[: int(len(weights) * 0.1)]


def seconds(run: object, device: torch.device) -> tuple[float, object]:
    """Wall-clock time of one run, and what it gave."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(args: argparse.Namespace, attack: Recorded, teacher: nn.Module, pixels: Tensor) -> dict:
    """Run both in turn, and hold what they gave against each other."""
    images = ImageInput(size=tuple(pixels.shape[2:]))
    keys = [str(row) for row in range(len(pixels))]
    ours(attack, teacher, images, pixels[: attack.batch_size], keys)  # warm up
    times: dict[str, list[float]] = {"remos_hf": [], "reference": []}
    batch = pixels[: attack.batch_size]
    for _ in range(args.repeats):
        spent, _ = seconds(lambda: ours(attack, teacher, images, pixels, keys), pixels.device)
        times["remos_hf"].append(spent / len(pixels))
        # One batch is enough: the reference takes as long for each.
        spent, (expected, expected_picks) = seconds(
            lambda: reference(attack, teacher, images, batch, keys[: len(batch)]), pixels.device
        )
        times["reference"].append(spent / len(batch))
    found, _ = attack.perturbed(batch, teacher=teacher, images=images, keys=keys[: len(batch)])
    picks = [[row[ok].tolist() for row, ok in zip(*step, strict=True)] for step in attack.picks]
    if picks != expected_picks:
        first = next(step for step, pair in enumerate(zip(picks, expected_picks, strict=True)) if pair[0] != pair[1])
        raise RuntimeError(f"remos_hf and the reference pick different neurons, first at step {first}")
    unlike = ((found - expected).abs() > 1e-6).flatten(1)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "criterion": attack.criterion,
        "selection": attack.selection,
        "images_a_second": {name: 1 / value for name, value in median.items()},
        "ratio": median["reference"] / median["remos_hf"],
        "seconds_an_image": times,
        "same_neurons": True,
        "same_images": int((~unlike.any(1)).sum()),
        "compared_images": len(batch),
        "share_of_values_unlike": float(unlike.float().mean()),
    }


def main(args: argparse.Namespace) -> None:
    """Compare all named combinations, print and write the result."""
    torch.manual_seed(0)
    teacher = timm.create_model(args.model, pretrained=args.pretrained).eval().to(args.device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(args.images, 3, args.size, args.size, generator=generator).to(args.device)
    results = []
    for criterion in args.criteria:
        for selection in args.selections:
            attack = Recorded.paper(
                criterion=criterion, selection=selection, steps=args.steps, batch_size=args.batch_size
            )
            results.append(compare(args, attack, teacher, pixels))
    result = {
        "model": args.model,
        "pretrained": args.pretrained,
        "neurons": sum(len(layer.weight) for layer in hooked_layers(teacher).values()),
        "image_size": args.size,
        "images": args.images,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "device": torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "results": results,
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="timm id; random weights unless --pretrained")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224, help="side of the images, which are noise")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--criteria", nargs="+", default=["nc", "tknc", "snac"])
    parser.add_argument("--selections", nargs="+", default=["deepxplore", "dlfuzz", "dlfuzz_rr"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
