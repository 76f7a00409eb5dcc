import pytest
import torch
from torch import nn

from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.reference import Reference, profile_reference
from remos_hf.slicing.gradient_contributions import gradient_contributions
from tests import tiny
from tests.slicing.test_contributions import small_net


def test_of_a_linear_model_they_are_the_effects_themselves():
    model = nn.Sequential(nn.Linear(5, 3)).eval()
    samples = torch.randn(6, 5)
    found = gradient_contributions(model, [samples], profile_reference(model, [samples]), outputs=1)["0.weight"]
    effects = model[0].weight[1] * (samples - samples.mean(0))
    assert torch.allclose(found[1], effects.abs().sum(0), atol=1e-5) and not bool(found[[0, 2]].any())


@pytest.mark.parametrize("make", [small_net, lambda: tiny.ConvNet().eval()])
def test_of_convolutions_they_are_the_weights_gradient_times_the_weight(make):
    model, (batch, *_) = make(), tiny.image_batches()
    found = gradient_contributions(model, [batch], Reference(), outputs=0)
    for name, parameter in model.named_parameters():
        if name in found:
            slow = torch.zeros_like(parameter)
            for image in batch[0]:
                (one,) = torch.autograd.grad(model(image[None])[0, 0], [parameter])
                slow += (one * parameter).abs()
            assert torch.allclose(found[name], slow, atol=1e-5), name
    assert len(found) in (4, 6)


def test_frozen_parameters_are_frozen_again_and_texts_work():
    model = tiny.gpt2().requires_grad_(False)
    found = gradient_contributions(model, tiny.text_batches(1), Reference())
    assert not any(one.requires_grad for one in model.parameters())
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)


def test_a_body_that_runs_without_gradients_is_named():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    with pytest.raises(UnsupportedModelError, match="'body' runs without gradients"):
        gradient_contributions(Frozen().eval(), [torch.randn(2, 5)], Reference())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(mode):
    model, batch = tiny.mlp().eval(), torch.randn(4, 5)
    found = gradient_contributions(model, [batch], Reference())
    with mode():
        again = gradient_contributions(model, [batch], Reference())
    assert all(torch.equal(one, again[name]) for name, one in found.items())
