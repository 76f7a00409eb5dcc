import numpy as np
import pytest

from remos_hf.applications.detection import InputDetector, detection_of
from remos_hf.applications.input_features import Observed


def seen(features, predicted):
    return Observed(np.array(features, np.int16), np.array(predicted))


# The first feature is the label that the features speak for, the second says nothing of clean inputs.
CLEAN = seen([[0, 0], [0, 1], [4, 0], [4, 1], [9, 1], [9, 0]], [0, 0, 1, 1, 2, 2])


def test_one_that_saw_no_attack_flags_where_the_features_speak_for_another_label():
    detector = InputDetector.fit(CLEAN)
    assert not detector.knows_attacks and not detector.flags(CLEAN).any()
    assert detector.flags(seen([[4, 0], [4, 1], [0, 1]], [1, 0, 2])).tolist() == [False, True, True]


def test_a_label_that_no_clean_input_had_is_flagged():
    assert InputDetector.fit(CLEAN).scores(seen([[4, 0]], [7])).tolist() == [1.0]


def test_one_that_saw_attacks_flags_what_looks_like_them_whatever_the_label():
    detector = InputDetector.fit(CLEAN, seen([[0, 7], [4, 8], [9, 9]], [1, 2, 0]))
    assert detector.knows_attacks
    assert detector.flags(seen([[4, 0], [4, 9], [0, 8]], [0, 1, 0])).tolist() == [False, True, True]
    assert not detector.flags(CLEAN).any()


def test_scores_are_shares_of_the_leaf():
    mixed = seen([[0, 0]] * 4 + [[5, 0]] * 2, [0, 0, 0, 1, 1, 1])
    detector = InputDetector.fit(mixed)
    assert detector.scores(seen([[0, 0], [0, 0], [5, 0]], [0, 1, 1])).tolist() == [0.25, 0.75, 0.0]
    assert len(detector.scores(mixed[:0])) == 0
    even = InputDetector.fit(seen([[0, 0]] * 2 + [[5, 0]], [0, 1, 1]))
    assert even.scores(mixed[:1]).tolist() == [0.5] and not even.flags(mixed[:1]).any()


def test_the_same_seed_grows_the_same_tree():
    random = np.random.default_rng(0)
    noise = Observed(random.integers(-3, 4, (60, 30)).astype(np.int16), random.integers(0, 3, 60))
    test = Observed(random.integers(-3, 4, (60, 30)).astype(np.int16), random.integers(0, 3, 60))
    one, two, other = (InputDetector.fit(noise, seed=seed).scores(test) for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_measures_of_scores():
    found = detection_of(np.array([0.0, 0.2, 0.9, 0.0]), np.array([1.0, 0.6, 0.1]))
    assert (found.recall.count, found.recall.num_samples) == (2, 3)
    assert (found.false_alarms.count, found.false_alarms.num_samples) == (1, 4)
    assert found.precision == pytest.approx(2 / 3) and found.f1 == pytest.approx(2 / 3)
    assert found.auroc == pytest.approx((4 + 3 + 2) / 12)
    assert found.to_dict()["recall"]["value"] == pytest.approx(2 / 3)


def test_what_was_not_measured_is_none():
    none = detection_of(np.array([0.0, 0.5]), np.zeros(0))
    assert none.recall.value is none.precision is none.f1 is none.auroc is None
    assert none.false_alarms.value == 0.0  # a score of one half is no flag


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="3 features|looks at 2 features"):
        InputDetector.fit(CLEAN).scores(seen([[1, 2, 3]], [0]))
    with pytest.raises(ValueError, match="looks at 2 features"):
        InputDetector.fit(CLEAN, seen([[1, 2, 3]], [0]))
    with pytest.raises(ValueError, match="at least one clean"):
        InputDetector.fit(CLEAN, CLEAN[:0])
    with pytest.raises(ValueError, match="several labels"):
        InputDetector.fit(CLEAN[:2])
    for wrong in (np.array([1.5]), np.array([np.nan]), np.zeros((1, 1))):
        with pytest.raises(ValueError, match="from 0 to 1"):
            detection_of(np.array([0.0]), wrong)
