"""What a weight is worth: the rules that decide which weights a student keeps.

A rule is a function of the layers that compete, the statistics of the student's data, the share of the weights to keep
and a seed; it gives the kept weights. The first is the paper's; the others are the comparisons without which its result
says nothing. A rule of your own goes to `choose_slice(rule=...)`: `Selection.of` packs what it keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from remos_hf.layers import Layer, largest_magnitude
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.ordinal import Entry, Selection, entries_of, select

Rule = Callable[[Sequence[Layer], CoverageProfile | None, float, int], Selection]


def remos(
    layers: Sequence[Layer],
    statistics: CoverageProfile,
    share: float,
    seed: int,
    *,
    ties: Literal["mean", "artifact"] = "mean",
    progress: bool = False,
) -> Selection:
    """Reset what the task uses least and the teacher put most into: the lowest rank(coverage) - rank(magnitude).

    Source:
        ReMoS, ICSE 2022, section 4.2; artifact nc_weight_rank_pruner.py:53-156.
    """
    num_reset = num_to_reset(layers, share)
    if ties == "artifact":  # kept are scores strictly above sorted_scores[int(weights * prune_ratio)]
        total = sum(layer.numel for layer in layers)
        # The ratio as it was written there: 1 - 0.9 is not 0.1, and int() would fall one short of a whole number.
        num_reset = min(int(total * round(1 - share, 12)), total - 1) + 1
    return select(entries_of(layers, statistics), num_reset, ties=ties, progress=progress)


def top_magnitude(
    layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int, *, progress: bool = False
) -> Selection:
    """Reset the largest weights, whatever the data: ReMoS without its coverage.

    Source:
        What the ReMoS artifact's NLP backdoor path does as shipped (slim_run_glue_prune.py:528-607, nc_maintain_ratio
        0).
    """
    return select([Entry(layer) for layer in layers], num_to_reset(layers, share), progress=progress)


def mag_prune(
    layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int, *, progress: bool = False
) -> Selection:
    """Reset the smallest weights (magnitude pruning before fine-tuning).

    Source:
        ReMoS, ICSE 2022, section 5.2 (Mag-prune); artifact weight_pruner.py:113-149.
    """
    total = sum(layer.numel for layer in layers)
    smallest = select([Entry(layer) for layer in layers], total - num_to_reset(layers, share), progress=progress)
    bits = [_inverted(bits, layer) for bits, layer in zip(smallest.bits, layers, strict=True)]
    return Selection(bits, total - smallest.num_kept, smallest.tie_group)


def random(
    layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int, *, progress: bool = False
) -> Selection:
    """Reset weights drawn without replacement, the same share of every layer (to one weight).

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    largest_magnitude({layer.name: layer for layer in layers})  # a broken teacher is refused whatever the rule
    generator = np.random.default_rng(seed)
    sizes = np.array([layer.numel for layer in layers])
    num_reset = num_to_reset(layers, share)
    bits = []
    for size, gone in zip(sizes, _shared_out(num_reset, sizes), strict=True):
        keep = np.ones(size, dtype=np.bool_)
        keep[generator.choice(size, gone, replace=False, shuffle=False)] = False
        bits.append(torch.from_numpy(np.packbits(keep, bitorder="little")))
    return Selection(bits, int(sizes.sum()) - num_reset, 1)


RULES: dict[str, Rule] = {"remos": remos, "top_magnitude": top_magnitude, "mag_prune": mag_prune, "random": random}


def num_to_reset(layers: Sequence[Layer], share: float) -> int:
    """Number of weights that are given up when this share is kept."""
    total = sum(layer.numel for layer in layers)
    return total - round(total * share)


def keep_highest(scores: Sequence[Tensor], layers: Sequence[Layer], share: float) -> Selection:
    """Keep the share of the weights that score highest; equal scores at the threshold stay or go together.

    For scores of each weight, which are sorted: several times the memory of the weights that compete.

    Args:
        scores: One of each layer, of its weight's shape.
        layers: The layers that compete.
        share: Share of their weights to keep.
    """
    flat = torch.cat([score.flatten() for score in scores])
    num_reset = num_to_reset(layers, share)
    if not num_reset:
        return Selection.of([torch.ones_like(score, dtype=torch.bool) for score in scores])
    threshold = flat.kthvalue(num_reset).values
    less, equal = int((flat < threshold).sum()), int((flat == threshold).sum())
    ties_stay = num_reset - less < equal - (num_reset - less)
    kept = Selection.of([score >= threshold if ties_stay else score > threshold for score in scores])
    return replace(kept, tie_group=equal)


def _shared_out(total: int, sizes: np.ndarray) -> list[int]:
    """Share a number out in proportion to sizes, in whole numbers that add up to it."""
    ends = [total * int(end) // int(sizes.sum()) for end in sizes.cumsum()]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _inverted(bits: Tensor, layer: Layer) -> Tensor:
    inverted = ~bits
    spare = -layer.numel % 8
    if spare:  # bits behind the last weight stay 0, so that equal slices are equal files
        inverted[-1] &= 0xFF >> spare
    return inverted
