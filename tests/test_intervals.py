"""A short run of benchmarks/intervals.py: intervals hold, and edges are seldom taken for what lies beyond them."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "intervals.py"
_SPEC = importlib.util.spec_from_file_location("intervals", SCRIPT)
intervals = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(intervals)


@pytest.mark.parametrize("mean", [0.05, 0.5])
def test_intervals_over_three_seeds_hold_the_mean_and_the_difference(mean):
    held = intervals.coverage(intervals.World(0), 3, mean, 0.05, runs=60)
    assert held["rate"] >= 0.93 and held["difference"] >= 0.93


@pytest.mark.parametrize("claim", [name for name in intervals.FALSE if "four" not in name])
def test_what_lies_on_the_edge_of_a_sentence_is_seldom_said(claim):
    assert intervals.false_claims(intervals.World(0), 3, 0.05, 40, *intervals.FALSE[claim]) <= 0.05
