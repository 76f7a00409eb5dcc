import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remos_hf.slicing.effective_path import effective_path, largest_positive
from tests import tiny


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=7), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_the_fewest_of_the_largest_that_reach_the_share(effects, theta):
    (marked,) = largest_positive(torch.tensor([effects], dtype=torch.float32), theta).tolist()
    kept = [one for one, mark in zip(effects, marked, strict=True) if mark]
    others = [one for one, mark in zip(effects, marked, strict=True) if not mark]
    assert all(one > 0 for one in kept)
    assert not kept or not others or min(kept) > max(others)  # equal ones stay together
    bound = theta * max(0, sum(effects))
    assert not kept or sum(kept) >= bound - 1e-5
    assert sum(one for one in kept if one > min(kept)) < bound or len(set(kept)) <= 1
    assert bool(kept) == (max(effects) > 0)


def test_what_just_reaches_the_share_is_enough():
    assert largest_positive(torch.tensor([[3.0, 1.0, 2.0]]), 0.5).tolist() == [[1.0, 0.0, 0.0]]


def test_a_path_is_counted_and_never_negative():
    model, (batch, *_) = tiny.mlp().eval(), [torch.randn(6, 5, generator=torch.Generator().manual_seed(0))]
    found = effective_path(model, [batch], each_sample=["4.weight"])
    each = found.each_sample["4.weight"]
    assert all(bool((one >= 0).all()) for one in found.weights.values())
    label = model(batch).argmax(1)
    hidden = model[:4](batch)
    for sample in range(6):
        effects = model[4].weight[label[sample]] * hidden[sample]
        expected = torch.zeros_like(each[sample])
        expected[label[sample]] = largest_positive(effects[None].detach(), 0.5)[0].int()
        assert torch.equal(each[sample], expected)


@pytest.mark.parametrize("theta", [1.0, -0.1])
def test_theta_is_a_share(theta):
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        effective_path(tiny.mlp().eval(), [torch.randn(2, 5)], theta=theta)
