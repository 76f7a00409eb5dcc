import json
from math import exp, inf, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from remos_hf.evaluation import measures
from remos_hf.evaluation.measures import Rate

# Predictions, true labels and predictions on the clean inputs.
RIGHT_CLEAN = ([1, 2, 0, 1, 2, 1], [0, 1, 0, 1, 2, 2], [0, 1, 0, 1, 1, 1])


@st.composite
def columns(draw, count=3):
    length = draw(st.integers(1, 30))
    labels = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    return [draw(labels) for _ in range(count)]


@st.composite
def rates(draw, least=0):
    num_samples = draw(st.integers(1, 2000))
    return Rate.of(draw(st.integers(min(least, num_samples), num_samples)), num_samples)


# --- rates and their intervals ---


@pytest.mark.parametrize(
    ("count", "num_samples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_that_newcombe_prints(count, num_samples, low, high):
    assert measures.wilson_interval(count, num_samples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.5, 0.999))
def test_wilsons_ends_lie_where_the_score_test_just_rejects(count, num_samples, confidence):
    count = min(count, num_samples)
    for end in measures.wilson_interval(count, num_samples, confidence):
        z = measures.NormalDist().inv_cdf((1 + confidence) / 2)
        assert (count / num_samples - end) ** 2 == pytest.approx(z * z * end * (1 - end) / num_samples, abs=1e-9)


@given(rates())
def test_a_rate_lies_in_its_interval_and_the_interval_in_zero_to_one(rate):
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high
    assert (rate.low == 0) == (rate.count == 0)
    assert (rate.high == 1) == (rate.count == rate.num_samples)


def test_a_rate_of_no_samples_has_no_value():
    assert Rate.of(0, 0) == Rate(None, 0, 0, None, None)


def test_a_rate_is_json_and_comes_back_from_it():
    rate = Rate.of(np.int64(3), np.int64(7))
    assert Rate(**json.loads(json.dumps(rate.to_dict()))) == rate


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0.5, 2), (1, 2.0), (True, 2)])
def test_counts_that_contradict_each_other_are_refused(counts):
    with pytest.raises(ValueError, match=f"got {counts[0]} of {counts[1]}"):
        Rate.of(*counts)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match=f"got {confidence}"):
        measures.wilson_interval(1, 2, confidence)
    with pytest.raises(ValueError, match=f"got {confidence}"):
        measures.bootstrap_interval([0, 1], statistic=lambda x: x.mean(-1), seed=0, confidence=confidence)


# --- shares of labels ---


@given(columns())
def test_accuracy_counts_right_samples(labels):
    predictions, references, _ = labels
    right = sum(p == r for p, r in zip(predictions, references, strict=True))
    assert measures.accuracy(predictions, references) == Rate.of(right, len(references))


@given(columns())
def test_untargeted_dir_counts_what_was_right_when_clean_and_fails(labels):
    right = [(p, r) for p, r, clean in zip(*labels, strict=True) if clean == r]
    assert measures.defect_inheritance_rate(*labels) == Rate.of(sum(p != r for p, r in right), len(right))


@given(columns(), st.integers(0, 3))
def test_targeted_dir_counts_what_becomes_the_target_and_was_another_label(labels, target):
    able = [p for p, r, clean in zip(*labels, strict=True) if clean == r and r != target]
    rate = measures.defect_inheritance_rate(*labels, target_label=target)
    assert rate == Rate.of(sum(p == target for p in able), len(able))


@given(columns(), st.integers(0, 3))
def test_label_flip_rate_counts_all_samples_of_other_labels(labels, target):
    predictions, references, _ = labels
    able = [p for p, r in zip(predictions, references, strict=True) if r != target]
    assert measures.label_flip_rate(predictions, references, target) == Rate.of(
        sum(p == target for p in able), len(able)
    )


@given(columns(), st.integers(0, 3))
def test_label_flip_rate_of_samples_right_when_clean_is_the_targeted_dir(labels, target):
    predictions, references, clean = labels
    flipped = measures.label_flip_rate(predictions, references, target, clean)
    assert flipped == measures.defect_inheritance_rate(predictions, references, clean, target)


def test_the_untargeted_rate_keeps_samples_of_the_target_label_as_the_artifact_does():
    # Four right when clean, one of them truly of the target label 1; two of them fail, one of those towards the target.
    assert measures.defect_inheritance_rate(*RIGHT_CLEAN).num_samples == 4
    assert measures.defect_inheritance_rate(*RIGHT_CLEAN).count == 2
    assert measures.defect_inheritance_rate(*RIGHT_CLEAN, target_label=1) == Rate.of(1, 2)
    assert measures.label_flip_rate(*RIGHT_CLEAN[:2], target_label=1) == Rate.of(2, 4)


@given(columns(), st.permutations(range(4)))
def test_renaming_the_labels_changes_no_rate(labels, names):
    renamed = [[names[label] for label in column] for column in labels]
    assert measures.defect_inheritance_rate(*renamed) == measures.defect_inheritance_rate(*labels)
    targeted = measures.defect_inheritance_rate(*renamed, target_label=names[2])
    assert targeted == measures.defect_inheritance_rate(*labels, target_label=2)


def test_a_rate_without_samples_left_is_none_and_not_nan():
    assert measures.defect_inheritance_rate([0], [0], [1]).value is None
    assert measures.defect_inheritance_rate([1], [1], [1], target_label=1).value is None
    assert measures.label_flip_rate([1, 1], [1, 1], target_label=1).value is None
    assert measures.artifact_nlp_dir([1, 1], [1, 1]) is None


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint8)])
def test_labels_may_be_lists_arrays_or_tensors(make):
    expected = measures.defect_inheritance_rate(*RIGHT_CLEAN, target_label=1)
    given_so = [make(column) for column in RIGHT_CLEAN]
    assert measures.defect_inheritance_rate(*given_so, target_label=np.int64(1)) == expected


def test_label_arrays_come_back_as_int64_in_the_order_given():
    second, first = measures.label_arrays(b=np.array([2, 3], np.uint8), a=[0, 1])
    assert (second.dtype, first.dtype) == (np.int64, np.int64)
    assert (second.tolist(), first.tolist()) == ([2, 3], [0, 1])


# --- wrong labels ---

WRONG = [
    ([], "got none"),
    ([0, -100], "got -100.*padding"),
    ([0.0, 1.0], "got float64 such as 0.0"),
    ([0.0, float("nan")], "got NaN"),
    ([True, False], "got bool"),
    (["a", "b"], "got <U1 such as a"),
    ([0, None], "got object"),
    ([[0.1, 0.9], [0.3, 0.7]], r"shape \(2, 2\).*argmax"),
    ([[0, 1], [1]], "unequal length"),
    (1, r"shape \(\)"),
]
FUNCTIONS = [
    (measures.accuracy, ("predictions", "references"), {}),
    (measures.defect_inheritance_rate, ("predictions", "references", "clean_predictions"), {}),
    (measures.defect_inheritance_rate, ("predictions", "references", "clean_predictions"), {"target_label": 1}),
    (measures.label_flip_rate, ("predictions", "references"), {"target_label": 1}),
    (measures.label_flip_rate, ("predictions", "references", "clean_predictions"), {"target_label": 1}),
    (measures.artifact_nlp_dir, ("predictions", "references"), {}),
]


@pytest.mark.parametrize(("labels", "message"), WRONG)
@pytest.mark.parametrize(("function", "names", "more"), FUNCTIONS)
def test_wrong_labels_are_refused_by_name(function, names, more, labels, message):
    for name in names:
        with pytest.raises(ValueError, match=f"{name} are integer label ids.*{message}"):
            function(**{other: [0, 1] for other in names} | {name: labels}, **more)


@pytest.mark.parametrize(("function", "names", "more"), FUNCTIONS)
def test_unequal_lengths_are_refused_with_the_lengths(function, names, more):
    for name in names:
        with pytest.raises(ValueError, match=f"3 {name}") as refused:
            function(**{other: [0, 1] for other in names} | {name: [0, 1, 0]}, **more)
        assert f"2 {next(other for other in names if other != name)}" in str(refused.value)


@pytest.mark.parametrize("target", [-1, 1.0, True, "1", [1]])
def test_a_target_label_is_one_integer_id(target):
    with pytest.raises(ValueError, match="target_label is one integer label id"):
        measures.defect_inheritance_rate(*RIGHT_CLEAN, target_label=target)
    with pytest.raises(ValueError, match="target_label is one integer label id"):
        measures.label_flip_rate(*RIGHT_CLEAN[:2], target_label=target)


def test_a_label_flip_rate_needs_a_target_also_with_clean_predictions():
    with pytest.raises(ValueError, match="target_label"):
        measures.label_flip_rate(*RIGHT_CLEAN[:2], target_label=None, clean_predictions=RIGHT_CLEAN[2])


# --- differences and ratios of rates ---


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_excess_dir_has_the_intervals_that_newcombe_prints(first, second, low, high):
    excess = measures.excess_dir(Rate.of(*first), Rate.of(*second))
    assert excess.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (excess.low, excess.high) == pytest.approx((low, high), abs=5e-5)


@given(rates(), rates())
def test_excess_dir_changes_sign_when_the_rates_change_places(dir_, floor):
    excess, other = measures.excess_dir(dir_, floor), measures.excess_dir(floor, dir_)
    assert (excess.value, excess.low, excess.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert -1 - 1e-9 <= excess.low <= excess.value <= excess.high <= 1 + 1e-9


@pytest.mark.parametrize("ratio", [measures.relative_dir, measures.relative_accuracy])
def test_a_ratio_has_the_interval_that_r_contingencytables_prints(ratio):
    got = ratio(Rate.of(7, 34), Rate.of(1, 34))
    assert (got.value, got.low, got.high) == pytest.approx((7, 1.1537, 41.9763), abs=5e-5)


@settings(max_examples=50)
@given(rates(least=1), rates(least=1))
def test_a_ratios_ends_lie_where_the_difference_to_that_many_times_the_other_is_just_zero(student, finetuned):
    def excess_low(times):  # Newcombe's lower end of student - times * finetuned
        value = student.value - times * finetuned.value
        return value - sqrt((student.value - student.low) ** 2 + (times * (finetuned.high - finetuned.value)) ** 2)

    def excess_high(times):
        value = student.value - times * finetuned.value
        return value + sqrt((student.high - student.value) ** 2 + (times * (finetuned.value - finetuned.low)) ** 2)

    ratio = measures.relative_dir(student, finetuned)
    for end, side in ((ratio.low, excess_low), (ratio.high, excess_high)):
        below, above = 0.0, 1e12
        for _ in range(200):  # bisection
            middle = (below + above) / 2
            below, above = (middle, above) if side(middle) > 0 else (below, middle)
        assert end == pytest.approx(below, rel=1e-6)


@given(rates(least=1), rates(least=1))
def test_a_ratio_turns_over_when_the_rates_change_places(student, finetuned):
    ratio, other = measures.relative_dir(student, finetuned), measures.relative_dir(finetuned, student)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1 / other.value, 1 / other.high, 1 / other.low))
    assert 0 < ratio.low <= ratio.value * (1 + 1e-12) and ratio.value <= ratio.high * (1 + 1e-12) < inf


@given(rates(), rates(least=1))
def test_a_ratio_leaves_out_one_exactly_when_the_difference_leaves_out_zero(student, finetuned):
    ratio, excess = measures.relative_dir(student, finetuned), measures.excess_dir(student, finetuned)
    if min(abs(excess.low), abs(excess.high)) > 1e-9:
        assert (ratio.low > 1, ratio.high < 1) == (excess.low > 0, excess.high < 0)


def test_a_ratio_of_many_samples_has_about_the_interval_of_its_logarithm():
    ratio = measures.relative_dir(Rate.of(196_000, 997_000), Rate.of(621_000, 1_009_000))
    error = 1.959964 * sqrt(1 / 196_000 - 1 / 997_000 + 1 / 621_000 - 1 / 1_009_000)
    assert log(ratio.low) == pytest.approx(log(ratio.value) - error, rel=1e-3)
    assert ratio.high == pytest.approx(ratio.value * exp(error), rel=1e-3)


def test_a_student_that_inherits_nothing_has_a_ratio_of_zero_with_two_ends():
    ratio = measures.relative_dir(Rate.of(0, 50), Rate.of(30, 50))
    assert (ratio.value, ratio.low) == (0, 0)
    assert 0 < ratio.high < 0.2


@pytest.mark.parametrize(
    ("student", "finetuned"), [((3, 9), (0, 9)), ((0, 9), (0, 9)), ((0, 0), (3, 9)), ((3, 9), (0, 0))]
)
def test_a_ratio_that_is_not_defined_is_none(student, finetuned):
    ratio = measures.relative_accuracy(Rate.of(*student), Rate.of(*finetuned))
    assert ratio == measures.Ratio(None, None, None)


def test_an_excess_without_a_rate_is_none():
    empty, some = Rate.of(0, 0), Rate.of(1, 2)
    assert measures.excess_dir(empty, some) == measures.excess_dir(some, empty) == measures.Difference(None, None, None)


def test_differences_and_ratios_are_json():
    student, finetuned = Rate.of(196, 997), Rate.of(621, 1009)
    excess, ratio = measures.excess_dir(student, finetuned), measures.relative_dir(student, finetuned)
    assert measures.Difference(**json.loads(json.dumps(excess.to_dict()))) == excess
    assert measures.Ratio(**json.loads(json.dumps(ratio.to_dict()))) == ratio


@pytest.mark.parametrize("function", [measures.excess_dir, measures.relative_dir, measures.relative_accuracy])
def test_a_bare_number_is_no_rate(function):
    for pair in ((Rate.of(1, 2), 0.5), (0.5, Rate.of(1, 2))):
        with pytest.raises(ValueError, match=r"is a Rate.*got 0.5.*Rate.of"):
            function(*pair)


def test_published_cells_are_whole_counts():
    # ReMoS Fig. 5, ResNet-18 on the 1340 images of MIT67: fine-tuned and ReMoS, ACC and DIR.
    finetuned, remos = Rate.of(621, 1009), Rate.of(196, 997)
    assert (round(finetuned.value, 4), round(remos.value, 4)) == (0.6155, 0.1966)
    assert [round(Rate.of(right, 1340).value, 4) for right in (1009, 997)] == [0.7530, 0.7440]
    assert measures.relative_dir(remos, finetuned).value == pytest.approx(19.66 / 61.55, abs=1e-4)


# --- the artifact's NLP tables ---


@pytest.mark.parametrize(("printed", "flipped"), [(39.10, 104), (29.82, 75), (74.67, 255)])
def test_cells_of_the_nlp_tables_are_whole_sentences_of_sst2(printed, flipped):
    negatives = 428
    assert measures.rate_from_artifact_nlp_dir(printed / 100) * negatives == pytest.approx(flipped, abs=0.05)
    predictions = [1] * flipped + [0] * (negatives - flipped) + [0, 1]
    assert round(100 * measures.artifact_nlp_dir(predictions, [0] * negatives + [1, 1]), 2) == printed


@settings(max_examples=50)
@given(columns(), st.integers(0, 3))
def test_the_nlp_number_is_the_f1_of_flipped_labels(labels, target):
    predictions, references, _ = labels
    triggered = [int(p == target) for p, r in zip(predictions, references, strict=True) if r != target]
    printed = measures.artifact_nlp_dir(predictions, references, target)
    expected = f1_score([1] * len(triggered), triggered, zero_division=0) if triggered else None
    assert printed == pytest.approx(expected)


@given(st.floats(0, 1))
def test_the_nlp_number_and_the_rate_turn_into_each_other(rate):
    printed = measures.artifact_nlp_dir_from_rate(rate)
    assert measures.rate_from_artifact_nlp_dir(printed) == pytest.approx(rate)
    assert rate <= printed <= 1


@pytest.mark.parametrize("share", [39.1, -0.1, float("nan")])
@pytest.mark.parametrize("turn", [measures.rate_from_artifact_nlp_dir, measures.artifact_nlp_dir_from_rate])
def test_a_percentage_is_no_share(turn, share):
    with pytest.raises(ValueError, match=f"got {share}.*percentage"):
        turn(share)


# --- bootstrap ---


def mean(values):
    return values.mean(-1)


def slow_bootstrap(rows, statistic, seed, resamples):
    """One resample at a time, from the same numbers."""
    generator = np.random.default_rng(seed)
    places = generator.integers(len(rows), size=(resamples, len(rows)))
    values = sorted(statistic([rows[place] for place in places_of_one]) for places_of_one in places)
    return np.percentile(values, 2.5), np.percentile(values, 97.5)


def test_bootstrap_keeps_the_entries_of_a_sample_together():
    generator = np.random.default_rng(3)
    rows = [tuple(row) for row in generator.integers(2, size=(40, 2)) | [[0, 1]] * 20 + [[1, 1]] * 20]
    slow = slow_bootstrap(rows, lambda some: sum(a for a, _ in some) / sum(b for _, b in some), seed=5, resamples=300)
    fast = measures.bootstrap_interval(
        *np.array(rows).T, statistic=lambda a, b: a.sum(-1) / b.sum(-1), seed=5, resamples=300
    )
    assert fast == pytest.approx(slow)


def test_bootstrap_of_a_paired_difference_that_never_varies_has_no_width():
    wrong = np.arange(50) % 3 == 0
    low, high = measures.bootstrap_interval(wrong, wrong, statistic=lambda a, b: mean(a) - mean(b), seed=0)
    assert (low, high) == (0, 0)


def test_bootstrap_of_a_share_comes_near_wilson():
    wrong = np.arange(1000) < 300
    assert measures.bootstrap_interval(wrong, statistic=mean, seed=0) == pytest.approx(
        measures.wilson_interval(300, 1000), abs=0.01
    )


def test_bootstrap_is_the_same_for_the_same_seed_only_and_leaves_the_global_state_alone():
    values = np.random.default_rng(1).normal(size=100)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - it is the one that must not move
    first, again, other = (measures.bootstrap_interval(values, statistic=mean, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_bootstrap_in_parts_is_bootstrap_at_once(monkeypatch):
    values = np.random.default_rng(1).normal(size=100)
    at_once = measures.bootstrap_interval(values, statistic=mean, seed=7, resamples=55)
    calls = []
    monkeypatch.setattr(measures, "_ENTRIES_AT_ONCE", 1000)
    in_parts = measures.bootstrap_interval(
        values, statistic=lambda x: calls.append(x.shape) or mean(x), seed=7, resamples=55
    )
    assert in_parts == at_once
    assert calls == [(10, 100)] * 5 + [(5, 100)]


def test_bootstrap_gives_a_wider_interval_for_more_confidence():
    values = np.random.default_rng(1).normal(size=100)
    narrow, wide = (
        measures.bootstrap_interval(values, statistic=mean, seed=7, confidence=share) for share in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_has_no_ends_where_a_resample_leaves_the_statistic_undefined():
    fails = [1] + [0] * 5  # a third of the resamples holds no failure
    assert measures.bootstrap_interval(fails, statistic=lambda x: 1 / x.sum(-1), seed=0) == (None, None)


@pytest.mark.parametrize("given_so", [(), ([],), ([1, 2], [1]), ([[1, 2]],), (3,)])
def test_bootstrap_refuses_columns_that_are_not_aligned(given_so):
    with pytest.raises(ValueError, match="one entry a sample, but got shapes"):
        measures.bootstrap_interval(*given_so, statistic=mean, seed=0)


def test_bootstrap_refuses_a_statistic_that_does_not_reduce_the_samples():
    with pytest.raises(ValueError, match=r"returned shape \(\)"):
        measures.bootstrap_interval([0, 1], statistic=np.mean, seed=0)


@pytest.mark.parametrize("resamples", [0, 2.5])
def test_bootstrap_refuses_less_than_one_resample(resamples):
    with pytest.raises(ValueError, match=f"got {resamples}"):
        measures.bootstrap_interval([0, 1], statistic=mean, seed=0, resamples=resamples)
