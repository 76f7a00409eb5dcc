from math import sqrt
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.evaluation.over_seeds import MIN_SEEDS, difference_on_samples, difference_over_seeds, rate_over_seeds

T_975 = {3: 4.302653, 4: 3.182446, 5: 2.776445}  # from a printed table, by number of seeds


@pytest.mark.parametrize("counts", [(90, 80, 70), (50, 51, 52, 53), (10, 60, 20, 70, 40)])
def test_the_interval_adds_student_t_over_seeds_and_wilson_over_samples(counts):
    found = rate_over_seeds([Rate.of(count, 100) for count in counts])
    values = [count / 100 for count in counts]
    between = T_975[len(values)] * stdev(values) / sqrt(len(values))
    within = Rate.of(round(100 * fmean(values)), 100)
    assert found.value == pytest.approx(fmean(values))
    assert found.low == pytest.approx(
        max(0, found.value - sqrt(between**2 + (found.value - within.low) ** 2)), abs=1e-5
    )
    assert found.high == pytest.approx(
        min(1, found.value + sqrt(between**2 + (within.high - found.value) ** 2)), abs=1e-5
    )


def test_seeds_that_agree_leave_what_the_samples_leave_open():
    found, alone = rate_over_seeds([Rate.of(0, 200)] * 4), Rate.of(0, 200)
    assert (found.low, found.high) == (0, pytest.approx(alone.high))
    assert rate_over_seeds([Rate.of(0, 20)] * 4).high > found.high


@pytest.mark.parametrize("seeds", range(1, MIN_SEEDS))
def test_below_three_seeds_there_is_a_mean_and_no_interval(seeds):
    rates = [Rate.of(40 + 10 * seed, 100) for seed in range(seeds)]
    found = rate_over_seeds(rates)
    assert found.value == pytest.approx(fmean(rate.value for rate in rates)) and found.low is found.high is None
    assert difference_over_seeds([(rate, rate) for rate in rates]).low is None


def test_seeds_without_a_rate_are_left_out_and_seen():
    found = rate_over_seeds([Rate.of(0, 0), *[Rate.of(30, 100)] * 3])
    assert (found.value, found.seeds, found.by_seed[0], found.num_samples) == (0.3, 3, None, 300)
    assert rate_over_seeds([Rate.of(0, 0)]).value is None
    assert difference_over_seeds([(Rate.of(0, 0), Rate.of(1, 2))]).value is None


def test_a_difference_that_all_seeds_show_is_told_although_the_rates_vary_far_more():
    plain = [Rate.of(count, 1000) for count in (900, 500, 700, 300)]
    own = [Rate.of(rate.count - 200, 1000) for rate in plain]
    found = difference_over_seeds(list(zip(own, plain, strict=True)))
    assert found.value == pytest.approx(-0.2) and found.high < 0
    apart = rate_over_seeds(own), rate_over_seeds(plain)
    assert apart[0].high > apart[1].low  # the two rates' own intervals could not tell


def test_a_difference_that_one_seed_makes_is_not_told():
    found = difference_over_seeds([(Rate.of(100, 1000), Rate.of(count, 1000)) for count in (100, 100, 900)])
    assert found.low < 0 < found.high


def bits(right, fails):
    return Outcomes(np.array(right, dtype=bool), np.array(fails, dtype=bool)).to_dict()


def test_samples_on_which_both_students_do_the_same_cancel():
    generator = np.random.default_rng(0)
    fails = generator.random(400) < 0.5
    fewer = fails & (np.arange(400) % 10 > 0)
    right = np.ones(400)
    pairs = [(Rate.of(int(fewer.sum()), 400), Rate.of(int(fails.sum()), 400))] * 3
    paired = difference_over_seeds(pairs, [(bits(right, fewer), bits(right, fails))] * 3)
    apart = difference_over_seeds(pairs)
    assert paired.paired_samples and not apart.paired_samples
    assert paired.high < 0 < apart.high and paired.value == apart.value
    shuffled = bits(right, generator.permutation(fewer))
    assert difference_over_seeds(pairs, [(shuffled, bits(right, fails))] * 3).high > paired.high


def test_without_spread_between_seeds_and_pairing_it_is_newcombes_interval():
    one, other = Rate.of(30, 100), Rate.of(55, 100)
    found, known = difference_over_seeds([(one, other)] * 5), excess_dir(one, other)
    assert (found.low, found.high) == (pytest.approx(known.low), pytest.approx(known.high))


def test_two_models_are_told_apart_by_their_samples_alone():
    one, other = Rate.of(30, 100), Rate.of(55, 100)
    found, known = difference_on_samples(one, other), excess_dir(one, other)
    assert (found.low, found.high) == (pytest.approx(known.low), pytest.approx(known.high))
    more = np.arange(100) < 55
    outcomes = bits(np.ones(100), np.arange(100) < 30), bits(np.ones(100), more)
    assert difference_on_samples(one, other, outcomes).high < found.high
    assert difference_on_samples(one, Rate.of(0, 0)).value is None


def test_accuracy_is_paired_by_what_is_right():
    same = bits([1, 0, 1, 1] * 50, [0, 0, 1, 0] * 50)
    pairs = [(Rate.of(150, 200), Rate.of(150, 200))] * 3
    assert difference_over_seeds(pairs, [(same, same)] * 3, "acc").high < 0.01
    assert difference_over_seeds(pairs).high > 0.05


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6))
def test_intervals_hold_their_values_within_the_possible(counts):
    rates = [(Rate.of(one, 50), Rate.of(other, 50)) for one, other in counts]
    rate, difference = rate_over_seeds([one for one, _ in rates]), difference_over_seeds(rates)
    turned = difference_over_seeds([(other, one) for one, other in rates])
    assert turned.value == pytest.approx(-difference.value)
    if len(counts) >= MIN_SEEDS:
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
        assert turned.low == pytest.approx(-difference.high)


def test_outcomes_of_other_samples_are_not_paired():
    pairs = [(Rate.of(30, 100), Rate.of(55, 100))] * 3
    one, other = bits(np.ones(100), np.arange(100) < 30), bits(np.ones(99), np.arange(99) < 55)
    found = difference_over_seeds(pairs, [(one, other)] * 3)
    assert not found.paired_samples and found == difference_over_seeds(pairs)
    assert difference_on_samples(*pairs[0], (one, other)) == difference_on_samples(*pairs[0])


def test_only_samples_that_both_get_right_cancel():
    fails, places = np.arange(200) % 2 == 0, np.arange(200)
    rates = (Rate.of(50, 100), Rate.of(50, 100))
    widths = []
    for first, second in ((places < 100, places < 100), (places < 100, places >= 50), (places < 100, places >= 100)):
        outcomes = (bits(first, fails), bits(second & (second.cumsum() <= 100), fails))
        found = difference_on_samples(*rates, outcomes)
        widths.append(found.high - found.low)
    apart = difference_on_samples(*rates)
    assert widths[0] == pytest.approx(0) and widths[2] == pytest.approx(apart.high - apart.low)
    assert 0.5 * widths[2] < widths[1] < widths[2]


def test_seeds_are_taken_to_vary_at_least_as_told():
    agreeing, apart = [Rate.of(100, 1000)] * 3, [Rate.of(count, 1000) for count in (50, 100, 150)]
    found = rate_over_seeds(agreeing, least_spread=0.05)
    within = Rate.of(100, 1000).high - 0.1
    assert found.high - 0.1 == pytest.approx(sqrt((1.959964 * 0.05) ** 2 / 3 + within**2), abs=1e-6)
    assert rate_over_seeds(apart, least_spread=0.05) == rate_over_seeds(apart)
    pairs = [(rate, Rate.of(20, 1000)) for rate in agreeing]
    assert difference_over_seeds(pairs, least_spread=0.05).high > difference_over_seeds(pairs).high
