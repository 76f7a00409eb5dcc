"""The effects of weighted sums beside captum's DeepLift, whose linear rule is the same: w * dx, and they add up."""

import pytest
import torch
from captum.attr import LayerDeepLift
from torch import nn

from remos_hf.adapters.flow_recording import flow_of
from remos_hf.profiling.reference import profile_reference
from remos_hf.slicing.contribution_rules import Analysis, relative_output
from remos_hf.slicing.contributions import contributions
from tests import tiny

SIZES = (5, 7, 6, 3)


def chain(linears):
    """Linear layers with ReLUs between them."""
    return tiny.mlp(sizes=SIZES)[: 2 * linears - 1].eval()


def effects_of(model, samples, usual, neuron):
    """What DeepLift says of the inputs of the last layer."""
    lift = LayerDeepLift(model, model[-1])
    return lift.attribute(samples, usual.expand_as(samples), target=neuron, attribute_to_layer_input=True).detach()


def kept(effects, theta):
    """Drop the most of the smallest effects whose sum stays under theta times the whole, found one by one."""
    order = effects.abs().argsort()
    bound = theta * abs(float(effects.sum()))
    most = max(count for count in range(len(effects)) if count == 0 or abs(float(effects[order[:count]].sum())) < bound)
    signs = effects.sign() * effects.sum().sign()
    signs[order[:most]] = 0
    return signs


@pytest.fixture
def samples():
    return torch.randn(16, SIZES[0], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("linears", [1, 2, 3])
class TestTheLastOfAChain:
    def test_relative_outputs_are_what_its_effects_add_up_to(self, samples, linears):
        model, usual = chain(linears), torch.full((1, SIZES[0]), 0.3)
        flow, reference = flow_of(model, samples), profile_reference(model, [usual])
        last = flow.made_by[flow.output]
        found = relative_output(last, Analysis(flow, reference, 0.0, lambda *_: None))
        for neuron in range(SIZES[linears]):
            expected = effects_of(model, samples, usual, neuron).sum(1)
            assert torch.allclose(found[:, neuron], expected, atol=1e-5)

    @pytest.mark.parametrize("theta", [0.0, 0.2, 0.7])
    def test_contributions_are_the_signs_of_its_effects_that_are_kept(self, samples, linears, theta):
        model, usual = chain(linears), torch.full((1, SIZES[0]), 0.3)
        reference, name = profile_reference(model, [usual]), f"{2 * linears - 2}.weight"
        for neuron in range(SIZES[linears]):
            found = contributions(model, [samples], reference, outputs=neuron, theta=theta, each_sample=[name])
            expected = torch.stack([kept(one, theta) for one in effects_of(model, samples, usual, neuron)])
            assert torch.equal(found.each_sample[name][:, neuron].float(), expected)
            assert isinstance(model[-1], nn.Linear) and bool(expected.any())
