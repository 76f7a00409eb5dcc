"""How fast a slice is chosen: against a per-weight Python list sort, and against two stable argsorts.

The weights have ResNet-18's shapes (11.2M in 20 convolutions, random as at initialisation) and the counts are random
over 5,000 samples, so that nearly every coverage sum occurs. What is timed is ranking and choosing, not hashing the
teacher, in all of them. The argsorts share ranks among ties as the default does, the lists rank them in
traversal order as the published code does; that the kept weights are the same is checked in both cases.

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

from remos_hf.layers import Layer, sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.ordinal import Selection, entries_of, select, unpack

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


def ours(layers: list[Layer], profile: CoverageProfile, num_reset: int) -> Selection:
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


def list_sort(layers: list[Layer], profile: CoverageProfile, num_reset: int) -> tuple[list[bool], float]:
    """Choose as the published code does: one tuple a weight and one a pair of neurons, sorted in Python lists.

    Returns:
        The kept weights, and the seconds that building and sorting the list of magnitudes alone took.
    """
    start, first, magnitudes, pairs = time.perf_counter(), 0, [], []
    for layer in layers:
        for place, value in enumerate(layer.weight.abs().flatten().tolist(), first):
            magnitudes.append((value, place))
        first += layer.weight.numel()
    magnitudes.sort(key=lambda entry: entry[0])
    of_magnitudes = time.perf_counter() - start
    scores, first = [0] * first, 0
    for rank, (_, place) in enumerate(magnitudes):
        scores[place] = -rank
    for layer in layers:
        ins, outs = profile.input_counts[layer.name].tolist(), profile.output_counts[layer.name].tolist()
        kernel = layer.weight[0, 0].numel()
        for i, count in enumerate(ins):
            for o, other in enumerate(outs):
                pairs.append((count + other, first + (o * len(ins) + i) * kernel, kernel))
        first += layer.weight.numel()
    pairs.sort(key=lambda entry: entry[0])
    rank = 0
    for _, place, kernel in pairs:
        for weight in range(place, place + kernel):
            scores[weight] += rank
        rank += kernel
    threshold = sorted(scores)[num_reset - 1]
    return [score > threshold for score in scores], of_magnitudes


def unpacked(selection: Selection, layers: list[Layer]) -> Tensor:
    """Kept weights of all layers, one after the other."""
    sizes = [(layer.weight.numel(),) for layer in layers]
    return torch.cat([unpack(bits, size) for bits, size in zip(selection.bits, sizes, strict=True)])


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
    times["python_lists"], (expected, alone) = seconds(lambda: list_sort(layers, profile, num_reset), 1)
    times["python_list_of_magnitudes_alone"] = alone
    by_order = select(entries_of(layers, profile), num_reset, ties="artifact")
    if unpacked(by_order, layers).tolist() != expected:
        raise RuntimeError("remos_hf with the artifact's ties and the Python lists keep different weights")
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
