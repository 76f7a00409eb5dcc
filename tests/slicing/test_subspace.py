import pytest
import torch

from remos_hf.slicing.subspace import InputSums, share_that_keeps, strongest

FEW, MANY = 7, 6000  # rows: fewer than columns, and more than are gathered before they are multiplied


def rows_of(count, columns=12, outputs=5, groups=1, seed=0):
    """Inputs of unequal sizes around a mean, and outputs that they explain in part."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = draw(groups, count, columns) * torch.logspace(0, -3, columns, dtype=torch.float64) + 0.3
    return inputs, inputs @ draw(groups, columns, outputs) + 0.1 * draw(groups, count, outputs) - 1


def sums_of(inputs, outputs, size=None):
    sums = InputSums()
    for start in range(0, inputs.shape[1], size or inputs.shape[1]):
        some = slice(start, start + (size or inputs.shape[1]))
        sums.add(inputs[:, some], outputs[:, some])
    return sums


def by_hand(inputs, outputs, energy, biased):
    """Project on the strongest principal directions, then least squares of torch; one group.

    Without a bias the mean is one more direction, and the fit goes through zero.
    """
    mean = inputs.mean(0)
    _, values, vectors = torch.linalg.svd(inputs - mean, full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum()
    rank = 1 + int((held < energy).sum())
    kept = vectors[:rank].T
    if biased:
        inputs, outputs = inputs - mean, outputs - outputs.mean(0)
    else:
        kept = torch.cat([kept, mean[:, None]], 1)
    inside = torch.linalg.lstsq(inputs @ kept, outputs, driver="gelsd").solution
    return (kept @ inside).T, rank


@pytest.mark.parametrize("count", [FEW, 40, MANY])
@pytest.mark.parametrize("biased", [True, False])
def test_weights_are_the_least_squares_fit_inside_the_strongest_directions(count, biased):
    inputs, outputs = rows_of(count)
    fit = sums_of(inputs, outputs, 1000).directions(biased=biased).fit(energy=0.97)
    rows, rank = by_hand(inputs[0], outputs[0], 0.97, biased)
    assert fit.rank == rank < 12 and fit.energy >= 0.97 and fit.rows_seen == count
    torch.testing.assert_close(fit.rows[0], rows, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_all_of_the_energy_gives_what_the_outputs_were_made_by_on_the_sample(count):
    inputs, _ = rows_of(count)
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    outputs = inputs @ weight.T + bias
    fit = sums_of(inputs, outputs).directions(biased=True).fit(energy=1)
    torch.testing.assert_close(inputs[0] @ fit.rows[0].T + fit.offset[0], outputs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_without_a_bias_too(count):
    inputs, _ = rows_of(count)
    outputs = inputs @ torch.randn(12, 5, dtype=torch.float64)
    fit = sums_of(inputs, outputs).directions(biased=False).fit(energy=1)
    torch.testing.assert_close(inputs[0] @ fit.rows[0].T, outputs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [0, 1, 1e3])
def test_the_mean_input_does_not_decide_what_is_kept(size):
    inputs, outputs = rows_of(MANY)
    mean = inputs.mean(1, keepdim=True)
    directions = sums_of(inputs - mean + size, outputs).directions(biased=False)
    with_bias = sums_of(inputs, outputs).directions(biased=True)
    assert directions.fit(energy=0.97).rank == with_bias.fit(energy=0.97).rank
    torch.testing.assert_close(directions.shares, with_bias.shares)


def test_an_input_that_never_varies_keeps_its_output_without_a_bias():
    inputs, outputs = torch.full((2, 30, 4), 0.3).float(), rows_of(30, groups=2)[1]
    fit = sums_of(inputs, outputs).directions(biased=False).fit(energy=0.5)
    assert fit.rank == 0
    torch.testing.assert_close((fit.rows @ inputs[:, 0].double()[..., None])[..., 0], outputs.mean(1))


@pytest.mark.parametrize("count", [FEW, MANY])
def test_order_and_cutting_change_nothing_beyond_rounding(count):
    inputs, outputs = rows_of(count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    some = sums_of(inputs, outputs).directions(biased=True).fit(energy=0.99)
    others = sums_of(inputs[:, shuffled], outputs[:, shuffled], 3).directions(biased=True).fit(energy=0.99)
    torch.testing.assert_close(some.rows, others.rows, rtol=1e-8, atol=1e-10)
    assert some.rank == others.rank


@pytest.mark.parametrize("count", [FEW, MANY])
def test_directions_that_the_data_never_shows_get_nothing(count):
    inputs, outputs = rows_of(count)
    inputs[..., 3] = 0
    hidden = torch.nn.functional.normalize(torch.randn(12, dtype=torch.float64), dim=0).masked_fill(
        torch.arange(12) == 3, 0
    )
    hidden = hidden / hidden.norm()
    inputs = inputs - (inputs @ hidden)[..., None] * hidden
    for ridge in (False, True):
        directions = sums_of(inputs, outputs).directions(biased=False, ridge=ridge)
        fit = directions.ridge_fit(0.1, by_channel=False) if ridge else directions.fit(energy=1)
        assert torch.equal(fit.rows[..., 3], torch.zeros(1, 5, dtype=torch.float64))
        assert float((fit.rows @ hidden).abs().max()) < 1e-6 * float(fit.rows.abs().max())
        assert fit.empty >= 1


def test_groups_are_fitted_each_by_itself():
    inputs, outputs = rows_of(50, groups=3)
    together = sums_of(inputs, outputs).directions(biased=True).fit(energy=0.95)
    alone = [sums_of(inputs[[g]], outputs[[g]]).directions(biased=True).fit(energy=0.95) for g in range(3)]
    torch.testing.assert_close(together.rows, torch.cat([one.rows for one in alone]))
    assert together.rank == sum(one.rank for one in alone) and together.of == 36


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_ridge_is_the_closed_form(by_channel, biased):
    inputs, outputs = rows_of(FEW)
    fit = sums_of(inputs, outputs).directions(biased=biased, ridge=True).ridge_fit(0.5, by_channel=by_channel)
    x, t = (one[0] - one[0].mean(0) * biased for one in (inputs, outputs))
    cov = x.T @ x / FEW
    penalty = torch.diag(cov.diagonal() if by_channel else cov.diagonal().median().expand(12))
    torch.testing.assert_close(fit.rows[0], t.T @ x / FEW @ torch.linalg.inv(cov + 0.5 * penalty))
    assert 0 < fit.rank < 12


def test_a_ridge_by_channel_does_not_depend_on_the_channels_units():
    inputs, outputs = rows_of(40)
    units = torch.logspace(2, -2, 12, dtype=torch.float64)
    some, others = (
        sums_of(x, outputs).directions(biased=True, ridge=True).ridge_fit(1.0, by_channel=True)
        for x in (inputs, inputs * units)
    )
    torch.testing.assert_close(some.rows, others.rows * units)


@pytest.mark.parametrize("ridge", [True, False])
def test_an_input_that_never_varies_leaves_the_mean_output_to_the_bias(ridge):
    inputs, outputs = torch.full((1, 30, 4), 0.3).float(), rows_of(30)[1]
    directions = sums_of(inputs, outputs).directions(biased=True, ridge=ridge)
    fit = directions.ridge_fit(1.0, by_channel=False) if ridge else directions.fit()
    assert not fit.rows.any() and fit.rank == 0
    torch.testing.assert_close(fit.offset, outputs.mean(1))


def test_the_fewest_values_are_kept():
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert strongest(values, 0.7).sum(1).tolist() == [2, 1]
    assert strongest(values, 0.71).sum(1).tolist() == [3, 1]
    assert strongest(values, 1).sum(1).tolist() == [4, 1]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_one_threshold_keeps_the_energy_of_all_inputs_together(energy):
    shares = [torch.rand(1, size).sort(descending=True).values for size in (3, 40, 200)]
    shares = [one / one.sum() for one in shares]
    threshold = share_that_keeps(shares, energy)
    kept = sum(float(one[one >= threshold].sum()) for one in shares) / 3
    fewer = sum(float(one[one > threshold].sum()) for one in shares) / 3
    assert fewer < energy <= kept + 1e-6


def test_a_threshold_leaves_one_direction_at_least():
    fit = sums_of(*rows_of(40, groups=2)).directions(biased=True).fit(smallest_share=0.9)
    assert fit.rank == 2


def test_wide_moments_are_whole():
    inputs = torch.randn(1, 4200, 520, dtype=torch.float64)
    directions = sums_of(inputs, inputs[..., :1]).directions(biased=False)
    torch.testing.assert_close(directions.covariance[0], torch.cov(inputs[0].T, correction=0))


@pytest.mark.parametrize("count", [FEW, MANY])
def test_what_is_not_finite_is_seen(count):
    inputs, outputs = rows_of(count)
    assert sums_of(inputs, outputs).is_finite
    inputs[0, 2, 1] = float("nan")
    assert not sums_of(inputs, outputs).is_finite
