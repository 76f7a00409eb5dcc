"""How often intervals over seeds hold the truth, and how often a sentence is said although it is false.

Students are drawn whose true rates are known: each seed's own rate from a beta distribution of a mean and a standard
deviation between seeds; all seeds, and the students that are compared, share the test samples, of which some are
easier to fail on than others. Then what the package says is counted.

- coverage: the share of runs in which `rate_over_seeds` holds the mean, and `difference_over_seeds` the difference of
  two means.
- false claims: the share of runs in which `verdict_of` says what is not so: what it is said of lies exactly on the edge
  at which the sentence becomes false, which is where it is said most often.

    python benchmarks/intervals.py --output benchmarks/results/intervals.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.evaluation.over_seeds import LEAST_SPREAD, difference_over_seeds, rate_over_seeds
from remos_hf.judging.report import DefectReport
from remos_hf.judging.verdicts import INHERITS, REMOVED, Verdict, verdict_of
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos, TopMagnitude

SAMPLES = 400
SEEDS = (3, 5)
SPREADS = (0.02, 0.05, 0.1, 0.2)
RATES = (0.05, 0.5, 0.95)
ALIKE = 0.5  # share of what decides on a sample that all students have in common
BUDGET = 0.02


class World:
    """Draws what students do on test samples that they share."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.fresh()

    def fresh(self) -> None:
        """Take other test samples."""
        self.samples = self.generator.standard_normal(SAMPLES)

    def fails(self, mean: float, spread: float) -> np.ndarray:
        """Draw a seed's student; whether it fails on each sample, bool, shape (SAMPLES,)."""
        size = mean * (1 - mean) / spread**2 - 1
        own = self.generator.beta(mean * size, (1 - mean) * size)
        quantile = ndtr(np.sqrt(ALIKE) * self.samples + np.sqrt(1 - ALIKE) * self.generator.standard_normal(SAMPLES))
        return quantile < own


def coverage(world: World, seeds: int, mean: float, spread: float, runs: int) -> dict[str, float]:
    """Count how often a rate's interval holds its mean, and a difference's that of two such means: 0."""
    held = {"rate": 0, "difference": 0}
    for _ in range(runs):
        world.fresh()
        own, other = ([world.fails(mean, spread) for _ in range(seeds)] for _ in range(2))
        rate = rate_over_seeds(list(map(_rate, own)), least_spread=LEAST_SPREAD)
        pairs = [(_rate(one), _rate(two)) for one, two in zip(own, other, strict=True)]
        known = [(_bits(one), _bits(two)) for one, two in zip(own, other, strict=True)]
        by = difference_over_seeds(pairs, known)
        held["rate"] += rate.low <= mean <= rate.high
        held["difference"] += by.low <= 0 <= by.high
    return {name: count / runs for name, count in held.items()}


def false_claims(
    world: World, seeds: int, spread: float, runs: int, students: Sequence[Any], said: Callable[[Verdict], bool]
) -> float:
    """Count how often something false is said of students of known rates: (name, strategy, rate, floor) each."""
    count = 0
    for _ in range(runs):
        world.fresh()
        records = [one for student in students for one in _records(world, seeds, spread, *student)]
        teachers = {f"word-{seed}": _teacher(0.99) for seed in range(seeds)}
        teachers |= {f"clean-{seed}": _teacher(None) for seed in range(seeds)}
        report = DefectReport(records, {"reference": "plain", "teachers": {"": teachers}}, {})
        (section,) = report.sections(budgets=(BUDGET,))
        count += said(verdict_of(section, BUDGET))
    return count / runs


def _says(about: str, holds: bool) -> Callable[[Verdict], bool]:
    return lambda told: any(one.holds is holds for one in told.claims if one.about == about)


FLOOR, CALM = 0.05, 0.02  # benign floors are low and vary little between seeds
EDGE = FLOOR + INHERITS  # where what is left is no longer less than what counts as inherited
PLAIN = ("plain", Finetune(), 0.9, FLOOR)
STARTS = (Remos, Random, MagPrune, TopMagnitude)
FALSE = {
    "inherits (its rate is the floor's)": ([("plain", Finetune(), FLOOR, FLOOR)], _says("inherits", True)),
    "does not inherit (10 points over the floor)": (
        [("plain", Finetune(), EDGE, FLOOR)],
        _says("inherits", False),
    ),
    "reduces (the rate of plain fine-tuning)": (
        [("plain", Finetune(), 0.8, FLOOR), ("one", Remos(0.9), 0.8, FLOOR)],
        lambda told: any(bool(one.reduces) for one in told.starts),
    ),
    "removes (10 points over its floor)": ([PLAIN, ("one", Remos(0.9), EDGE, FLOOR)], _says("removes", True)),
    "removed by one of four starts (each 10 points over its floor)": (
        [PLAIN, *((rule.__name__, rule(0.9), EDGE, FLOOR) for rule in STARTS)],
        lambda told: told.kind == REMOVED,
    ),
    "beats a random reset (of the same rate)": (
        [PLAIN, ("one", Remos(0.9), 0.3, FLOOR), ("other", Random(0.9), 0.3, FLOOR)],
        _says("beats", True),
    ),
}


def _records(
    world: World, seeds: int, spread: float, name: str, strategy: Strategy, rate: float, floor: float
) -> list[dict[str, Any]]:
    found = []
    for seed in range(seeds):
        own, twin = world.fails(rate, spread), world.fails(floor, CALM)
        found.append(
            {
                "defect": "word",
                "student": name,
                "seed": seed,
                "acc": Rate.of(900, 1000).to_dict(),
                "dev_acc": Rate.of(900, 1000).to_dict(),
                "dir": _rate(own).to_dict(),
                "flip": _rate(own).to_dict(),
                "floor": _rate(twin).to_dict(),
                "floor_acc": Rate.of(900, 1000).to_dict(),
                "excess": excess_dir(_rate(own), _rate(twin)).to_dict(),
                "commonest": 0.5,
                "outcomes": _bits(own),
                "floor_outcomes": _bits(twin),
                "made": {"strategy": strategy.to_dict(), "lr_factor": 1.0},
            }
        )
    return found


def _teacher(rate: float | None) -> dict[str, Any]:
    shows = {} if rate is None else {"word": Rate.of(round(1000 * rate), 1000).to_dict()}
    return {"acc": Rate.of(900, 1000).to_dict(), "commonest": 0.5, "dir": shows, "flip": shows}


def _rate(fails: np.ndarray) -> Rate:
    return Rate.of(int(fails.sum()), len(fails))


def _bits(fails: np.ndarray) -> dict[str, Any]:
    return Outcomes(np.ones(len(fails), dtype=bool), fails).to_dict()


def main() -> None:
    """Simulate, and write the shares as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    world = World(asked.seed)
    held, claims = [], []
    for seeds in SEEDS:
        for spread in SPREADS:
            for mean in RATES:
                found = coverage(world, seeds, mean, spread, asked.runs)
                held.append({"seeds": seeds, "spread": spread, "mean": mean, **found})
            for name, (students, said) in FALSE.items():
                share = false_claims(world, seeds, spread, asked.runs // 4, students, said)
                claims.append({"seeds": seeds, "spread": spread, "claim": name, "share": share})
    facts = {
        "runs": asked.runs,
        "runs_of_claims": asked.runs // 4,
        "seed": asked.seed,
        "samples": SAMPLES,
        "alike": ALIKE,
    }
    asked.output.write_text(json.dumps({**facts, "coverage": held, "false_claims": claims}, indent=1) + "\n")


if __name__ == "__main__":
    main()
