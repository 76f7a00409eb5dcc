import copy

import pytest
import torch
from torch import nn

from remos_hf.defects.frozen_entries import FrozenEntries


class TestFrozenEntries:
    def test_gradients_of_held_entries_are_zero_inside_and_whole_again_after(self):
        weight, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        mask = torch.tensor([True, False, True])
        with FrozenEntries({"a": (weight, mask), "b": (whole, None)}):
            (weight.sum() + whole.sum()).backward()
        assert weight.grad.tolist() == [0, 1, 0]
        assert whole.grad.tolist() == [0, 0]
        weight.grad = None
        weight.sum().backward()
        assert weight.grad.tolist() == [1, 1, 1]

    def test_hooks_are_gone_after_an_error(self):
        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(ZeroDivisionError), FrozenEntries({"a": (weight, None)}):
            _ = 1 / 0
        assert not weight._backward_hooks

    def test_values_are_written_back_after_each_step(self):
        weight, whole = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
        held = FrozenEntries({"a": (weight, torch.tensor([True, False])), "b": (whole, None)})
        for _ in range(2):
            with torch.no_grad():
                weight.add_(1)
                whole.add_(1)
            held.on_step_end(None, None, None)
        assert weight.tolist() == [1, 4]
        assert whole.tolist() == [3]

    def test_a_parameter_that_does_not_train_is_held_too(self):
        weight = nn.Parameter(torch.ones(2), requires_grad=False)
        with FrozenEntries({"a": (weight, None)}) as held, torch.no_grad():
            weight.add_(1)
            held.on_step_end(None, None, None)
        assert weight.tolist() == [1, 1]
        copy.deepcopy(weight)
