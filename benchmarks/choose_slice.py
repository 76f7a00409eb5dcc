"""How fast a slice is chosen: against a per-weight Python list sort, and against two stable argsorts.

The weights have ResNet-18's shapes (11.2M in 20 convolutions, random as at initialisation) and the counts are random
over 5,000 samples, so that nearly every coverage sum occurs. What is timed is ranking and choosing, not hashing the
teacher, in all of them; all give the same kept weights, which is checked.

    python benchmarks/choose_slice.py --output benchmarks/results/choose_slice.json     # 2 minutes, 3 GB
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from remos_hf.coverage.profile import CoverageProfile
from remos_hf.layers import Layer, sliceable_layers
from remos_hf.slicing.ordinal import entries_of, select, unpack

# (outputs, inputs, kernel) of ResNet-18's convolutions in registration order
RESNET18 = [
    (64, 3, 7),
    *[(64, 64, 3)] * 4,
    *[(128, 64, 3), (128, 128, 3), (128, 64, 1), (128, 128, 3), (128, 128, 3)],
    *[(256, 128, 3), (256, 256, 3), (256, 128, 1), (256, 256, 3), (256, 256, 3)],
    *[(512, 256, 3), (512, 512, 3), (512, 256, 1), (512, 512, 3), (512, 512, 3)],
]
SAMPLES, SLICE_RATIO = 5000, 0.9


def resnet18_weights() -> list[Layer]:
    """Build the convolutions, He-initialised from a fixed seed."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(inputs, outputs, kernel, bias=False) for outputs, inputs, kernel in RESNET18])
    for convolution in model:
        nn.init.kaiming_normal_(convolution.weight)
    return list(sliceable_layers(model).values())


def random_profile(layers: list[Layer]) -> CoverageProfile:
    """Draw counts for both ends of every layer."""
    generator = torch.Generator().manual_seed(0)

    def counts(size: int) -> Tensor:
        return torch.randint(0, SAMPLES + 1, (size,), generator=generator)

    return CoverageProfile(
        {layer.name: counts(layer.in_neurons) for layer in layers},
        {layer.name: counts(layer.out_neurons) for layer in layers},
        SAMPLES,
    )


def ours(layers: list[Layer], profile: CoverageProfile, num_reset: int) -> Tensor:
    """Choose by counting; only the packed bits are made."""
    return select(entries_of(layers, profile), num_reset)


def argsorts(layers: list[Layer], profile: CoverageProfile, num_reset: int, sort: Callable) -> Tensor:
    """Choose by two stable argsorts over all weights, mean ranks for ties, and one selection."""
    entries = entries_of(layers, profile)
    coverage = torch.cat([(entry.rows[:, None] + entry.columns[0]).flatten() for entry in entries])
    magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers])
    scores = mean_ranks(coverage, sort) - mean_ranks(magnitudes, sort)
    threshold = np.partition(scores, num_reset - 1)[num_reset - 1]
    return torch.from_numpy(scores > threshold)


def mean_ranks(values: Tensor, sort: Callable) -> np.ndarray:
    """Doubled mean rank of every value."""
    values = values.numpy()
    order = sort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(ordered)])
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.repeat(2 * starts + counts - 1, counts)
    return ranks


def list_sort(layers: list[Layer]) -> list:
    """Sort one tuple a weight, as the published code does for the magnitudes alone. Timed without everything else."""
    entries = []
    for layer in layers:
        weight = layer.weight.abs().tolist()
        for o, row in enumerate(weight):
            for i, kernel in enumerate(row):
                for h, line in enumerate(kernel):
                    for w, value in enumerate(line):
                        entries.append((layer.name, o, i, h, w, value))
    entries.sort(key=lambda entry: entry[-1])
    return entries


def seconds(run: Callable, repeats: int) -> tuple[float, object]:
    """Median wall-clock time of some runs, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], result


def main(args: argparse.Namespace) -> None:
    """Time all of them, check that they agree, print and write the ratios."""
    layers = resnet18_weights()
    profile = random_profile(layers)
    weights = sum(layer.weight.numel() for layer in layers)
    num_reset = weights - round(weights * SLICE_RATIO)
    ours(layers, profile, num_reset)  # warm up
    fast, selection = seconds(lambda: ours(layers, profile, num_reset), args.repeats)
    kept = torch.cat(
        [unpack(bits, (layer.weight.numel(),)) for bits, layer in zip(selection.bits, layers, strict=True)]
    )
    times = {"remos_hf": fast}
    sorts = {"numpy": lambda values: np.argsort(values, kind="stable")}
    sorts["torch"] = lambda values: torch.from_numpy(values).argsort(stable=True).numpy()
    for name, sort in sorts.items():
        times[f"two_{name}_argsorts"], expected = seconds(lambda s=sort: argsorts(layers, profile, num_reset, s), 3)
        if not torch.equal(kept, expected):
            raise RuntimeError(f"remos_hf and the {name} argsorts keep different weights")
    times["python_list_sort_of_magnitudes"], _ = seconds(lambda: list_sort(layers), 1)
    result = {
        "weights": weights,
        "slice_ratio": SLICE_RATIO,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "seconds": times,
        "nanoseconds_a_weight": {name: 1e9 * value / weights for name, value in times.items()},
        "ratio_to_remos_hf": {name: value / fast for name, value in times.items()},
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    main(parser.parse_args())
