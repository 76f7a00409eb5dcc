import pytest
import torch

from remos_hf.profiling.criteria import (
    ActivationStatistics,
    median_coverage,
    strong_coverage,
    threshold_coverage,
    top_k_coverage,
)

ALL = [median_coverage(), threshold_coverage(), top_k_coverage(), strong_coverage()]


def statistics(rows, low, high):
    return ActivationStatistics(torch.tensor(low), torch.tensor(high), torch.tensor(rows))


def test_the_median_covers_the_upper_half_whatever_the_range():
    covered = median_coverage()(statistics([[3.0, 1.0, 900.0, 2.0], [3.0, 1.0, -900.0, 2.0]], [-1e4, 0.0], [1e4, 9.0]))
    assert covered.tolist() == [[True, False, True, False], [True, False, False, True]]


def test_of_an_odd_number_the_median_itself_is_not_covered():
    assert median_coverage()(statistics([[1.0, 2.0, 3.0]], [0.0], [9.0])).tolist() == [[False, False, True]]


def test_neurons_that_share_the_median_are_not_covered():
    # Behind a ReLU most neurons may be 0: they are not used.
    assert median_coverage()(statistics([[0.0, 0.0, 0.0, 5.0]], [0.0], [9.0])).tolist() == [[False, False, False, True]]


def test_nc_wants_the_scaled_mean_strictly_above_the_threshold():
    # scaled means 0.5, 0.75, 0.25 of a range 2..6
    covered = threshold_coverage(0.5)(statistics([[4.0, 5.0, 3.0]], [2.0], [6.0]))
    assert covered.tolist() == [[False, True, False]]


def test_tknc_covers_exactly_k_and_prefers_the_first_of_equals():
    covered = top_k_coverage(2)(statistics([[1.0, 3.0, 3.0, 3.0]], [0.0], [9.0]))
    assert covered.tolist() == [[False, True, True, False]]
    many = torch.zeros(1, 500)  # enough that an unstable sort would mix them up
    many[0, 100:] = 1.0
    covered = top_k_coverage(7)(ActivationStatistics(torch.tensor([0.0]), torch.tensor([1.0]), many))
    assert covered[0].nonzero().flatten().tolist() == list(range(100, 107))


def test_tknc_with_few_neurons_covers_all():
    assert top_k_coverage(10)(statistics([[1.0, 2.0]], [0.0], [9.0])).all()


def test_snac_covers_the_upper_part_of_the_range_of_means():
    # range of means 0..4, k=2: strictly above 2
    covered = strong_coverage(2)(statistics([[0.0, 2.0, 2.5, 4.0]], [-9.0], [9.0]))
    assert covered.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_a_constant_or_broken_activation_covers_nothing(criterion):
    nan = float("nan")
    rows = statistics([[1.0, 1.0], [nan, nan]], [1.0, nan], [1.0, nan])
    assert not criterion(rows).any()


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_stacked_layers_are_decided_one_by_one(criterion):
    mean = torch.rand(3, 4, 5)
    low, high = torch.zeros(3, 4), torch.ones(3, 4)
    together = criterion(ActivationStatistics(low, high, mean))
    alone = [criterion(ActivationStatistics(low[i], high[i], mean[i])) for i in range(3)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("make", "value"),
    [(threshold_coverage, 1.0), (threshold_coverage, -0.1), (top_k_coverage, 0), (strong_coverage, 0.5)],
)
def test_parameters_out_of_range_are_refused_with_their_value(make, value):
    with pytest.raises(ValueError, match=f"got {value}"):
        make(value)


def test_a_criterion_describes_itself_as_json():
    assert top_k_coverage(3).to_dict() == {"name": "TopKCoverage", "k": 3}
