import pytest

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.kinds import REMOS, UNKNOWN
from remos_hf.judging.words import (
    capitalised,
    count_told,
    defect_name,
    name_told,
    rate_told,
    seeds_told,
    span_told,
    student_name,
)


def test_a_rate_never_comes_without_its_interval_and_its_count():
    told = rate_told(Rate.of(25, 1000)).replace("\N{NO-BREAK SPACE}", " ")
    assert told == "2.5 % [1.7, 3.7] (n = 1,000)"


@pytest.mark.parametrize(("number", "told"), [(0, "0 seeds"), (1, "1 seed"), (1200, "1,200 seeds")])
def test_a_number_of_things_agrees_with_its_noun(number, told):
    assert count_told(number, "seed") == told


def test_sizes_are_told_by_their_ends_and_seeds_by_name():
    assert (span_told([7, 7]), span_told([1200, 7]), span_told([])) == ("7", "7 to 1,200", "0")
    assert (seeds_told({3}), seeds_told({1, 0})) == ("seed 3", "seeds 0, 1")
    assert (seeds_told({None}), seeds_told({None, 2})) == ("one model of each student", "seed 2, others without")
    assert capitalised("a random reset") == "A random reset"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine", "mine"),
        ("two\nlines\tand\x1b[31m more", "two lines and [31m more"),
        ("\u202egnp.exe", "gnp.exe"),
        ("no” that “shows it”", "no' that 'shows it'"),
        ("情感 分析", "情感 分析"),
        ("x" * 81, "x" * 79 + "…"),
    ],
)
def test_a_name_stays_a_name(name, told):
    assert name_told(name) == told
    assert defect_name(name, {}) == told and defect_name(name, {"name": "Ripple"}).endswith(f" ({told})")
    made = {"student": name, "kind": UNKNOWN, "made": {}}
    assert student_name(made) == f"“{told}”" and student_name({**made, "kind": REMOS}) == "ReMoS"
