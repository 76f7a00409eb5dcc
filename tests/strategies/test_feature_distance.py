import math

import pytest
import torch

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.feature_distance import (
    CARTL_NORMS,
    DELTA_ATTENTION,
    DELTA_PLAIN,
    MEAN_SQUARES,
    POOLED_ABSOLUTE,
    UNEXPLAINED,
    FeatureDistance,
    channel_axis,
)

# Two maps of (2 channels, 1, 2): the differences are 1, 2 | 3, 4 in the first sample, and 0, 0 | 0, 2 in the second.
MADE = {"maps": torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[5.0, 5.0]], [[5.0, 7.0]]]])}
WANTED = {"maps": torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]]], [[[5.0, 5.0]], [[5.0, 5.0]]]])}
ATTENTION = {"maps": torch.tensor([0.5, 1.5])}


@pytest.mark.parametrize(
    ("distance", "channels", "by_hand"),
    [
        (MEAN_SQUARES, None, (1 + 4 + 9 + 16 + 4) / 8),
        (DELTA_PLAIN, None, (1 + 4 + 9 + 16 + 4) / 2),
        (DELTA_ATTENTION, ATTENTION, (0.5 * 5 / 2 + 1.5 * 25 / 2 + 1.5 * 4 / 2) / 2),
        (CARTL_NORMS, None, (math.sqrt(30) + math.sqrt(4)) / math.sqrt(4)),
        (POOLED_ABSOLUTE, None, (1.5 + 3.5 + 0 + 1) / 2),
    ],
    ids=["Renofeation", "DELTA without attention", "DELTA", "CARTL", "feature LwF"],
)
def test_each_published_distance_is_what_a_hand_computes(distance, channels, by_hand):
    assert distance(MADE, WANTED, [], channels).item() == pytest.approx(by_hand, rel=1e-6)
    both = distance({**MADE, "again": MADE["maps"]}, {**WANTED, "again": WANTED["maps"]}, [],
                    channels and {**channels, "again": channels["maps"]})  # fmt: skip
    assert both.item() == pytest.approx(2 * by_hand, rel=1e-6)


def tokens():
    generator = torch.Generator().manual_seed(0)
    made, wanted = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    return made, wanted, torch.tensor([[True, True, False], [True, False, False]])


def test_padding_counts_in_no_sum_and_in_no_mean():
    made, wanted, real = tokens()
    rows = [(made - wanted)[row][real[row]] for row in range(2)]
    by_hand = {
        MEAN_SQUARES: torch.cat(rows).square().mean(),
        DELTA_PLAIN: torch.cat(rows).square().sum() / 2,
        DELTA_ATTENTION: sum(row.square().sum() / len(row) for row in rows) / 2,
        CARTL_NORMS: sum(row.square().mean().sqrt() for row in rows),
        POOLED_ABSOLUTE: sum(row.mean(0).abs().sum() for row in rows) / 2,
        FeatureDistance(mean_over=("samples", "positions")): torch.cat(rows).square().sum() / 3,
    }
    for distance, expected in by_hand.items():
        assert distance({"a": made}, {"a": wanted}, [real]).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("distance", [MEAN_SQUARES, DELTA_PLAIN, DELTA_ATTENTION, CARTL_NORMS, POOLED_ABSOLUTE])
def test_nothing_at_padding_reaches_the_distance_or_its_gradient(distance):
    made = torch.ones(1, 2, 3, requires_grad=True)
    broken = torch.cat([torch.zeros(1, 1, 3), torch.full((1, 1, 3), torch.nan)], 1)
    found = distance({"a": made}, {"a": broken}, [torch.tensor([[True, False]])])
    found.backward()
    assert found.isfinite() and made.grad[:, 0].all() and not made.grad[:, 1].any()


def test_a_norm_has_no_gradient_where_the_features_are_the_teachers():
    made = torch.ones(2, 3, requires_grad=True)
    CARTL_NORMS({"a": made}, {"a": torch.ones(2, 3)}, []).backward()
    assert not made.grad.any()


def test_weights_of_two_distances_are_converted_by_their_divisors():
    shape = (2, 2, 2)  # samples, channels, positions of the maps
    ones = {"maps": torch.ones(2)}
    values = {one: one(MADE, WANTED, [], ones).item() for one in (MEAN_SQUARES, DELTA_PLAIN, DELTA_ATTENTION)}
    for one, other in ((MEAN_SQUARES, DELTA_PLAIN), (DELTA_PLAIN, DELTA_ATTENTION)):
        weight = 3.0 * other.divisor(*shape) / one.divisor(*shape)
        assert weight * values[other] == pytest.approx(3.0 * values[one], rel=1e-6)
    # What the docstring says of DELTA's published weight.
    assert 0.01 * MEAN_SQUARES.divisor(64, 512, 49) / DELTA_ATTENTION.divisor(64, 512, 49) == pytest.approx(163.84)


@pytest.mark.parametrize(
    ("distance", "told"),
    [(CARTL_NORMS, "norm='l2'"), (POOLED_ABSOLUTE, "pooled=True"), (UNEXPLAINED, "over_variance=True")],
)
def test_what_is_no_sum_over_elements_has_no_divisor(distance, told):
    with pytest.raises(ValueError, match=f"{told} is no sum over elements"):
        distance.divisor(2, 2, 2)


def test_four_axes_are_taken_with_the_channels_second_and_fewer_with_them_last():
    shapes = [(2, 3, 5, 5), (2, 5, 3), (2, 3)]
    assert [shape[channel_axis(torch.zeros(shape))] for shape in shapes] == [3, 3, 3]


def test_the_share_that_is_not_explained_is_0_for_the_teachers_features_and_1_for_their_mean():
    wanted = {"maps": torch.randn(3, 4, 5, 5), "tokens": torch.randn(3, 5, 4), "pooled": torch.randn(3, 4)}
    axes = {"maps": (0, 2, 3), "tokens": (0, 1), "pooled": (0,)}
    means = {name: one.mean(axes[name], keepdim=True).expand_as(one) for name, one in wanted.items()}
    for name, one in wanted.items():
        assert UNEXPLAINED({name: one}, {name: one}, []) == 0
        assert UNEXPLAINED({name: means[name]}, {name: one}, []).item() == pytest.approx(1)
    both = UNEXPLAINED({**means, "maps": wanted["maps"]}, wanted, [])
    assert both.item() == pytest.approx(2 / 3)


def test_features_that_do_not_vary_in_a_batch_count_nothing():
    made = torch.ones(1, 4, requires_grad=True)
    share = UNEXPLAINED({"pooled": made}, {"pooled": torch.zeros(1, 4)}, [])
    share.backward()
    assert share == 0 and not made.grad.any()


def test_features_of_half_precision_are_compared_in_full():
    made, wanted, real = tokens()
    half = MEAN_SQUARES({"a": made.bfloat16()}, {"a": wanted.bfloat16()}, [real])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(MEAN_SQUARES({"a": made}, {"a": wanted}, [real]).item(), rel=2e-2)


def test_features_of_two_widths_are_refused_with_what_to_do():
    with pytest.raises(
        UnsupportedModelError, match=r"'a' are \(2, 3\) .*and \(2, 4\).*layers=.*Renofeation\(projector=True\)"
    ):
        MEAN_SQUARES({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)}, [])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"norm": "l1"}, "norm is of squares, absolute, l2, but got 'l1'"),
        ({"mean_over": ("sample",)}, "mean_over is of samples, channels, positions, but got 'sample'"),
        ({"layers": "avg"}, "layers is of sum, mean, but got 'avg'"),
        ({"factor": 0.0}, "factor is above 0"),
        ({"norm": "absolute", "over_variance": True}, "over_variance is for norm='squares'"),
    ],
)
def test_what_is_no_distance_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        FeatureDistance(**options)
