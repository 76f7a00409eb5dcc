import pytest
import torch

from remos_hf.slicing import contributions_kept
from remos_hf.slicing.contributions_kept import kept_signs, spread
from tests.slicing.slow_contributions import signs_of

THETAS = (0.0, 0.05, 0.3, 0.9)


def effects_of(rows, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, inputs, generator=generator)
    drawn[::2] = drawn[::2].round()  # many equal ones, and zeros
    return drawn


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("inputs", [1, 2, 7, 64, 65, 300])
def test_the_signs_are_those_of_sorting_one_row_at_a_time(theta, inputs):
    effects = effects_of(40, inputs)
    slow = torch.zeros_like(effects)
    for row, one in enumerate(effects.tolist()):
        for place, sign in signs_of(one, theta, 1):
            slow[row, place] = sign
    assert torch.equal(kept_signs(effects.clone(), theta), slow)


def test_what_is_dropped_stays_under_theta_and_no_larger_number_would():
    effects = torch.randn(200, 90, generator=torch.Generator().manual_seed(1)).double()
    dropped = kept_signs(effects.float(), 0.3) == 0
    bound = 0.3 * effects.sum(1).abs()
    assert bool(((effects * dropped).sum(1).abs() < bound).all())
    ordered = effects.gather(1, effects.abs().argsort(1))
    under = ordered.cumsum(1).abs() < bound[:, None]
    most = (under * torch.arange(1, 91)).amax(1)
    assert torch.equal(dropped.sum(1), most)


def test_theta_0_keeps_every_effect_that_is_not_zero_and_a_larger_theta_keeps_fewer():
    effects = effects_of(100, 80)
    kept = [kept_signs(effects.clone(), theta) != 0 for theta in THETAS]
    alive = effects.sum(1, keepdim=True) != 0
    assert torch.equal(kept[0], (effects != 0) & alive)
    for more, fewer in zip(kept, kept[1:], strict=False):
        assert bool((more | ~fewer).all()) and int(fewer.sum()) < int(more.sum())


def test_the_order_of_the_inputs_changes_nothing():
    effects = effects_of(100, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kept_signs(effects[:, order].contiguous(), 0.3), kept_signs(effects.clone(), 0.3)[:, order])


def test_equal_effects_stay_or_go_together():
    assert kept_signs(torch.tensor([[1.0, 1.0, 1.0, 9.0]]), 0.2).tolist() == [[1, 1, 1, 1]]
    assert kept_signs(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), 0.2).tolist() == [[0, 0, 1, 1]]


def test_the_maximum_number_goes_not_the_number_before_the_first_violation():
    # 3 of the bottom violate at once, and with -3 behind them they do not.
    assert kept_signs(torch.tensor([[3.0, -3.1, 10.0]]), 0.05).tolist() == [[0, 0, 1]]


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn(5, 12, generator=generator), torch.randn(7, 12, generator=generator)
    row = torch.arange(5).repeat(7)
    sums = row, torch.arange(7).repeat_interleave(5), torch.randint(-2, 3, (35,), generator=generator).float()

    def found():
        taken = torch.zeros(5, 12)
        return spread(weights, inputs, sums, 0.2, (taken, row)), taken

    whole = found()
    monkeypatch.setattr(contributions_kept, "_CHUNK", 24)
    assert all(torch.equal(one, other) for one, other in zip(whole, found(), strict=True))
