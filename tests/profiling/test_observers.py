import pytest
import torch

from remos_hf.profiling.observers import Activation, Padding

REAL = torch.tensor([[True, True, False], [True, False, False]])


def held(values, channels_first, real=REAL, careful=False):
    activation = Activation(channels_first, None if real is None else Padding(real), careful, 3)
    activation.hold(values, values)
    return activation


@pytest.mark.parametrize("channels_first", [False, True])
def test_sums_and_extremes_are_those_of_each_sample(channels_first):
    values = torch.randn(2, 3, 4)
    activation = held(values.transpose(1, 2) if channels_first else values, channels_first)
    low, high = activation.extremes
    assert torch.equal(low, values.amin(-1))
    assert torch.equal(high, values.amax(-1))
    torch.testing.assert_close(activation.mean, (values * REAL[..., None]).sum(1))
    assert torch.equal(activation.rows(), values[REAL])


@pytest.mark.parametrize("channels_first", [False, True])
def test_without_padding_means_are_over_all_positions(channels_first):
    values = torch.randn(2, 3, 4)
    activation = held(values.transpose(1, 2) if channels_first else values, channels_first, real=None)
    torch.testing.assert_close(activation.mean, values.mean(1))
    assert activation.rows().shape == (6, 4)
    low, _ = activation.extremes
    assert low.amin(-1).tolist() == values.amin((1, 2)).tolist()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_careful_sum_does_not_touch_padding(channels_first, bad):
    values = torch.ones(2, 3, 4)
    values[1, 2] = bad
    given = values.transpose(1, 2) if channels_first else values
    assert held(given, channels_first, careful=True).mean.tolist() == [[2.0] * 4, [1.0] * 4]
    assert not held(given, channels_first).mean.isfinite().all()


def test_half_precision_is_added_up_in_float32():
    assert held(torch.ones(2, 3, 4, dtype=torch.bfloat16), False).mean.dtype == torch.float32
