"""Rates over seeds: means with intervals that hold the spread between seeds, and differences paired by seed and sample.

The samples within a seed are no independent evidence for a recipe: another seed may give another student. So the
interval of a mean adds, in squares, what the seeds leave open (Student's t on the seeds' own rates) and what the test
samples leave open (Wilson's interval on one seed's samples, since all seeds share them).

Three seeds that agree may do so by luck, most of all near 0 and 1, where one seed in five may be another story. Where
much rests on that, as in saying that nothing is left of a defect, the seeds' part is never less than what a standard
deviation of `LEAST_SPREAD` between seeds leaves open. `benchmarks/intervals.py` counts how often the intervals hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from remos_hf.evaluation.measures import CONFIDENCE, Difference, Rate, wilson_interval
from remos_hf.evaluation.outcomes import Outcomes

# Below as many seeds nothing is said of their spread: with two, t is 12.7 and every interval holds everything.
MIN_SEEDS = 3
# Of defect inheritance rates: a few seeds are not taken to vary less than this (standard deviation, as a share).
LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class SeedRate:
    """A rate over seeds.

    Attributes:
        value: Mean of the seeds' rates, in [0, 1]; None when no seed has one.
        low: Lower end of the 95 % interval over seeds and test samples; None below `MIN_SEEDS` seeds.
        high: Upper end, likewise.
        count: Samples that did it, of all seeds together.
        num_samples: Samples that could have done it, likewise; seeds that share test samples count them again.
        by_seed: The rate of each seed; None where it has none.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    num_samples: int
    by_seed: tuple[float | None, ...]

    @property
    def seeds(self) -> int:
        """Seeds that have a rate."""
        return sum(value is not None for value in self.by_seed)

    @property
    def samples_of_a_seed(self) -> int:
        """Samples that could have done it, of one seed, on average."""
        return self.num_samples // self.seeds if self.seeds else 0


@dataclass(frozen=True)
class SeedDifference:
    """One rate minus another, both of the same seeds.

    Attributes:
        value: Mean of the seeds' differences, in [-1, 1]; None when no seed has both rates.
        low: Lower end of the 95 % interval over seeds and test samples; None below `MIN_SEEDS` seeds.
        high: Upper end, likewise.
        by_seed: The difference of each seed that has both.
        paired_samples: Whether the interval knows what each sample did in both; without, it takes them as independent
            and is wider.
    """

    value: float | None
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    paired_samples: bool

    @property
    def seeds(self) -> int:
        """Seeds that have both rates."""
        return len(self.by_seed)


def rate_over_seeds(rates: Sequence[Rate], *, least_spread: float = 0.0) -> SeedRate:
    """Put the rates of several seeds together.

    Args:
        rates: One a seed, on the same test samples.
        least_spread: The standard deviation between seeds that is assumed at least, as a share.

    Source:
        Student's t on the seeds' rates; Wilson's interval for the samples; their squares are added, as Zou and Donner
        do for sums (method of variance estimates recovery, Statistics in Medicine 27 (2008) 1693-1702).
    """
    by_seed = tuple(rate.value for rate in rates)
    held = [rate for rate in rates if rate.value is not None]
    count, number = sum(rate.count for rate in held), sum(rate.num_samples for rate in held)
    if not held:
        return SeedRate(None, None, None, count, number, by_seed)
    values = [rate.value for rate in held]
    mean = fmean(values)
    if len(held) < MIN_SEEDS:
        return SeedRate(mean, None, None, count, number, by_seed)
    between = _reach_of_seeds(values, least_spread)
    below, above = (sqrt(between**2 + one**2) for one in _reach_of_samples(mean, _samples(held)))
    return SeedRate(mean, max(0.0, mean - below), min(1.0, mean + above), count, number, by_seed)


def difference_over_seeds(
    pairs: Sequence[tuple[Rate, Rate]],
    outcomes: Sequence[tuple[Any, Any]] = (),
    part: str = "dir",
    *,
    least_spread: float = 0.0,
) -> SeedDifference:
    """Subtract one rate from another, seed by seed and sample by sample.

    Args:
        pairs: Both rates of each seed.
        outcomes: What each sample did in both (`Outcomes` as JSON values, or None), seed by seed.
        part: Which rate it is: "dir", of the samples right when clean; or "acc".
        least_spread: As for `rate_over_seeds`, of the seeds' differences.

    Returns:
        The difference. Its interval adds, in squares, Student's t on the seeds' differences and Newcombe's interval for
        paired samples, in which what both students do alike cancels.

    Source:
        Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10 (paired; with a correlation of 0 it is his
        method 10 for independent samples). The squares are added as in `rate_over_seeds`.
    """
    held = [place for place, pair in enumerate(pairs) if all(rate.value is not None for rate in pair)]
    values = tuple(pairs[place][0].value - pairs[place][1].value for place in held)
    known = [outcomes[place] for place in held if place < len(outcomes)]
    correlations = [_correlation(*pair, part) for pair in known if all(pair)]
    paired = bool(held) and len(correlations) == len(held) and None not in correlations
    if not held:
        return SeedDifference(None, None, None, (), False)
    mean = fmean(values)
    if len(held) < MIN_SEEDS:
        return SeedDifference(mean, None, None, values, paired)
    own, other = ([pairs[place][side] for place in held] for side in (0, 1))
    means = [fmean(rate.value for rate in rates) for rates in (own, other)]
    sides = zip(means, (_samples(own), _samples(other)), strict=True)
    within = _reach_of_both([_reach_of_samples(*side) for side in sides], fmean(correlations) if paired else 0.0)
    below, above = (sqrt(_reach_of_seeds(values, least_spread) ** 2 + one**2) for one in within)
    return SeedDifference(mean, max(-1.0, mean - below), min(1.0, mean + above), values, paired)


def difference_on_samples(one: Rate, other: Rate, outcomes: tuple[Any, Any] = (None, None)) -> Difference:
    """Subtract the rate of one model from that of another: of these two models, and of no others made alike.

    Args:
        one: Rate of the first.
        other: Rate of the second, on the same samples.
        outcomes: What each sample did in both, if it is known.

    Source:
        As `difference_over_seeds`, without the seeds' part.
    """
    if one.value is None or other.value is None:
        return Difference(None, None, None)
    alike = (_correlation(*outcomes, "dir") if all(outcomes) else None) or 0.0
    reaches = [_reach_of_samples(rate.value, rate.num_samples) for rate in (one, other)]
    below, above = _reach_of_both(reaches, alike)
    value = one.value - other.value
    return Difference(value, max(-1.0, value - below), min(1.0, value + above))


def _reach_of_both(reaches: Sequence[tuple[float, float]], alike: float) -> list[float]:
    (down, up), (other_down, other_up) = reaches
    sides = ((down, other_up), (up, other_down))
    return [sqrt(max(0.0, one**2 - 2 * alike * one * two + two**2)) for one, two in sides]


def _reach_of_seeds(values: Sequence[float], least: float) -> float:
    tail = (1 + CONFIDENCE) / 2
    quantile = float(stdtrit(len(values) - 1, tail))
    return max(quantile * stdev(values), float(ndtri(tail)) * least) / sqrt(len(values))


def _reach_of_samples(mean: float, num_samples: int) -> tuple[float, float]:
    """Give how far Wilson's interval reaches below and above a rate."""
    low, high = wilson_interval(round(mean * num_samples), num_samples)
    return max(0.0, mean - low), max(0.0, high - mean)


def _samples(rates: Sequence[Rate]) -> int:
    return min(rate.num_samples for rate in rates)


def _correlation(one: Mapping[str, Any], other: Mapping[str, Any], part: str) -> float | None:
    """Give how alike two rates are that are counted sample by sample.

    Returns:
        0 where one of the students does the same on all samples; None where the samples are not the same.
    """
    own, its = Outcomes.from_dict(one), Outcomes.from_dict(other)
    if len(own.right) != len(its.right):
        return None
    shared = 1.0
    if part == "acc":
        both = (own.right, its.right)
    else:
        able = own.right & its.right
        both = (own.fails[able], its.fails[able])
        # Of two means, only what is counted in both moves together.
        shared = able.sum() / max(1.0, sqrt(own.right.sum() * its.right.sum()))
    if len(both[0]) < 2 or any(one.all() or not one.any() for one in both):
        return 0.0
    return float(shared * np.corrcoef(*both)[0, 1])
